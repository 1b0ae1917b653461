"""Every file below a folder is either listed or counted, whatever its name and however linked."""

import os
from pathlib import Path

from ftlib.deploy.picture_list import HIDDEN, list_pictures
from tests.picture_files import TAKEN


def test_pictures_are_listed_and_all_else_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    jpeg = TAKEN["baseline JPEG"]()
    for name in ("a.JPG", "no_extension", "named.dat", "sub/b.jpeg", "c.avif"):
        (root / name).write_bytes(jpeg)
    for name in ("x.HEIC", "y.jxl", "z.dcm", "empty.png"):
        (root / name).write_bytes(b"")
    for name in ("notes.txt", "more.txt", "table.csv", "LICENSE", "._a.JPG", ".DS_Store"):
        (root / name).write_text("no picture")
    found = list_pictures(root)
    assert found.files == [
        *("a.JPG", "c.avif", "empty.png", "named.dat", "no_extension"),
        *("sub/b.jpeg", "x.HEIC", "y.jxl", "z.dcm"),
    ]
    assert found.left_aside == {".txt": 2, ".csv": 1, "without extension": 1, HIDDEN: 2}
    assert found.left_aside_text().startswith("left aside 6 files that are no pictures (2 ")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").write_bytes(TAKEN["baseline JPEG"]())
    os.symlink(tmp_path / "other", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "other" / "back")
    os.symlink(tmp_path / "nowhere", tmp_path / "in" / "broken.jpg")
    assert list_pictures(tmp_path / "in").files == ["broken.jpg", "linked/a.jpg"]


def test_one_file_is_listed_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no picture")
    assert list_pictures(tmp_path / "x.txt").files == ["x.txt"]
