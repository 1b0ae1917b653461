"""A set of deep pictures is scaled by the bits that it uses, and its manifest says so."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ftlib.preparation import depth
from ftlib.preparation.depth import with_depth_bits
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.prepare import prepare
from tests.picture_files import deep, file, opencv, scene


def folder(root: Path, bits: int) -> Path:
    for split, kind in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        (root / split / kind).mkdir(parents=True)
        for i in range(3):
            samples = deep(bits) // (1 if kind == "cat" else 2 + i)
            (root / split / kind / f"{i}.png").write_bytes(opencv(".png", samples))
    return root


def test_a_12_bit_set_is_scaled_by_12_bits(tmp_path: Path) -> None:
    source = folder(tmp_path / "xrays", 12)
    made = prepare(source, tmp_path / "out", workers=1, progress=False)
    assert made.dataset.manifest["made"]["rules"]["depth_bits"] == 12
    split = made.dataset.split("train")
    brightest = {}
    for row in range(len(split)):
        picture = cv2.imdecode(np.frombuffer(split.image(row), np.uint8), cv2.IMREAD_GRAYSCALE)
        brightest.setdefault(split.path(row).split("/")[-2], []).append(int(picture.max()))
    assert min(brightest["cat"]) > 200
    assert max(brightest["dog"]) < 150, "a dark picture was brightened by its own range"
    again = prepare(source, tmp_path / "out", workers=1, progress=False)
    assert again.already_done


def test_a_given_range_is_kept(tmp_path: Path) -> None:
    options = PrepareOptions(depth_range=(0, 255))
    assert with_depth_bits(options, ["a.png"], lambda *_: pytest.fail("read")) is options


def test_sets_without_deep_pictures_keep_their_identity() -> None:
    files = {"a.jpg": file(scene()), "b.png": file(scene(), "PNG"), "c.tif": file(scene(), "TIFF")}
    options = PrepareOptions()
    found = with_depth_bits(options, files, lambda name, n: files[name][: n if n >= 0 else None])
    assert found == options
    assert not {"depth_bits", "depth_range"} & set(options.to_dict())


def test_damaged_files_are_passed_over_and_few_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "SAMPLE", 4)
    files = {f"{i:02d}.png": opencv(".png", deep(10)) for i in range(10)}
    files["00.png"] = files["00.png"][:60]
    whole: list[str] = []

    def read(name: str, n: int) -> bytes:
        if n < 0:
            whole.append(name)
            return files[name]
        return files[name][:n]

    assert with_depth_bits(PrepareOptions(), files, read).depth_bits == 10
    assert whole == ["00.png", "03.png", "06.png", "09.png"]


def test_tiff_and_16_bit_color_count() -> None:
    buffer = io.BytesIO()
    Image.fromarray(deep(14)).save(buffer, "TIFF")
    files = {"a.tiff": buffer.getvalue(), "b.PNG": opencv(".png", deep(11, 3))}
    found = with_depth_bits(PrepareOptions(), files, lambda f, n: files[f][: n if n >= 0 else None])
    assert found.depth_bits == 14
