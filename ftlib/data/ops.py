"""The table of augmentation ops that RandAugment and TrivialAugment choose from. Adding an op is adding a row to `OPS`.

Every op is an Albumentations transform made for one strength from 0 to 1 and one picture side. Strength 0 leaves every
pixel as it is, and more strength changes more. Lengths are shares of the side, so an op means the same at 32 and at 224 px.

Where Albumentations' own op does what its namesake in PIL does, and fast, it is used. Own transforms stand where it does not:
an affine warp with a random sign rather than a range; elastic deformation and pixel noise (ten times cheaper, same statistics);
colour changes as PIL's ImageEnhance and ImageOps define them, autocontrast and equalize with a strength.

All randomness comes from the generators that `set_random_state` installs. Albumentations' own seeding is never used: in
2.0.8 it gives every transform the same stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, radians, sin
from typing import Any, Literal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np

from ftlib.data.keys import AUGMENT, key

Group = Literal["geometric", "noise", "colour"]
GROUPS: tuple[Group, ...] = ("geometric", "noise", "colour")
GREY = (128, 128, 128)
"""Fill of uncovered pixels, as in AutoAugment (Cubuk et al. 2019)."""


@dataclass(frozen=True)
class Op:
    name: str
    group: Group
    build: Callable[[float, int], A.BasicTransform]
    """(strength above 0 and up to 1, side in pixels) -> transform that always acts."""
    at_most: str
    """What it does at strength 1."""

    def at(self, strength: float, size: int) -> A.BasicTransform:
        """The transform at a strength from 0 to 1, for pictures uint8[size, size, 3]."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} of {self.name}: must be 0 to 1")
        return self.build(strength, size) if strength > 0 else A.NoOp(p=1)


class Pixels(A.ImageOnlyTransform):
    """Base of the own transforms: a function of (picture uint8[H, W, 3], amount) that always acts."""

    def __init__(self, amount: float, signed: bool = False) -> None:
        super().__init__(p=1)
        self.amount = amount
        self.signed = signed

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return "amount", "signed"

    def get_params(self) -> dict[str, Any]:
        minus = self.signed and self.py_random.random() < 0.5
        return {"amount": -self.amount if minus else self.amount}


# --- geometric ----------------------------------------------------------------------------------------------------------------------

class Warp(Pixels):
    """An affine warp about the centre: linear interpolation, grey outside."""

    def __init__(self, matrix: Callable[[float], tuple[float, float, float, float, float, float]], amount: float) -> None:
        super().__init__(amount, signed=True)
        self.matrix = matrix

    def apply(self, img: np.ndarray, amount: float = 0.0, **_: Any) -> np.ndarray:
        height, width = img.shape[:2]
        a, b, tx, c, d, ty = self.matrix(amount)
        x, y = (width - 1) / 2, (height - 1) / 2  # x' = M (x - centre) + centre + t * side
        around = np.array([[a, b, x - a * x - b * y + tx * width], [c, d, y - c * x - d * y + ty * height]])
        return cv2.warpAffine(img, around, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=GREY)


def rotation(degrees: float) -> tuple[float, float, float, float, float, float]:
    c, s = cos(radians(degrees)), sin(radians(degrees))
    return c, -s, 0, s, c, 0


def shear_x(by: float) -> tuple[float, float, float, float, float, float]:
    return 1, by, 0, 0, 1, 0


def shear_y(by: float) -> tuple[float, float, float, float, float, float]:
    return 1, 0, 0, by, 1, 0


def shift_x(by: float) -> tuple[float, float, float, float, float, float]:
    return 1, 0, by, 0, 1, 0


def shift_y(by: float) -> tuple[float, float, float, float, float, float]:
    return 1, 0, 0, 0, 1, by


def zoom(octaves: float) -> tuple[float, float, float, float, float, float]:
    return 2**octaves, 0, 0, 0, 2**octaves, 0


class Elastic(Pixels):
    """Elastic deformation (Simard et al. 2003) by a smooth random field of rms displacement `amount` pixels.

    Blurring white noise with sigma at full size is what makes the usual way slow. The same field - Gaussian, with autocorrelation
    exp(-d^2 / 4 sigma^2) - comes of noise on a grid of spacing sigma, blurred by one spacing and upsampled, many times cheaper.
    """

    def __init__(self, amount: float, sigma: float) -> None:
        super().__init__(amount)
        self.sigma = sigma

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"field": self.field(*data["image"].shape[:2])}

    def field(self, height: int, width: int) -> np.ndarray:
        """float32[height, width, 2]: displacement in x and y, in pixels."""
        edge = 3  # grid points that the blur's border reaches, cut off again
        rows, cols = ceil(height / self.sigma) + 3, ceil(width / self.sigma) + 3  # 3: what the cubic's border reaches
        coarse = self.random_generator.standard_normal((rows + 2 * edge, cols + 2 * edge, 2), np.float32)
        coarse = cv2.GaussianBlur(coarse, (0, 0), 1.0)[edge:-edge, edge:-edge]
        fine = cv2.resize(coarse, (ceil(cols * self.sigma), ceil(rows * self.sigma)), interpolation=cv2.INTER_CUBIC)
        start = int(self.sigma)
        fine = fine[start : start + height, start : start + width]
        return fine * np.float32(self.amount * 2 * np.sqrt(np.pi))  # the blur left a standard deviation of 1 / (2 sqrt pi)

    def apply(self, img: np.ndarray, field: np.ndarray | None = None, **_: Any) -> np.ndarray:
        return cv2.remap(img, _pixel_grid(*img.shape[:2]) + field, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


@lru_cache(maxsize=4)
def _pixel_grid(height: int, width: int) -> np.ndarray:
    """float32[height, width, 2]: each pixel's own x and y."""
    y, x = np.indices((height, width), np.float32)
    return np.dstack([x, y])


# --- noise --------------------------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def _normals(n: int) -> np.ndarray:
    """A pool of standard normal float32 numbers to cut n neighbours out of: drawing anew for each picture costs ten times more."""
    pool = np.random.Generator(np.random.Philox(key=key(AUGMENT, 0))).standard_normal(n + (1 << 20), np.float32)
    pool.setflags(write=False)
    return pool


class Noise(Pixels):
    """Independent noise on every value, of standard deviation `amount`: Gaussian, a cut out of a fixed pool at a random place."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        shape = data["image"].shape
        n = int(np.prod(shape))
        start = self.py_random.randrange(1 << 20)
        return {"normals": _normals(n)[start : start + n].reshape(shape)}


class Additive(Noise):
    """picture + amount * normals; `amount` in grey levels."""

    def apply(self, img: np.ndarray, normals: np.ndarray | None = None, **_: Any) -> np.ndarray:
        return cv2.add(img, cv2.multiply(normals, self.amount, dtype=cv2.CV_16S), dtype=cv2.CV_8U)


class Multiplicative(Noise):
    """picture * (1 + amount * normals): speckle."""

    def apply(self, img: np.ndarray, normals: np.ndarray | None = None, **_: Any) -> np.ndarray:
        return cv2.multiply(img, cv2.addWeighted(normals, self.amount, normals, 0, 1), dtype=cv2.CV_8U)


# --- colour -------------------------------------------------------------------------------------------------------------------------

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in PIL's "L" (ITU-R 601-2)."""


def brightness(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Brightness, up to rounding: factor * picture."""
    return cv2.convertScaleAbs(img, alpha=factor)


def contrast(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Contrast, up to rounding: away from the picture's mean grey by `factor`."""
    mean = np.floor(float(LUMA @ cv2.mean(img)[:3]) + 0.5)
    matrix = np.zeros((3, 4))
    np.fill_diagonal(matrix, factor)
    matrix[:, 3] = (1 - factor) * mean
    return cv2.transform(img, matrix)


def saturation(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Color, up to rounding: away from the pixel's own grey by `factor`."""
    return cv2.transform(img, (1 - factor) * np.tile(LUMA, (3, 1)) + factor * np.eye(3))


def hue(img: np.ndarray, turns: float) -> np.ndarray:
    """torchvision's adjust_hue: the hue turned by `turns` (-0.5 to 0.5) in 8-bit HSV."""
    by = int(turns * 255)
    if by == 0:
        return img
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(by % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def sharpness(img: np.ndarray, factor: float) -> np.ndarray:
    """PIL's ImageEnhance.Sharpness, up to rounding: away from a 3x3 smoothing by `factor`; the outermost pixels stay."""
    kernel = np.full((3, 3), (1 - factor) / 13)
    kernel[1, 1] = (1 - factor) * 5 / 13 + factor
    out = cv2.filter2D(img, -1, kernel)
    out[0], out[-1], out[:, 0], out[:, -1] = img[0], img[-1], img[:, 0], img[:, -1]
    return out


def gamma(img: np.ndarray, octaves: float) -> np.ndarray:
    """picture ** (2 ** octaves), on 0..1."""
    return cv2.LUT(img, np.rint(255 * np.linspace(0, 1, 256) ** 2**octaves).astype(np.uint8))


class Enhance(Pixels):
    """One of the functions above at `centre` plus or minus `amount`."""

    def __init__(self, function: Callable[[np.ndarray, float], np.ndarray], amount: float, centre: float = 1.0) -> None:
        super().__init__(amount, signed=True)
        self.function = function
        self.centre = centre

    def apply(self, img: np.ndarray, amount: float = 0.0, **_: Any) -> np.ndarray:
        return self.function(img, self.centre + amount)


class Tables(Pixels):
    """A look-up table per channel, made from the channel's histogram, taken by the share `amount`."""

    def __init__(self, table: Callable[[np.ndarray], np.ndarray | None], amount: float) -> None:
        super().__init__(amount)
        self.table = table

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        same = np.arange(256)
        tables = np.empty((1, 256, 3), np.uint8)
        for channel in range(3):
            found = self.table(cv2.calcHist([img], [channel], None, [256], [0, 256]).ravel().astype(np.int64))
            tables[0, :, channel] = same if found is None else np.rint((1 - self.amount) * same + self.amount * np.clip(found, 0, 255))
        return cv2.LUT(img, tables)


def autocontrast(counts: np.ndarray) -> np.ndarray | None:
    """PIL's ImageOps.autocontrast as a table, from the int64[256] histogram; None for no change."""
    used = np.flatnonzero(counts)
    low, high = int(used[0]), int(used[-1])
    if high <= low:
        return None
    scale = 255 / (high - low)
    return np.trunc(np.arange(256) * scale - low * scale)


def equalize(counts: np.ndarray) -> np.ndarray | None:
    """PIL's ImageOps.equalize as a table, from the int64[256] histogram; None for no change."""
    used = counts[counts > 0]
    step = int(used.sum() - used[-1]) // 255
    if step == 0:
        return None
    return (step // 2 + np.cumsum(counts) - counts) // step


# --- the table ----------------------------------------------------------------------------------------------------------------------

def _blur(s: float, size: int) -> A.BasicTransform:
    sigma = 0.012 * size * s**0.5  # what a blur takes away grows with sigma squared
    width = 1 + 2 * ceil(2.5 * sigma)
    return A.GaussianBlur(blur_limit=(width, width), sigma_limit=(sigma, sigma), p=1)


def _motion(s: float, size: int) -> A.BasicTransform:
    length = 1 + 2 * ceil(s * size * 0.02)
    return A.MotionBlur(blur_limit=(length, length), allow_shifted=False, p=1)


def _dropout(s: float, size: int) -> A.BasicTransform:
    side = ceil(s * size * 0.2)
    return A.CoarseDropout(num_holes_range=(6, 6), hole_height_range=(side, side), hole_width_range=(side, side), fill=GREY, p=1)


OPS: tuple[Op, ...] = (
    Op("rotate", "geometric", lambda s, _: Warp(rotation, 30 * s), "30 degrees either way"),
    Op("shear_x", "geometric", lambda s, _: Warp(shear_x, 0.3 * s), "0.3 of the height, either way"),
    Op("shear_y", "geometric", lambda s, _: Warp(shear_y, 0.3 * s), "0.3 of the width, either way"),
    Op("translate_x", "geometric", lambda s, _: Warp(shift_x, 0.3 * s), "0.3 of the width, either way"),
    Op("translate_y", "geometric", lambda s, _: Warp(shift_y, 0.3 * s), "0.3 of the height, either way"),
    Op("zoom", "geometric", lambda s, _: Warp(zoom, 0.5 * s), "1.41 times larger or smaller"),
    Op("perspective", "geometric", lambda s, _: A.Perspective(scale=(0.12 * s, 0.12 * s), fill=GREY, p=1), "corners moved by 0.12 of the side (standard deviation)"),
    Op("elastic", "geometric", lambda s, size: Elastic(0.02 * s * size, 0.05 * size), "smooth displacement of 0.02 of the side (rms)"),
    Op("gauss_noise", "noise", lambda s, _: Additive(50 * s), "standard deviation of 50 grey levels"),
    Op("multiplicative_noise", "noise", lambda s, _: Multiplicative(0.5 * s), "speckle, standard deviation of half the value"),
    Op("blur", "noise", _blur, "Gaussian, sigma of 0.012 of the side"),
    Op("motion_blur", "noise", _motion, "a line of 0.04 of the side in any direction"),
    Op("coarse_dropout", "noise", _dropout, "six grey squares of 0.2 of the side"),
    Op("brightness", "colour", lambda s, _: Enhance(brightness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("contrast", "colour", lambda s, _: Enhance(contrast, 0.9 * s), "factor 0.1 or 1.9"),
    Op("saturation", "colour", lambda s, _: Enhance(saturation, 0.9 * s), "factor 0.1 or 1.9"),
    Op("sharpness", "colour", lambda s, _: Enhance(sharpness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("hue", "colour", lambda s, _: Enhance(hue, 0.2 * s, centre=0.0), "0.2 turns either way"),
    Op("gamma", "colour", lambda s, _: Enhance(gamma, s, centre=0.0), "exponent 0.5 or 2"),
    Op("posterize", "colour", lambda s, _: A.Posterize(num_bits=(8 - ceil(4 * s),) * 2, p=1), "4 bits per channel"),
    Op("solarize", "colour", lambda s, _: A.Solarize(threshold_range=(1 - s, 1 - s), p=1), "all values inverted"),
    Op("autocontrast", "colour", lambda s, _: Tables(autocontrast, s), "each channel stretched to 0..255"),
    Op("equalize", "colour", lambda s, _: Tables(equalize, s), "each channel's histogram equalized"),
)
