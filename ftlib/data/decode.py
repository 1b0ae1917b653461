"""JPEG bytes to pixels, strictly.

Prepared sets hold only upright three-channel JPEGs that decoded without a warning, so a
decoding error here means damaged storage. simplejpeg (libjpeg-turbo) in strict mode refuses
files that other decoders return as half-gray pictures.
"""

from __future__ import annotations

from typing import Union

import numpy as np
import simplejpeg

Jpeg = Union[bytes, bytearray, memoryview, np.ndarray]
"""The bytes of a JPEG file; an array is uint8[n]."""


class DecodeError(ValueError):
    """The bytes are not a whole, undamaged JPEG."""


def decode(jpeg: Jpeg, shrink: int = 1) -> np.ndarray:
    """uint8[H, W, 3], red first. Raises DecodeError.

    `shrink` 2, 4 or 8 decodes to 1/shrink of each side (rounded up) in the DCT domain: a good
    low-pass filter, and much faster on large pictures.
    """
    try:
        if shrink == 1:
            return simplejpeg.decode_jpeg(jpeg, "RGB")
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        return simplejpeg.decode_jpeg(
            jpeg,
            "RGB",
            min_factor=shrink,
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
        )
    except ValueError as error:
        raise DecodeError(_explain(jpeg, error)) from None


def dimensions(jpeg: Jpeg) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone. Raises DecodeError."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise DecodeError(_explain(jpeg, error)) from None
    return height, width


def as_memoryview(jpeg: Jpeg) -> memoryview:
    """The bytes without a copy."""
    return memoryview(jpeg)  # type: ignore[arg-type]  # an array has the buffer protocol too


def _explain(jpeg: Jpeg, error: ValueError) -> str:
    data = as_memoryview(jpeg).cast("B")
    if len(data) == 0:
        return "no bytes at all"
    if bytes(data[:2]) != b"\xff\xd8":
        first = bytes(data[:4]).hex(" ")
        return f"not a JPEG: the {len(data)} bytes begin with {first}, not with ff d8"
    cut = "" if b"\xff\xd9" in bytes(data[-64:]) else "; the end is missing"
    return f"damaged JPEG of {len(data)} bytes: {error}{cut}"
