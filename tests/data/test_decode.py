import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from ftlib.data.decode import DecodeError, decode, dimensions


def jpeg(image, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


@pytest.fixture(scope="module")
def flower():
    return load_sample_image("flower.jpg")


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"subsampling": 1}], ids=str
)
@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)],
    ids=["bytes", "bytearray", "memoryview", "array"],
)
def test_pixels_equal_those_of_pil(flower, options, kind):
    data = jpeg(flower, **options)
    pixels = decode(kind(data))
    assert pixels.shape == (427, 640, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))
    assert dimensions(kind(data)) == (427, 640)


def test_gray_pictures_become_three_channels(flower):
    pixels = decode(jpeg(flower[..., 0]))
    assert pixels.shape == (427, 640, 3) and (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_shrinking_equals_pils_draft_mode(flower, shrink):
    data = jpeg(flower)
    theirs = Image.open(io.BytesIO(data))
    theirs.draft("RGB", (640 // shrink, 427 // shrink))
    ours = decode(data, shrink)
    assert ours.shape == (-(-427 // shrink), -(-640 // shrink), 3)
    assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda b: b"", "no bytes"),
        (lambda b: b"<html>", "not a JPEG"),
        (lambda b: b[: len(b) // 2], "the end is missing"),
        (lambda b: b[:-100], "the end is missing"),
        (lambda b: b[: len(b) // 2] + b"\xff\xd9", "damaged"),
        (lambda b: b[:2], "damaged"),
        (lambda b: b[: len(b) // 2] + bytes(len(b) // 2), "damaged"),
    ],
)
def test_damaged_pictures_are_refused(flower, damage, why):
    data = damage(jpeg(flower))
    with pytest.raises(DecodeError, match=why):
        decode(data)


def test_damaged_headers_are_refused():
    with pytest.raises(DecodeError, match="not a JPEG"):
        dimensions(b"\x89PNG\r\n\x1a\n")
