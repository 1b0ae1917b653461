"""Which images make which step. Pure functions of (seed, epoch, step), so one integer says where a
run is.

The global batch of a step is cut into microbatches, whatever the number of workers; worker r of
W takes the microbatches whose index is r modulo W. So a run can go on with other workers on the
same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ftlib.config import Data
from ftlib.data.rng import ORDER, SUBSET, TUNING, key, raw


@dataclass(frozen=True)
class Microbatch:
    """Images that go through the model together."""

    step: int
    """Optimizer step, from 0, over the whole run."""
    epoch: int
    """Epoch, from 0."""
    index: int
    """Position within the step, from 0."""
    rows: np.ndarray
    """int64[b]: rows of the train split, which are also the images' ids for augmentation."""
    images_in_step: int
    """Images in all microbatches of the step; the accumulated gradient is divided by it."""


@dataclass(frozen=True, eq=False)
class ShardBlocks:
    """Lets an epoch go through the shards block by block, for sets larger than a node's disk.

    The shards come in a random order, cut into blocks of at most `limit` bytes; the rows within a
    block are shuffled. Where all shards fit into one block, the order is that without blocks.
    """

    shards: np.ndarray
    """int64[n]: the shard of each training row, in the order of the rows."""
    sizes: np.ndarray
    """int64[s]: bytes of each shard."""
    limit: int
    """Most bytes in a block, except that a block has one shard at least."""

    def of_epoch(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The shards of each block, in order; only shards that training rows lie in."""
        used = np.unique(self.shards)
        shuffled = used[np.argsort(raw(key(ORDER, seed, epoch, 0), len(used)), kind="stable")]
        blocks: list[list[int]] = []
        room = 0
        for shard in shuffled.tolist():
            size = int(self.sizes[shard])
            if not blocks or size > room:
                blocks.append([])
                room = self.limit
            blocks[-1].append(shard)
            room -= size
        return [np.array(block) for block in blocks]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int, blocks: ShardBlocks | None = None) -> np.ndarray:
    """int64[n], a permutation of 0..n-1 (read-only): the positions of the rows, block after block.

    Sorts raw random numbers, so it is the same under every version of numpy.
    """
    random = raw(key(ORDER, seed, epoch), n)
    if blocks is None:
        order = np.argsort(random, kind="stable")
    else:
        block_of = np.zeros(len(blocks.sizes), np.int64)
        for number, shards in enumerate(blocks.of_epoch(seed, epoch)):
            block_of[shards] = number
        order = np.lexsort((random, block_of[blocks.shards]))
    order.setflags(write=False)
    return order


def steps_per_epoch(n: int, batch_size: int) -> int:
    """ceil(n / batch_size), but a last step of one image is left out: BatchNorm cannot train on it.

    Raises ValueError for fewer than two images.
    """
    if n < 2 and batch_size > 1:
        raise ValueError(
            f"{n} training image(s): needs at least 2. Set a larger data.subset, or a smaller "
            "data.tuning_fraction"
        )
    full, rest = divmod(n, batch_size)
    return full + (rest > 1)


def step_plan(
    seed: int,
    step: int,
    rows: np.ndarray,
    batch_size: int,
    microbatch_size: int,
    blocks: ShardBlocks | None = None,
) -> list[Microbatch]:
    """The microbatches of one step (from 0, over the whole run) of training on `rows` (int64[n]).

    A full step has batch_size / microbatch_size of them. The rest of an epoch is split into as
    few as hold it, as evenly as possible, and none of a single image (a rest of three in
    microbatches of two is one of three).
    """
    n = len(rows)
    epoch, within = divmod(step, steps_per_epoch(n, batch_size))
    order = epoch_order(seed, epoch, n, blocks)[within * batch_size : (within + 1) * batch_size]
    images = len(order)
    count = -(-images // microbatch_size)
    if microbatch_size > 1:
        count = min(count, images // 2)
    return [
        Microbatch(step, epoch, index, rows[part], images)
        for index, part in enumerate(np.array_split(order, count))
    ]


T = TypeVar("T")


def owned(plan: Sequence[T], rank: int, world: int) -> list[T]:
    """What worker `rank` of `world` takes of a step's plan."""
    return list(plan[rank::world])


def _ranks(
    labels: np.ndarray, rows: np.ndarray, random: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each of `rows`: its place (from 0) in a random order of its class; the class's size."""
    classes = labels[rows]
    by_class = np.lexsort((random, classes))
    counts = np.bincount(classes)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(rows), np.int64)
    place[by_class] = np.arange(len(rows)) - starts[classes[by_class]]
    return place, counts[classes]


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted int64 rows of a stratified subset: floor(fraction * size) of each class, at least 1.

    With one seed, smaller subsets lie within larger ones.
    """
    labels = np.asarray(labels, np.int64)
    rows = np.arange(len(labels))
    place, size = _ranks(labels, rows, raw(key(SUBSET, seed), len(labels)))
    return rows[place < np.maximum(1, np.floor(size * fraction + 1e-9))]


def tuning_split(
    labels: np.ndarray, rows: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split `rows` into (train, tuning), both in the order of `rows`.

    Stratified: round(fraction * size) of each class are for tuning, at least 1 where the class
    has 2 or more, and at least 1 stays for training. Fraction 0 leaves tuning empty. Whether a
    row is for tuning depends on the seed and on its own number, not on its place in `rows`.
    """
    labels, rows = np.asarray(labels, np.int64), np.asarray(rows, np.int64)
    if fraction == 0:
        return rows, rows[:0]
    place, size = _ranks(labels, rows, raw(key(TUNING, seed), len(labels))[rows])
    take = np.minimum(np.maximum(1, np.floor(size * fraction + 0.5)), size - 1)
    return rows[place >= take], rows[place < take]


def reserve(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted int64 rows that `subset` of the same seed takes last.

    Of each class round(fraction * size), at least 1 where the class has 2 or more, and at least 1
    stays outside. A subset of 1 - fraction or less has none of them.
    """
    labels = np.asarray(labels, np.int64)
    rows = np.arange(len(labels))
    place, size = _ranks(labels, rows, raw(key(SUBSET, seed), len(labels)))
    take = np.minimum(np.maximum(1, np.floor(size * fraction + 0.5)), size - 1)
    return rows[place >= size - take]


def run_rows(labels: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """(rows that a run trains on, rows of its tuning split), both sorted int64.

    `labels` are those of the whole train split. Without a tuning split the second is empty.
    """
    rows = subset(labels, data.subset, data.subset_seed)
    if data.tuning_source == "reserve" and data.tuning_fraction:
        held_out = reserve(labels, data.tuning_fraction, data.subset_seed)
        return np.setdiff1d(rows, held_out, assume_unique=True), held_out
    return tuning_split(labels, rows, data.tuning_fraction, data.subset_seed)
