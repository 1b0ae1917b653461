"""From JPEG bytes to the uint8 square that a model trains on, or is evaluated on.

Training: decode, RandomResizedCrop, flips and turns, ColorJitter, RandAugment or TrivialAugment, a
pipeline of the user's own, RandomErasing. All of it on uint8.

Everything random about an image is drawn from (seed, epoch, image), so the result is the same in
every process, in every thread and in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from ftlib import config
from ftlib.data import color
from ftlib.data.decode import Jpeg, decode, dimensions
from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.data.tiles import Tiles, tiles_of

if TYPE_CHECKING:
    from ftlib.data.pipeline import Pipeline
    from ftlib.data.policy import RandAugment, TrivialAugment


def check(cfg: config.Augment) -> None:
    """Raise ConfigError for unknown ops, groups that cannot be filled, and a broken pipeline."""
    if cfg.has_policy:
        from ftlib.data import policy

        policy.check(cfg)
    if (pipeline := _pipeline(cfg)) is not None:
        pipeline.check(cfg.size)


def _pipeline(cfg: config.Augment) -> Pipeline | None:
    if not cfg.pipeline:
        return None
    from ftlib.data.pipeline import Pipeline

    return Pipeline(cfg.pipeline)


def _policy(cfg: config.Augment) -> RandAugment | TrivialAugment | None:
    if not cfg.has_policy:
        return None
    from ftlib.data import policy

    return policy.build(cfg)


class TrainTransform:
    """`transform(jpeg, epoch, image_id)` -> uint8[S, S, 3], a function of (seed, epoch, image_id).

    Picklable. Holds the random generators that it rewinds for each image, so every thread needs a
    transform of its own.
    """

    def __init__(self, cfg: config.Augment, seed: int) -> None:
        check(cfg)
        self.cfg, self.seed = cfg, seed
        self._randomness = Randomness()
        self._jitter = ColorJitter(*cfg.color_jitter, p=cfg.color_jitter_p)
        self._policy = _policy(cfg)
        self._pipeline = _pipeline(cfg)

    def __reduce__(self) -> tuple[type[TrainTransform], tuple[config.Augment, int]]:
        return TrainTransform, (self.cfg, self.seed)

    def __call__(
        self, jpeg: Jpeg, epoch: int, image_id: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """uint8[S, S, 3], written to `out` where it is given. Raises DecodeError."""
        cfg, randomness = self.cfg, self._randomness
        randomness.rewind(key(AUGMENT, self.seed, epoch, image_id))
        image = turn(self._cropped(jpeg, out), cfg.vflip, cfg.rotate90, randomness)
        image = self._jitter(image, randomness)
        if self._policy is not None:
            image = self._policy(image, randomness)
        if self._pipeline is not None:
            image = self._pipeline(image, randomness)
        if out is None:
            out = np.ascontiguousarray(image)
        elif image is not out:
            np.copyto(out, image)
        if cfg.erasing_p and randomness.python.random() < cfg.erasing_p:
            erase(out, cfg.erasing_scale, randomness)
        return out

    def _cropped(self, jpeg: Jpeg, out: np.ndarray | None) -> np.ndarray:
        """RandomResizedCrop and the horizontal flip."""
        cfg, randomness = self.cfg, self._randomness
        tiles = tiles_of(jpeg)
        size = dimensions(jpeg) if tiles is None else (tiles.layout.height, tiles.layout.width)
        box = crop_box(*size, cfg.crop_scale, cfg.crop_ratio, randomness)
        if randomness.python.random() < cfg.flip:
            return cv2.flip(crop_and_resize(jpeg, tiles, box, cfg.size), 1, out)
        return crop_and_resize(jpeg, tiles, box, cfg.size, out)


class EvalTransform:
    """`transform(jpeg)` -> uint8[S, S, 3]: shorter side resized to size / crop, then a center crop.

    Gives the pixels of torchvision's Resize (antialiased) and CenterCrop, so published weights
    reach their published scores. Pictures of more than four times the size are first decoded at a
    fraction. `interpolation` is bilinear or bicubic.
    """

    def __init__(self, size: int, crop: float, interpolation: str = "bilinear") -> None:
        self.size, self.resample = size, Image.Resampling[interpolation.upper()]
        self.short = max(size, round(size / crop))

    def __call__(self, jpeg: Jpeg, out: np.ndarray | None = None) -> np.ndarray:
        """uint8[S, S, 3], written to `out` where it is given. Raises DecodeError."""
        height, width = dimensions(jpeg)
        scale = self.short / min(height, width)
        if height <= width:
            rows, cols = self.short, int(self.short * width / height)
        else:
            rows, cols = int(self.short * height / width), self.short
        top, left = round((rows - self.size) / 2), round((cols - self.size) / 2)
        image = decode(jpeg, decoder_shrink(0.5 / scale))
        y, x = image.shape[0] / rows, image.shape[1] / cols
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        image = np.asarray(
            Image.fromarray(image).resize((self.size, self.size), self.resample, box=box)
        )
        if out is None:
            return image.copy()
        np.copyto(out, image)
        return out


# --- crop, flips and turns, jitter ----------------------------------------------------------------

Box = tuple[int, int, int, int]
"""top, left, height, width, in pixels."""


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    randomness: Randomness,
) -> Box:
    """The box of RandomResizedCrop (Szegedy et al. 2015), drawn as torchvision's `get_params` does.

    Ten tries, then the largest central box within the aspect ratios.
    """
    uniform, below = randomness.python.uniform, randomness.python.randrange
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * uniform(*scale)
        aspect = math.exp(uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return below(height - h + 1), below(width - w + 1), h, w
    if width / height < ratio[0]:
        w, h = width, min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w, h = min(width, round(height * ratio[1])), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def decoder_shrink(factor: float) -> int:
    """The largest reduction of the JPEG decoder (1, 2, 4 or 8) that is at most `factor`."""
    if factor < 2:
        return 1
    if factor < 4:
        return 2
    return 4 if factor < 8 else 8


def crop_and_resize(
    jpeg: Jpeg, tiles: Tiles | None, box: Box, size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8[size, size, 3]: the box (in pixels of the whole picture), resized.

    Only the box is decoded where the file has `tiles`. The decoder does reductions to half or less,
    linear interpolation the rest (by area where even an eighth leaves more than twice the size).
    `out`, uint8[size, size, 3], may be used for the result. Raises DecodeError.
    """
    top, left, height, width = box
    shrink = decoder_shrink(min(height, width) / size)
    if tiles is not None and (part := tiles.cut(*box, shrink)) is not None:
        jpeg, top, left = part.jpeg, top - part.top, left - part.left
    image = decode(jpeg, shrink)
    if shrink > 1:
        bottom, right = -(-(top + height) // shrink), -(-(left + width) // shrink)
        top, left = top // shrink, left // shrink
        height, width = bottom - top, right - left
    image = image[top : top + height, left : left + width]
    if (height, width) == (size, size):
        return image
    by_area = min(height, width) > 2 * size
    return cv2.resize(
        image, (size, size), out, interpolation=cv2.INTER_AREA if by_area else cv2.INTER_LINEAR
    )


def turn(image: np.ndarray, vflip: float, rotate90: float, randomness: Randomness) -> np.ndarray:
    """uint8[S, S, 3] flipped vertically with probability `vflip`, and with probability `rotate90`
    turned by 90, 180 or 270 degrees. A probability of 0 draws no random number."""
    if vflip and randomness.python.random() < vflip:
        image = cv2.flip(image, 0)
    if rotate90 and randomness.python.random() < rotate90:
        image = cv2.rotate(image, randomness.python.choice(_TURNS))
    return image


_TURNS = (cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)


class ColorJitter:
    """torchvision's ColorJitter with probability p.

    Brightness, contrast, saturation and hue in random order. Factors are uniform from
    max(0, 1 - strength) to 1 + strength, the hue from -strength to strength turns.
    """

    def __init__(
        self, brightness: float, contrast: float, saturation: float, hue: float, p: float
    ) -> None:
        self.p = p
        factors = (
            (color.brightness, brightness),
            (color.contrast, contrast),
            (color.saturation, saturation),
        )
        self.steps: list[tuple[Callable[[np.ndarray, float], np.ndarray], float, float]] = [
            (function, max(0.0, 1 - strength), 1 + strength)
            for function, strength in factors
            if strength > 0
        ]
        if hue > 0:
            self.steps.append((color.hue, -hue, hue))

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        """uint8[H, W, 3] -> uint8[H, W, 3]."""
        if not self.steps or randomness.python.random() >= self.p:
            return image
        for function, low, high in randomness.python.sample(self.steps, len(self.steps)):
            image = function(image, randomness.python.uniform(low, high))
        return image


def erase(
    image: np.ndarray,
    scale: tuple[float, float],
    randomness: Randomness,
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> None:
    """RandomErasing (Zhong et al. 2017): fill a box of uint8[H, W, 3] in place with random values.

    The paper's variant RE-R. Ten tries to find a box that fits; then nothing is erased.
    """
    height, width = image.shape[:2]
    python = randomness.python
    for _ in range(10):
        area = height * width * python.uniform(*scale)
        aspect = math.exp(python.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = python.randrange(height - h + 1), python.randrange(width - w + 1)
            values = np.frombuffer(randomness.generator.bytes(h * w * 3), np.uint8)
            image[top : top + h, left : left + w] = values.reshape(h, w, 3)
            return
