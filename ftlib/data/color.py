"""Color changes of uint8[H, W, 3] by OpenCV, as PIL's ImageEnhance and ImageOps and torchvision
define them."""

from __future__ import annotations

import math

import cv2
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in PIL's "L" (ITU-R 601-2)."""
_TO_GRAY, _IDENTITY = np.tile(LUMA, (3, 1)), np.eye(3)


def brightness(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Brightness, up to rounding: factor * picture."""
    return cv2.convertScaleAbs(img, alpha=factor)


def contrast(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Contrast, up to rounding: away from the mean gray of the picture."""
    gray = (1 - factor) * math.floor(float(LUMA @ cv2.mean(img)[:3]) + 0.5)
    matrix = np.array([[factor, 0, 0, gray], [0, factor, 0, gray], [0, 0, factor, gray]])
    return cv2.transform(img, matrix)


def saturation(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Color, up to rounding: away from the gray of each pixel."""
    return cv2.transform(img, (1 - factor) * _TO_GRAY + factor * _IDENTITY)


def hue(img: np.ndarray, turns: float) -> np.ndarray:
    """torchvision's adjust_hue: turns the hue by `turns` (-0.5 to 0.5) in 8-bit HSV."""
    by = int(turns * 255)
    if by == 0:
        return img
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV_FULL)
    shift = np.zeros(3 * img.shape[1], np.uint8)
    shift[::3] = by % 256
    # Adding whole rows is three times faster than adding to every third value.
    hsv.reshape(len(hsv), -1)[:] += shift
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def sharpness(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Sharpness, up to rounding: away from a 3x3 smoothing.

    The outermost pixels stay as they are.
    """
    kernel = np.full((3, 3), (1 - factor) / 13)
    kernel[1, 1] = (1 - factor) * 5 / 13 + factor
    out = cv2.filter2D(img, -1, kernel)
    out[0], out[-1], out[:, 0], out[:, -1] = img[0], img[-1], img[:, 0], img[:, -1]
    return out


def gamma(img: np.ndarray, octaves: float) -> np.ndarray:
    """picture ** (2 ** octaves), on 0..1."""
    return cv2.LUT(img, np.rint(255 * np.linspace(0, 1, 256) ** 2**octaves).astype(np.uint8))


def autocontrast(counts: np.ndarray) -> np.ndarray | None:
    """PIL's ImageOps.autocontrast as float64[256], a look-up table, from the int64[256] histogram.

    None for no change.
    """
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1])
    if high <= low:
        return None
    scale = 255 / (high - low)
    return np.trunc(np.arange(256) * scale - low * scale)


def equalize(counts: np.ndarray) -> np.ndarray | None:
    """PIL's ImageOps.equalize as int64[256], a look-up table, from the int64[256] histogram.

    None for no change.
    """
    used = counts[counts > 0]
    step = int(used.sum() - used[-1]) // 255
    if step == 0:
        return None
    return (step // 2 + np.cumsum(counts) - counts) // step
