"""RandAugment and TrivialAugment: which of the ops act on a picture, and how strongly.

Apart from `ftlib.data.augment`, because the ops bring Albumentations, whose import takes 0.4 s: a
recipe without a policy does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import albumentations as A
import numpy as np

from ftlib import config
from ftlib.data import ops
from ftlib.data.rng import Randomness
from ftlib.settings import ConfigError, nearest

FIRST_OPS = ops.TABLE_2026_11
"""Names of the ops that runs of fingerprint version 1 choose from."""


def check(cfg: config.Augment) -> None:
    """Raise ConfigError for unknown ops and for groups that cannot be filled."""
    known = [op.name for op in ops.OPS]
    for name in cfg.randaugment_ops:
        if name not in known:
            raise ConfigError(
                f"augment.randaugment_ops: there is no op {name}.{nearest(name, known)} "
                f"The ops are {', '.join(known)}"
            )
    groups = len(grouped(chosen(cfg)))
    if cfg.randaugment_n > groups:
        raise ConfigError(
            f"augment.randaugment_n = {cfg.randaugment_n}: the ops in augment.randaugment_ops are "
            f"of only {groups} group(s). Lower it to {groups}, or add ops of other groups"
        )


def chosen(cfg: config.Augment) -> tuple[ops.Op, ...]:
    """The ops that the settings choose from, in the table's order."""
    return tuple(op for op in ops.OPS if not cfg.randaugment_ops or op.name in cfg.randaugment_ops)


def op_versions(cfg: config.Augment, table: Sequence[str] | None = None) -> tuple[str, ...]:
    """The ops that the settings choose from, as the fingerprint names them; () without a policy.

    An op of version 1 goes by its name, a later version is NAME@VERSION. `table`: names of the ops
    of an earlier table (all of version 1) to choose from, instead of the present one.
    """
    if not cfg.has_policy:
        return ()
    if table is not None:
        return tuple(
            name for name in table if not cfg.randaugment_ops or name in cfg.randaugment_ops
        )
    return tuple(op.name if op.version == 1 else f"{op.name}@{op.version}" for op in chosen(cfg))


def grouped(table: tuple[ops.Op, ...]) -> list[tuple[ops.Op, ...]]:
    """The ops by group; groups without ops are left out."""
    groups = (tuple(op for op in table if op.group == group) for group in ops.GROUPS)
    return [group for group in groups if group]


class RandAugment:
    """RandAugment (Cubuk et al. 2020) over groups of ops.

    Draws n groups without replacement. Each acts with probability p through one of its ops, all at
    the same magnitude m of 10.
    """

    def __init__(self, table: tuple[ops.Op, ...], n: int, m: float, p: float, size: int) -> None:
        self.n, self.p = n, p
        self.groups = [[op.at(m / 10, size) for op in group] for group in grouped(table)]

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        for group in randomness.python.sample(self.groups, self.n):
            if randomness.python.random() < self.p:
                image = apply(randomness.python.choice(group), image, randomness)
        return image


class TrivialAugment:
    """TrivialAugment (Mueller and Hutter 2021): one op of the table, or none, at one of 31
    strengths, all equally likely."""

    def __init__(self, table: tuple[ops.Op, ...], size: int) -> None:
        self.table, self.size = table, size
        self._at = lru_cache(maxsize=None)(lambda op, level: table[op].at(level / 30, size))

    def __call__(self, image: np.ndarray, randomness: Randomness) -> np.ndarray:
        op = randomness.python.randrange(len(self.table) + 1)
        level = randomness.python.randrange(31)
        return image if op == len(self.table) else apply(self._at(op, level), image, randomness)


def apply(transform: A.BasicTransform, image: np.ndarray, randomness: Randomness) -> np.ndarray:
    """uint8[H, W, 3] through a transform that draws from `randomness` alone."""
    if isinstance(transform, ops.PixelTransform):
        return transform.act(image, randomness.generator, randomness.python)
    transform.set_random_state(randomness.generator, randomness.python)
    return transform(image=image)["image"]


def build(cfg: config.Augment) -> RandAugment | TrivialAugment:
    """The policy that the settings ask for."""
    if cfg.trivialaugment:
        return TrivialAugment(chosen(cfg), cfg.size)
    return RandAugment(
        chosen(cfg), cfg.randaugment_n, cfg.randaugment_m, cfg.randaugment_p, cfg.size
    )
