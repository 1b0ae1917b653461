"""The table of augmentation ops that RandAugment and TrivialAugment choose from. Adding an op is adding a row to `OPS`.

Every op is an Albumentations transform made for one strength from 0 to 1 and one picture side. Strength 0 leaves every
pixel as it is, and more strength changes more. Lengths are shares of the side, so an op means the same at 32 and at 224 px.

Where Albumentations' own op does what its namesake in PIL does, and fast, it is used. Own transforms stand where it does not:
an affine warp with a random sign rather than a range; a perspective that shows the whole of its quadrilateral (2.0.8 enlarges it once
more and cuts it off); elastic deformation and pixel noise (ten times cheaper, same statistics), motion blur and dropout (the same, without
the overhead); colour changes as PIL's ImageEnhance and ImageOps define them, autocontrast and equalize with a strength.

All randomness comes from the generators that `set_random_state` installs. Albumentations' own seeding is never used: in
2.0.8 it gives every transform the same stream.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, radians, sin
from random import Random
from typing import Any, Literal

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # importing it would ask the network for a newer version

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

Group = Literal["geometric", "noise", "colour"]
GROUPS: tuple[Group, ...] = ("geometric", "noise", "colour")
GREY = 128
"""Fill of uncovered pixels, in each channel, as in AutoAugment (Cubuk et al. 2019)."""


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
    """Base of the own transforms, which always act. `act` is what they do; Albumentations' way in, for a user's own Compose, leads there too, and takes
    longer for its checks."""

    def __init__(self, amount: float) -> None:
        super().__init__(p=1)
        self.amount = amount

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        return ("amount",)

    @abstractmethod
    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        """uint8[H, W, 3] -> uint8[H, W, 3], with the source left as it is. Draws from these two alone."""

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        return self.act(img, self.random_generator, self.py_random)


def signed(amount: float, python: Random) -> float:
    """The amount or its negative, equally likely."""
    return -amount if python.random() < 0.5 else amount


def in_fours(
    warp: Callable[..., np.ndarray], image: np.ndarray, *arguments: Any, **options: Any
) -> np.ndarray:
    """An OpenCV function of a three-channel picture by way of a fourth channel: it interpolates four channels in half the time of three, and to the same values."""
    return cv2.cvtColor(
        warp(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), *arguments, **options), cv2.COLOR_RGBA2RGB
    )


# --- geometric ----------------------------------------------------------------------------------------------------------------------


class Warp(Pixels):
    """An affine warp about the centre, one way or the other: linear interpolation, grey outside."""

    def __init__(
        self,
        matrix: Callable[[float], tuple[float, float, float, float, float, float]],
        amount: float,
    ) -> None:
        super().__init__(amount)
        self.matrix = matrix

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        a, b, tx, c, d, ty = self.matrix(signed(self.amount, python))
        x, y = (width - 1) / 2, (height - 1) / 2  # x' = M (x - centre) + centre + t * side
        around = np.array(
            [[a, b, x - a * x - b * y + tx * width], [c, d, y - c * x - d * y + ty * height]]
        )
        return in_fours(
            cv2.warpAffine,
            image,
            around,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(GREY,) * 4,
        )


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


class Perspective(Pixels):
    """What lies between four points, each moved inwards from its corner by |N(0, `amount`)| of the side in x and in y (up to 0.32), stretched to the picture."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        right, bottom = width - 1, height - 1
        corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]], np.float32)
        inwards = np.array([[right, bottom], [-right, bottom], [-right, -bottom], [right, -bottom]])
        points = corners + inwards * np.minimum(
            np.abs(generator.normal(0, self.amount, (4, 2))), 0.32
        )
        return in_fours(
            cv2.warpPerspective,
            image,
            cv2.getPerspectiveTransform(points.astype(np.float32), corners),
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )


class Elastic(Pixels):
    """Elastic deformation (Simard et al. 2003) by a smooth random field of rms displacement `amount` pixels.

    Blurring white noise with sigma at full size is what makes the usual way slow. The same field - Gaussian, with autocorrelation
    exp(-d^2 / 4 sigma^2) - comes of noise on a grid of spacing sigma, blurred by one spacing and upsampled, many times cheaper.
    """

    def __init__(self, amount: float, sigma: float) -> None:
        super().__init__(amount)
        self.sigma = sigma

    def field(self, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
        """float32[height, width, 2]: displacement in x and y, in pixels."""
        edge = 3  # grid points that the blur's border reaches, cut off again
        rows, cols = (
            ceil(height / self.sigma) + 3,
            ceil(width / self.sigma) + 3,
        )  # 3: what the cubic's border reaches
        coarse = generator.standard_normal((rows + 2 * edge, cols + 2 * edge, 2), np.float32)
        coarse = cv2.GaussianBlur(coarse, (0, 0), 1.0)[edge:-edge, edge:-edge]
        fine = cv2.resize(
            coarse,
            (ceil(cols * self.sigma), ceil(rows * self.sigma)),
            interpolation=cv2.INTER_CUBIC,
        )
        start = int(self.sigma)
        fine = fine[start : start + height, start : start + width]
        return fine * np.float32(
            self.amount * 2 * np.sqrt(np.pi)
        )  # the blur left a standard deviation of 1 / (2 sqrt pi)

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        height, width = image.shape[:2]
        places = _pixel_grid(height, width) + self.field(height, width, generator)
        return in_fours(
            cv2.remap, image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )


@lru_cache(maxsize=4)
def _pixel_grid(height: int, width: int) -> np.ndarray:
    """float32[height, width, 2]: each pixel's own x and y."""
    y, x = np.indices((height, width), np.float32)
    return np.dstack([x, y])


# --- noise --------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _normals(n: int) -> np.ndarray:
    """A pool of standard normal float32 numbers to cut n neighbours out of: drawing anew for each picture costs ten times more."""
    pool = np.random.Generator(np.random.Philox(key=key(AUGMENT, 0))).standard_normal(
        n + (1 << 20), np.float32
    )
    pool.setflags(write=False)
    return pool


def normals_of(shape: tuple[int, ...], python: Random) -> np.ndarray:
    """float32[shape]: standard normal numbers, a cut out of a fixed pool at a random place."""
    n, start = int(np.prod(shape)), python.randrange(1 << 20)
    return _normals(n)[start : start + n].reshape(shape)


class Additive(Pixels):
    """picture + amount * normals, independent for every value; `amount` in grey levels."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return cv2.addWeighted(
            image, 1, normals_of(image.shape, python), self.amount, 0, dtype=cv2.CV_8U
        )


class Multiplicative(Pixels):
    """picture * (1 + amount * normals), independent for every value: speckle."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        normals = normals_of(image.shape, python)
        return cv2.multiply(
            image, cv2.addWeighted(normals, self.amount, normals, 0, 1), dtype=cv2.CV_8U
        )


class MotionBlur(Pixels):
    """The mean along a line of `amount` pixels (odd) at a random angle, which reaches as far as that on one side and a random share of it on the other: the kernel of Albumentations' MotionBlur."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return cv2.filter2D(image, -1, self.kernel(python.uniform(0, 360), python.uniform(-1, 1)))

    def kernel(self, angle: float, direction: float) -> np.ndarray:
        """float32[amount, amount], sum 1. `angle` in degrees; `direction` from -1 (one side of the centre only) to 1 (the other)."""
        length = int(self.amount)
        reach = length // 2
        along = np.linspace(
            -reach * (1 - max(direction, 0)), reach * (1 + min(direction, 0)), length
        )
        kernel = np.zeros((length, length), np.float32)
        kernel[
            np.rint(reach + sin(radians(angle)) * along).astype(int),
            np.rint(reach + cos(radians(angle)) * along).astype(int),
        ] = 1
        return kernel / kernel.sum()


class Dropout(Pixels):
    """Six grey squares of `amount` pixels a side, each anywhere within the picture (Cutout, DeVries and Taylor 2017, with several holes)."""

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        image, side = image.copy(), int(self.amount)
        height, width = image.shape[:2]
        for _ in range(6):
            top, left = python.randrange(height - side + 1), python.randrange(width - side + 1)
            image[top : top + side, left : left + side] = GREY
        return image


# --- colour -------------------------------------------------------------------------------------------------------------------------


class Enhance(Pixels):
    """A function of `ftlib.data.color` at `centre` plus or minus `amount`."""

    def __init__(
        self,
        function: Callable[[np.ndarray, float], np.ndarray],
        amount: float,
        centre: float = 1.0,
    ) -> None:
        super().__init__(amount)
        self.function = function
        self.centre = centre

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        return self.function(image, self.centre + signed(self.amount, python))


class Tables(Pixels):
    """A look-up table per channel, made from the channel's histogram, taken by the share `amount`."""

    def __init__(self, table: Callable[[np.ndarray], np.ndarray | None], amount: float) -> None:
        super().__init__(amount)
        self.table = table

    def act(self, image: np.ndarray, generator: np.random.Generator, python: Random) -> np.ndarray:
        same = np.arange(256)
        tables = np.empty((1, 256, 3), np.uint8)
        for channel in range(3):
            found = self.table(
                cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
            )
            tables[0, :, channel] = (
                same
                if found is None
                else np.rint((1 - self.amount) * same + self.amount * np.clip(found, 0, 255))
            )
        return cv2.LUT(image, tables)


# --- the table ----------------------------------------------------------------------------------------------------------------------


def _blur(s: float, size: int) -> A.BasicTransform:
    sigma = 0.012 * size * s**0.5  # what a blur takes away grows with sigma squared
    width = 1 + 2 * ceil(2.5 * sigma)
    return A.GaussianBlur(blur_limit=(width, width), sigma_limit=(sigma, sigma), p=1)


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
        lambda s, _: Additive(50 * s),
        "standard deviation of 50 grey levels",
    ),
    Op(
        "multiplicative_noise",
        "noise",
        lambda s, _: Multiplicative(0.5 * s),
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
        "six grey squares of 0.2 of the side",
    ),
    Op("brightness", "colour", lambda s, _: Enhance(brightness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("contrast", "colour", lambda s, _: Enhance(contrast, 0.9 * s), "factor 0.1 or 1.9"),
    Op("saturation", "colour", lambda s, _: Enhance(saturation, 0.9 * s), "factor 0.1 or 1.9"),
    Op("sharpness", "colour", lambda s, _: Enhance(sharpness, 0.9 * s), "factor 0.1 or 1.9"),
    Op("hue", "colour", lambda s, _: Enhance(hue, 0.2 * s, centre=0.0), "0.2 turns either way"),
    Op("gamma", "colour", lambda s, _: Enhance(gamma, s, centre=0.0), "exponent 0.5 or 2"),
    Op(
        "posterize",
        "colour",
        lambda s, _: A.Posterize(num_bits=(8 - ceil(4 * s),) * 2, p=1),
        "4 bits per channel",
    ),
    Op(
        "solarize",
        "colour",
        lambda s, _: A.Solarize(threshold_range=(1 - s, 1 - s), p=1),
        "all values inverted",
    ),
    Op(
        "autocontrast",
        "colour",
        lambda s, _: Tables(autocontrast, s),
        "each channel stretched to 0..255",
    ),
    Op(
        "equalize", "colour", lambda s, _: Tables(equalize, s), "each channel's histogram equalized"
    ),
)
