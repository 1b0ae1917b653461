"""The augmentation ops that RandAugment and TrivialAugment choose from. To add one, add a row to
`OPS`.

Every op is an Albumentations transform made for a strength from 0 to 1 and a picture side.
Strength 0 leaves every pixel as it is, and more strength changes more. Lengths are fractions of
the side, so an op means the same at 32 and at 224 px.

Albumentations' own op is used where it does what its namesake in PIL does, and fast. Own
transforms replace it elsewhere: an affine warp with a random sign instead of a range; a
perspective that shows the whole of its quadrilateral (2.0.8 enlarges it once more and cuts it
off); elastic deformation and pixel noise (ten times cheaper, same statistics), motion blur and
dropout (the same, without the overhead); color changes as PIL's ImageEnhance and ImageOps
define them; autocontrast and equalize with a strength.

All randomness comes from the generators that `set_random_state` installs. Albumentations' own
seeding is never used: in 2.0.8 it gives every transform the same stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, radians, sin
from random import Random
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np

from ftlib.data.color import (
    autocontrast,
    brightness,
    contrast,
    equalize,
    gamma,
    hue,
    saturation,
    sharpness,
)
from ftlib.data.rng import AUGMENT, key

Group = Literal["geometric", "noise", "color"]
GROUPS: tuple[Group, ...] = ("geometric", "noise", "color")
GRAY = 128
"""Fill of uncovered pixels, in each channel, as in AutoAugment (Cubuk et al. 2019)."""


@dataclass(frozen=True)
class Op:
    name: str
    group: Group
    build: Callable[[float, int], A.BasicTransform]
    """(strength above 0 and up to 1, side in pixels) -> transform that always acts."""
    at_most: str
    """What it does at strength 1."""
    version: int = 1
    """Increment it when the op's pixels change: runs that began with the former version then
    refuse to go on, instead of mixing two augmentations."""

    def at(self, strength: float, size: int) -> A.BasicTransform:
        """The transform at a strength from 0 to 1, for pictures uint8[size, size, 3]."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} of {self.name}: must be 0 to 1")
        return self.build(strength, size) if strength > 0 else A.NoOp(p=1)


class PixelTransform(A.ImageOnlyTransform):
    """Base of the own transforms, which always act.

    `act` is what they do. Albumentations' entry, for a user's own Compose, leads there too, and
    takes longer for its checks.
    """

    def __init__(self, amount: float) -> None:
        super().__init__(p=1)
        self.amount = amount

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("amount",)

    @abstractmethod
    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        """uint8[H, W, 3] -> uint8[H, W, 3]; leaves `image` as it is. Draws from these two alone."""

    def apply(self, img: np.ndarray, **_: object) -> np.ndarray:
        return self.act(img, self.random_generator, self.py_random)


def signed(amount: float, python: Random) -> float:
    """The amount or its negative, equally likely."""
    return -amount if python.random() < 0.5 else amount


def with_fourth_channel(
    warp: Callable[..., np.ndarray], image: np.ndarray, *arguments: Any, **options: Any
) -> np.ndarray:
    """Call an OpenCV function of a three-channel picture on four channels.

    It interpolates four channels in half the time of three, and to the same values.
    """
    four = warp(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), *arguments, **options)
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)


# --- geometric ------------------------------------------------------------------------------------


Matrix = tuple[float, float, float, float, float, float]
"""a, b, tx, c, d, ty: x' = a x + b y + tx * width, y' = c x + d y + ty * height, about the center.
"""


class Warp(PixelTransform):
    """An affine warp about the center, in one direction or the other: linear interpolation, gray
    outside."""

    def __init__(self, matrix: Callable[[float], Matrix], amount: float) -> None:
        super().__init__(amount)
        self.matrix = matrix

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        a, b, tx, c, d, ty = self.matrix(signed(self.amount, python))
        x, y = (width - 1) / 2, (height - 1) / 2  # x' = M (x - center) + center + t * side
        around = np.array(
            [[a, b, x - a * x - b * y + tx * width], [c, d, y - c * x - d * y + ty * height]]
        )
        return with_fourth_channel(
            cv2.warpAffine,
            image,
            around,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(GRAY,) * 4,
        )


def rotation(degrees: float) -> Matrix:
    c, s = cos(radians(degrees)), sin(radians(degrees))
    return c, -s, 0, s, c, 0


def shear_x(by: float) -> Matrix:
    return 1, by, 0, 0, 1, 0


def shear_y(by: float) -> Matrix:
    return 1, 0, 0, by, 1, 0


def shift_x(by: float) -> Matrix:
    return 1, 0, by, 0, 1, 0


def shift_y(by: float) -> Matrix:
    return 1, 0, 0, 0, 1, by


def zoom(octaves: float) -> Matrix:
    return 2**octaves, 0, 0, 0, 2**octaves, 0


class Perspective(PixelTransform):
    """The quadrilateral between four points, stretched to the picture.

    Each point lies inwards from its corner by |N(0, `amount`)| of the side in x and in y, up to
    0.32.
    """

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        right, bottom = width - 1, height - 1
        corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.float32)
        inwards = np.array([[right, bottom], [-right, bottom], [-right, -bottom], [right, -bottom]])
        points = corners + inwards * np.minimum(
            np.abs(generator.normal(0, self.amount, (4, 2))), 0.32
        )
        return with_fourth_channel(
            cv2.warpPerspective,
            image,
            cv2.getPerspectiveTransform(points.astype(np.float32), corners),
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )


class Elastic(PixelTransform):
    """Elastic deformation (Simard et al. 2003) by a smooth random field of rms `amount` pixels.

    The usual way is slow because it blurs white noise with sigma at full size. The same field -
    Gaussian, with autocorrelation exp(-d^2 / 4 sigma^2) - results from noise on a grid of
    spacing sigma, blurred by one spacing and upsampled, at a small part of the cost.
    """

    def __init__(self, amount: float, sigma: float) -> None:
        super().__init__(amount)
        self.sigma = sigma

    def field(self, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
        """float32[height, width, 2]: displacement in x and y, in pixels."""
        edge = 3  # grid points that the border of the blur reaches; cut off again
        rows = ceil(height / self.sigma) + 3  # 3: grid points that the border of the cubic reaches
        cols = ceil(width / self.sigma) + 3
        noise = generator.standard_normal((rows + 2 * edge, cols + 2 * edge, 2), np.float32)
        coarse = cv2.GaussianBlur(noise, (0, 0), 1.0)[edge:-edge, edge:-edge]
        size = (ceil(cols * self.sigma), ceil(rows * self.sigma))
        fine = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
        start = int(self.sigma)
        fine = fine[start : start + height, start : start + width]
        # The blur left a standard deviation of 1 / (2 sqrt pi).
        return fine * np.float32(self.amount * 2 * np.sqrt(np.pi))

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        places = _pixel_grid(height, width) + self.field(height, width, generator)
        return with_fourth_channel(
            cv2.remap, image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )


@lru_cache(maxsize=4)
def _pixel_grid(height: int, width: int) -> np.ndarray:
    """float32[height, width, 2]: x and y of each pixel."""
    y, x = np.indices((height, width), np.float32)
    return np.dstack([x, y])


# --- noise ----------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _normals(n: int) -> np.ndarray:
    """A pool of standard normal float32 numbers, from which n neighbors are cut.

    Drawing them anew for each picture costs ten times more.
    """
    generator = np.random.Generator(np.random.Philox(key=key(AUGMENT, 0)))
    pool = generator.standard_normal(n + (1 << 20), np.float32)
    pool.setflags(write=False)
    return pool


def normals_of(shape: tuple[int, ...], python: Random) -> np.ndarray:
    """float32[shape]: standard normal numbers, cut from a fixed pool at a random place."""
    n, start = int(np.prod(shape)), python.randrange(1 << 20)
    return _normals(n)[start : start + n].reshape(shape)


class AdditiveNoise(PixelTransform):
    """picture + amount * normals, independent for every value; `amount` in gray levels."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return cv2.addWeighted(
            image, 1, normals_of(image.shape, python), self.amount, 0, dtype=cv2.CV_8U
        )


class MultiplicativeNoise(PixelTransform):
    """picture * (1 + amount * normals), independent for every value: speckle."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        normals = normals_of(image.shape, python)
        factors = cv2.addWeighted(normals, self.amount, normals, 0, 1)
        return cv2.multiply(image, factors, dtype=cv2.CV_8U)


class MotionBlur(PixelTransform):
    """The mean along a line of `amount` pixels (odd) at a random angle.

    The line reaches that far on one side and a random part of it on the other, as in
    Albumentations' MotionBlur.
    """

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return cv2.filter2D(image, -1, self.kernel(python.uniform(0, 360), python.uniform(-1, 1)))

    def kernel(self, angle: float, direction: float) -> np.ndarray:
        """float32[amount, amount], sum 1.

        `angle` in degrees; `direction` from -1 (only one side of the center) to 1 (only the other).
        """
        length = int(self.amount)
        reach = length // 2
        along = np.linspace(
            -reach * (1 - max(direction, 0)), reach * (1 + min(direction, 0)), length
        )
        kernel = np.zeros((length, length), np.float32)
        y = np.rint(reach + sin(radians(angle)) * along).astype(int)
        x = np.rint(reach + cos(radians(angle)) * along).astype(int)
        kernel[y, x] = 1
        return kernel / kernel.sum()


class Dropout(PixelTransform):
    """Six gray squares of `amount` pixels a side, each anywhere within the picture.

    Cutout (DeVries and Taylor 2017) with several holes.
    """

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        image, side = image.copy(), int(self.amount)
        height, width = image.shape[:2]
        for _ in range(6):
            top, left = python.randrange(height - side + 1), python.randrange(width - side + 1)
            image[top : top + side, left : left + side] = GRAY
        return image


# --- color ----------------------------------------------------------------------------------------


class Enhance(PixelTransform):
    """A function of `ftlib.data.color` at `center` plus or minus `amount`."""

    def __init__(
        self,
        function: Callable[[np.ndarray, float], np.ndarray],
        amount: float,
        center: float = 1.0,
    ) -> None:
        super().__init__(amount)
        self.function = function
        self.center = center

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return self.function(image, self.center + signed(self.amount, python))


class HistogramTables(PixelTransform):
    """A look-up table per channel, made from its histogram and blended in by `amount` (0 to 1)."""

    def __init__(self, table: Callable[[np.ndarray], np.ndarray | None], amount: float) -> None:
        super().__init__(amount)
        self.table = table

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        tables = np.empty((1, 256, 3), np.uint8)
        for channel in range(3):
            counts = cv2.calcHist([image], [channel], None, [256], [0, 256])
            tables[0, :, channel] = self._blended(self.table(counts.ravel().astype(np.int64)))
        return cv2.LUT(image, tables)

    def _blended(self, table: np.ndarray | None) -> np.ndarray:
        identity = np.arange(256)
        if table is None:
            return identity
        return np.rint((1 - self.amount) * identity + self.amount * np.clip(table, 0, 255))


# --- the table ------------------------------------------------------------------------------------


def _blur(s: float, size: int) -> A.BasicTransform:
    sigma = 0.012 * size * s**0.5  # what a blur takes away grows with sigma squared
    width = 1 + 2 * ceil(2.5 * sigma)
    return A.GaussianBlur(blur_limit=(width, width), sigma_limit=(sigma, sigma), p=1)


def _posterize(s: float, _: int) -> A.BasicTransform:
    return A.Posterize(num_bits=(8 - ceil(4 * s),) * 2, p=1)


def _solarize(s: float, _: int) -> A.BasicTransform:
    return A.Solarize(threshold_range=(1 - s, 1 - s), p=1)


OPS: tuple[Op, ...] = (
    Op("rotate", "geometric", lambda s, _: Warp(rotation, 30 * s), "30 degrees either way"),
    Op(
        "shear_x", "geometric", lambda s, _: Warp(shear_x, 0.3 * s), "0.3 of the height, either way"
    ),
    Op("shear_y", "geometric", lambda s, _: Warp(shear_y, 0.3 * s), "0.3 of the width, either way"),
    Op(
        "translate_x",
        "geometric",
        lambda s, _: Warp(shift_x, 0.3 * s),
        "0.3 of the width, either way",
    ),
    Op(
        "translate_y",
        "geometric",
        lambda s, _: Warp(shift_y, 0.3 * s),
        "0.3 of the height, either way",
    ),
    Op("zoom", "geometric", lambda s, _: Warp(zoom, 0.5 * s), "1.41 times larger or smaller"),
    Op(
        "perspective",
        "geometric",
        lambda s, _: Perspective(0.12 * s),
        "corners moved inwards by 0.12 of the side (standard deviation)",
    ),
    Op(
        "elastic",
        "geometric",
        lambda s, size: Elastic(0.02 * s * size, 0.05 * size),
        "smooth displacement of 0.02 of the side (rms)",
    ),
    Op(
        "gauss_noise",
        "noise",
        lambda s, _: AdditiveNoise(50 * s),
        "standard deviation of 50 gray levels",
    ),
    Op(
        "multiplicative_noise",
        "noise",
        lambda s, _: MultiplicativeNoise(0.5 * s),
        "speckle, standard deviation of half the value",
    ),
    Op("blur", "noise", _blur, "Gaussian, sigma of 0.012 of the side"),
    Op(
        "motion_blur",
        "noise",
        lambda s, size: MotionBlur(1 + 2 * ceil(s * size * 0.02)),
        "a line of 0.04 of the side in any direction",
    ),
    Op(
        "coarse_dropout",
        "noise",
        lambda s, size: Dropout(ceil(s * size * 0.2)),
        "six gray squares of 0.2 of the side",
    ),
    Op("brightness", "color", lambda s, _: Enhance(brightness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("contrast", "color", lambda s, _: Enhance(contrast, 0.9 * s), "factor 0.1 or 1.9"),
    Op("saturation", "color", lambda s, _: Enhance(saturation, 0.9 * s), "factor 0.1 or 1.9"),
    Op("sharpness", "color", lambda s, _: Enhance(sharpness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("hue", "color", lambda s, _: Enhance(hue, 0.2 * s, center=0.0), "0.2 turns either way"),
    Op("gamma", "color", lambda s, _: Enhance(gamma, s, center=0.0), "exponent 0.5 or 2"),
    Op(
        "posterize",
        "color",
        _posterize,
        "4 bits per channel",
    ),
    Op(
        "solarize",
        "color",
        _solarize,
        "all values inverted",
    ),
    Op(
        "autocontrast",
        "color",
        lambda s, _: HistogramTables(autocontrast, s),
        "each channel stretched to 0..255",
    ),
    Op(
        "equalize",
        "color",
        lambda s, _: HistogramTables(equalize, s),
        "each channel's histogram equalized",
    ),
)

TABLE_2026_11: tuple[str, ...] = (
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "zoom",
    "perspective",
    "elastic",
    "gauss_noise",
    "multiplicative_noise",
    "blur",
    "motion_blur",
    "coarse_dropout",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "hue",
    "gamma",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""The table as it was when fingerprints began to cover it: what runs of fingerprint version 1
choose from. Never change it."""
