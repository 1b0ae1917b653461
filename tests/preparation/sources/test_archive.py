"""Archives are read in place; hostile ones are refused before they are read."""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from ftlib.data.shards import DataError
from ftlib.preparation.sources import archive, places
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import many, rows, tree

NO_VAL = SourceOptions(val_fraction=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of files with contents of their own."""
    root = tmp_path / "pictures"
    rng = random.Random(1)
    for name in many("a", "b", n=5):
        tree(root, name, data=rng.randbytes(1000 + len(name)))
    return root


def pack(folder: Path, kind: str, wrapped: bool = False) -> Path:
    path = folder.parent / f"packed.{kind}"
    base = folder.parent if wrapped else folder
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for i, file in enumerate(files):
                method = zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED
                out.write(file, file.relative_to(base), method)
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as out:
            for child in sorted(base.iterdir()) if not wrapped else [folder]:
                out.add(child, child.relative_to(base))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_archive_lists_and_reads_like_its_folder(folder: Path, kind: str, wrapped: bool) -> None:
    found = scan(pack(folder, kind, wrapped), NO_VAL)
    assert rows(found) == rows(scan(folder, NO_VAL))
    shuffled = list(found.entries)
    random.Random(2).shuffle(shuffled)
    for entry in shuffled:
        assert entry.place is not None
        assert entry.place.read() == (folder / entry.file).read_bytes()
        assert entry.bytes == (folder / entry.file).stat().st_size


def test_gzip_is_read_at_random_across_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "GZIP_STEP", 5000)
    rng = random.Random(3)
    data = b"".join(rng.randbytes(50) * rng.randint(1, 4) for _ in range(20_000))
    path = tmp_path / "data.gz"
    half = len(data) // 2
    path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 100)
    reader = places.gzip_reader(str(path))
    for _ in range(200):
        offset, length = rng.randrange(len(data)), rng.randrange(3000)
        assert reader.read(offset, length) == data[offset : offset + length]
    assert len(places._POINTS[(str(path), path.stat().st_mtime_ns)]) > 10
    assert reader.read(len(data) + 10, 5) == b""


def test_gzip_that_is_cut_short_is_an_error(folder: Path) -> None:
    path = pack(folder, "tar.gz")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(DataError, match=r"cannot be read as an archive.*cut short"):
        scan(path, NO_VAL)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_damaged_archives_are_named(folder: Path, kind: str) -> None:
    path = pack(folder, kind)
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=rf"{path} cannot be read as an archive"):
        scan(path, NO_VAL)
    path.write_bytes(b"")
    with pytest.raises(DataError):
        scan(path, NO_VAL)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_in_an_archive_reach_nothing_outside(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    names = ["../../a/0.jpg", "/a/1.jpg", "a/../../../a/2.jpg", "b\\0.jpg", "b/1.jpg"]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as out:
            for name in names:
                out.writestr(name, b"x")
            link = zipfile.ZipInfo("b/link.jpg")
            link.external_attr = 0o120777 << 16
            out.writestr(link, "/etc/passwd")
    else:
        with tarfile.open(path, "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
            member = tarfile.TarInfo("b/link.jpg")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    before = set(os.listdir(tmp_path))
    found = scan(path, NO_VAL)
    assert all(".." not in e.file and not e.file.startswith("/") for e in found.entries)
    assert all(e.place is not None and e.place.read() == b"x" for e in found.entries)
    assert "link" in found.rejected[0].why and set(os.listdir(tmp_path)) == before


def test_a_zip_bomb_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "RATIO_FROM", 1 << 20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/0.jpg", b"\0" * (20 << 20))
    with pytest.raises(DataError, match=r"decompression bomb"):
        scan(path, NO_VAL)
    gz = tmp_path / "bomb.tar.gz"
    with tarfile.open(gz, "w:gz") as tar:
        member = tarfile.TarInfo("a/0.jpg")
        member.size = 20 << 20
        tar.addfile(member, io.BytesIO(b"\0" * (20 << 20)))
    with pytest.raises(DataError, match=r"decompression bomb"):
        scan(gz, NO_VAL)


def test_a_member_that_is_larger_than_the_archive_says_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in many("a", "b", n=1):
            out.writestr(name, b"y" * 5000)
    data = path.read_bytes()
    size = (5000).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (10).to_bytes(4, "little")))
    entry = scan(path, NO_VAL).entries[0]
    assert entry.bytes == 10 and entry.place is not None
    with pytest.raises(OSError, match=r"larger than the archive says"):
        entry.place.read()


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name in many("a", "b", n=2):
            out.writestr(name, os.urandom(3000))
        for info in out.filelist:
            info.header_offset = out.filelist[0].header_offset
            info.compress_size = info.file_size = 3000
        out.filelist = out.filelist * 2
        out._didModify = True
    with pytest.raises(DataError, match=r"overlap"):
        scan(path, NO_VAL)


def test_an_encrypted_zip_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/0.jpg", b"x")
        out.filelist[0].flag_bits |= 1
        out._didModify = True
    with pytest.raises(DataError, match=r"is encrypted .a/0.jpg"):
        scan(path, NO_VAL)


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
    with gzip.open(path, "wb") as out:
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        out.write(b"\0" * (1 << 20))
    with pytest.raises(DataError, match=r"cannot be read as an archive"):
        scan(path, NO_VAL)
