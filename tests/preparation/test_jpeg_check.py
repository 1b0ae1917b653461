"""Damage in JPEGs that decode without a warning is found; undamaged ones show none."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import simplejpeg

from ftlib.preparation.jpeg_check import fault, segments


def drawing(seed: int) -> np.ndarray:
    """Text and lines, black and white and full colours: what rings most and clamps most."""
    rng = np.random.default_rng(seed)
    picture = np.full((120, 160, 3), 255 * (seed % 2), np.uint8)
    for line in range(8):
        colour = tuple(int(c) for c in rng.choice([0, 255], 3))
        cv2.putText(
            picture,
            "Hg%&#@ il1",
            (int(rng.integers(-20, 60)), 15 * line + 10),
            int(rng.integers(8)),
            float(rng.uniform(0.3, 1.2)),
            colour,
            int(rng.integers(1, 3)),
        )
    return picture


def noise(share: float) -> np.ndarray:
    return np.repeat(
        (np.random.default_rng(0).random((64, 64, 1)) > share).astype(np.uint8) * 255, 3, axis=2
    )


def encoded(picture: np.ndarray, quality: int, subsampling: str = "420") -> bytes:
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture),
        quality=quality,
        colorspace="RGB",
        colorsubsampling=subsampling,
    )


@pytest.mark.parametrize("quality", [1, 10, 30, 60, 85, 95, 100])
def test_extreme_but_healthy_pictures_show_no_fault(quality: int) -> None:
    pictures = [drawing(seed) for seed in range(8)] + [noise(share) for share in (0.02, 0.5, 0.98)]
    assert [fault(encoded(p, quality, s)) for p in pictures for s in ("420", "444")] == [
        None
    ] * 2 * len(pictures)


def test_a_shift_of_brightness_counts_as_damage() -> None:
    """Twice the quantizer of the mean brightness, as one flipped bit makes it."""
    picture = cv2.resize(
        np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8),
        (128, 128),
        interpolation=cv2.INTER_CUBIC,
    )
    data = bytearray(encoded(picture, 90))
    at = data.index(b"\xff\xdb") + 5
    data[at] *= 2
    simplejpeg.decode_jpeg(bytes(data), "RGB", strict=True)  # the decoder has nothing against it
    assert "brightness leaves the range" in (fault(bytes(data)) or "")


def test_tables_that_no_encoder_writes_count_as_damage() -> None:
    data = bytearray(encoded(drawing(0), 90))
    quantizer, codes = data.index(b"\xff\xdb") + 5, data.index(b"\xff\xc4") + 5
    zero = data.copy()
    zero[quantizer + 7] = 0
    assert "zero in it" in (fault(bytes(zero)) or "")
    twice = data.copy()
    twice[codes + 16 + 1] = twice[codes + 16]
    assert "names a symbol twice" in (fault(bytes(twice)) or "")


def test_bytes_that_are_no_jpeg_raise_nothing() -> None:
    rng = np.random.default_rng(0)
    for data in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xdb\x00\x03\x00",
        b"\xff\xd8" + rng.bytes(1000),
        encoded(drawing(0), 50)[:200],
    ):
        fault(data)
    assert [marker for marker, _ in segments(encoded(drawing(0), 50))][:2] == [0xE0, 0xDB]


def test_pictures_without_brightness_or_smaller_than_a_block_are_not_judged_by_it() -> None:
    assert (
        fault(simplejpeg.encode_jpeg(np.full((16, 16, 4), 200, np.uint8), colorspace="CMYK"))
        is None
    )
    assert fault(encoded(np.zeros((5, 7, 3), np.uint8), 90)) is None
