"""JPEG bytes to the uint8 square that a model trains on, and to the one it is evaluated on.

One path, bytes all the way: decode, RandomResizedCrop, flip, ColorJitter, RandAugment or TrivialAugment, RandomErasing.
Everything random about an image is drawn from (seed, epoch, image): the same in every process, thread and order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from ftlib import config
from ftlib.data import color, ops
from ftlib.data.decode import decode, dimensions
from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.data.tiles import Tiles, tiles_of
from ftlib.settings import ConfigError, nearest


def check(cfg: config.Augment) -> None:
    """Refuses, with ConfigError, ops that are not in the table and groups that cannot be filled."""
    known = [op.name for op in ops.OPS]
    for name in cfg.randaugment_ops:
        if name not in known:
            raise ConfigError(
                f"augment.randaugment_ops: there is no op {name}.{nearest(name, known)} There are {', '.join(known)}"
            )
    groups = len(grouped(chosen(cfg)))
    if cfg.randaugment_n > groups:
        raise ConfigError(
            f"augment.randaugment_n = {cfg.randaugment_n}: augment.randaugment_ops leaves ops of only {groups} group(s). "
            f"Lower it to {groups}, or add ops of other groups"
        )


def chosen(cfg: config.Augment) -> tuple[ops.Op, ...]:
    """The ops that the settings choose from, in the table's order."""
    return tuple(op for op in ops.OPS if not cfg.randaugment_ops or op.name in cfg.randaugment_ops)


def grouped(table: tuple[ops.Op, ...]) -> list[tuple[ops.Op, ...]]:
    """The ops by group, empty groups left out."""
    return [
        found for group in ops.GROUPS if (found := tuple(op for op in table if op.group == group))
    ]


class TrainTransform:
    """`transform(jpeg, epoch, image_id)` -> uint8[S, S, 3], the same for the same (seed, epoch, image_id).

    Picklable. Holds the generators that it rewinds, so each thread needs its own.
    """

    def __init__(self, cfg: config.Augment, seed: int) -> None:
        check(cfg)
        self.cfg, self.seed = cfg, seed
        self._randomness = Randomness()
        self._jitter = ColorJitter(*cfg.color_jitter, p=cfg.color_jitter_p)
        self._policy = policy(cfg)

    def __reduce__(self) -> tuple[type[TrainTransform], tuple[config.Augment, int]]:
        return TrainTransform, (self.cfg, self.seed)

    def __call__(
        self,
        jpeg: bytes | memoryview | np.ndarray,
        epoch: int,
        image_id: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """uint8[S, S, 3], in `out` where that is given. Raises DecodeError."""
        cfg, randomness = self.cfg, self._randomness
        randomness.rewind(key(AUGMENT, self.seed, epoch, image_id))
        tiles = tiles_of(jpeg)
        size = dimensions(jpeg) if tiles is None else (tiles.layout.height, tiles.layout.width)
        box = crop_box(*size, cfg.crop_scale, cfg.crop_ratio, randomness)
        if randomness.python.random() < cfg.flip:
            image = cv2.flip(crop_and_resize(jpeg, tiles, box, cfg.size), 1, out)
        else:
            image = crop_and_resize(jpeg, tiles, box, cfg.size, out)
        image = self._jitter(image, randomness)
        if self._policy is not None:
            image = self._policy(image, randomness)
        if out is None:
            out = np.ascontiguousarray(image)
        elif image is not out:
            np.copyto(out, image)
        if cfg.erasing_p and randomness.python.random() < cfg.erasing_p:
            erase(out, cfg.erasing_scale, randomness)
        return out


class EvalTransform:
    """`transform(jpeg)` -> uint8[S, S, 3]: the shorter side resized to size / crop, then the centre; the aspect is kept.

    Pixel for pixel what torchvision's Resize (bilinear, antialiased) and CenterCrop make of it, so published weights score what was
    published. Pictures of more than four times the size are decoded at a fraction first.
    """

    def __init__(self, size: int, crop: float) -> None:
        self.size = size
        self.short = max(size, round(size / crop))

    def __call__(
        self, jpeg: bytes | memoryview | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """uint8[S, S, 3], in `out` where that is given. Raises DecodeError."""
        height, width = dimensions(jpeg)
        scale = self.short / min(height, width)
        rows, cols = (
            (self.short, int(self.short * width / height))
            if height <= width
            else (int(self.short * height / width), self.short)
        )
        top, left = round((rows - self.size) / 2), round((cols - self.size) / 2)
        image = decode(jpeg, _dct(0.5 / scale))
        y, x = image.shape[0] / rows, image.shape[1] / cols
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        image = np.asarray(
            Image.fromarray(image).resize(
                (self.size, self.size), Image.Resampling.BILINEAR, box=box
            )
        )
        if out is None:
            return image.copy()
        np.copyto(out, image)
        return out


# --- crop, flip, jitter -------------------------------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]
"""top, left, height, width."""


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    randomness: Randomness,
) -> Box:
    """RandomResizedCrop's box (Szegedy et al. 2015), drawn as torchvision's `RandomResizedCrop.get_params` draws it: ten tries, then
    the largest central box within the aspect ratios."""
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


def _dct(factor: float) -> int:
    """The largest shrinking of a JPEG decoder that is at most `factor`."""
    return 8 if factor >= 8 else 4 if factor >= 4 else 2 if factor >= 2 else 1


def crop_and_resize(
    jpeg: bytes | bytearray | memoryview | np.ndarray,
    tiles: Tiles | None,
    box: Box,
    size: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8[size, size, 3]: the box (in pixels of the whole picture), resized. Only the box is decoded where the file has `tiles`. Shrinking
    to half or less happens in the decoder, the rest by linear interpolation (by area where even an eighth leaves more than twice the size). `out`, uint8[size, size, 3], may serve for the result."""
    top, left, height, width = box
    shrink = _dct(min(height, width) / size)
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
    return cv2.resize(
        image,
        (size, size),
        out,
        interpolation=cv2.INTER_AREA if min(height, width) > 2 * size else cv2.INTER_LINEAR,
    )


class ColorJitter:
    """torchvision's ColorJitter with probability p: brightness, contrast, saturation and hue in random order, factors uniform
    from max(0, 1 - strength) to 1 + strength, hue from -strength to strength turns."""

    def __init__(
        self, brightness: float, contrast: float, saturation: float, hue: float, p: float
    ) -> None:
        self.p = p
        self.steps = [
            (function, max(0.0, centre - strength) if centre else -strength, centre + strength)
            for function, strength, centre in (
                (color.brightness, brightness, 1.0),
                (color.contrast, contrast, 1.0),
                (color.saturation, saturation, 1.0),
                (color.hue, hue, 0.0),
            )
            if strength > 0
        ]

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        """uint8[H, W, 3] -> uint8[H, W, 3]."""
        if not self.steps or randomness.python.random() >= self.p:
            return image
        for function, low, high in randomness.python.sample(self.steps, len(self.steps)):
            image = function(image, randomness.python.uniform(low, high))
        return image


# --- policies -----------------------------------------------------------------------------------------------------------------------


class RandAugment:
    """RandAugment (Cubuk et al. 2020) over groups: n groups without replacement, each acting with probability p through one of its ops,
    all at the same magnitude m of 10."""

    def __init__(self, table: tuple[ops.Op, ...], n: int, m: float, p: float, size: int) -> None:
        self.n, self.p = n, p
        self.groups = [[op.at(m / 10, size) for op in group] for group in grouped(table)]

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        for group in randomness.python.sample(self.groups, self.n):
            if randomness.python.random() < self.p:
                image = apply(randomness.python.choice(group), image, randomness)
        return image


class TrivialAugment:
    """TrivialAugment (Mueller and Hutter 2021): one op of the table, or none, at one of 31 strengths, all equally likely."""

    def __init__(self, table: tuple[ops.Op, ...], size: int) -> None:
        self.table, self.size = table, size
        self._at = lru_cache(maxsize=None)(lambda op, level: table[op].at(level / 30, size))

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        op = randomness.python.randrange(len(self.table) + 1)
        level = randomness.python.randrange(31)
        return image if op == len(self.table) else apply(self._at(op, level), image, randomness)


def apply(transform: A.BasicTransform, image: np.ndarray, randomness: Randomness) -> np.ndarray:
    """uint8[H, W, 3] through a transform that draws from `randomness` alone."""
    if isinstance(transform, ops.Pixels):
        return transform.act(image, randomness.generator, randomness.python)
    transform.set_random_state(randomness.generator, randomness.python)
    return transform(image=image)["image"]


def policy(cfg: config.Augment) -> RandAugment | TrivialAugment | None:
    """The policy that the settings ask for, or None."""
    if cfg.trivialaugment:
        return TrivialAugment(chosen(cfg), cfg.size)
    if cfg.randaugment_n:
        return RandAugment(
            chosen(cfg), cfg.randaugment_n, cfg.randaugment_m, cfg.randaugment_p, cfg.size
        )
    return None


def erase(
    image: np.ndarray,
    scale: tuple[float, float],
    randomness: Randomness,
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> None:
    """RandomErasing (Zhong et al. 2017): a box of uint8[H, W, 3] filled, in place, with random values (the paper's RE-R)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * randomness.python.uniform(*scale)
        aspect = math.exp(randomness.python.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = (
                randomness.python.randrange(height - h + 1),
                randomness.python.randrange(width - w + 1),
            )
            image[top : top + h, left : left + w] = np.frombuffer(
                randomness.generator.bytes(h * w * 3), np.uint8
            ).reshape(h, w, 3)
            return
