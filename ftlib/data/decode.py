"""JPEG bytes to pixels, strictly.

Prepared sets hold nothing but upright three-channel JPEGs that decoded without a warning, so a decoding error here means damaged
storage. simplejpeg (libjpeg-turbo) in strict mode refuses what other decoders return as half-grey pictures.
"""

from __future__ import annotations

import numpy as np
import simplejpeg


class DecodeError(ValueError):
    """The bytes are not a whole, undamaged JPEG."""


def decode(jpeg: bytes | bytearray | memoryview | np.ndarray, shrink: int = 1) -> np.ndarray:
    """uint8[H, W, 3], red first. `shrink` 2, 4 or 8 decodes to 1/shrink of each side (rounded up), in the DCT domain: a good
    low-pass filter, and much faster on large pictures."""
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
        raise DecodeError(_why(jpeg, error)) from None


def dimensions(jpeg: bytes | bytearray | memoryview | np.ndarray) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise DecodeError(_why(jpeg, error)) from None
    return height, width


def _why(jpeg: bytes | bytearray | memoryview | np.ndarray, error: ValueError) -> str:
    data = memoryview(jpeg).cast("B")
    if len(data) == 0:
        return "no bytes at all"
    if bytes(data[:2]) != b"\xff\xd8":
        return f"not a JPEG: the {len(data)} bytes begin with {bytes(data[:4]).hex(' ')}, not with ff d8"
    cut = "" if b"\xff\xd9" in bytes(data[-64:]) else "; the end is missing"
    return f"damaged JPEG of {len(data)} bytes: {error}{cut}"
