"""What no transform can beat with this decoder, and what each piece of ftlib's own adds to it.

The floor decodes the tiles of a crop and resizes them into a batch, with nothing else: the boxes
are drawn and the tiles cut out of the files beforehand, and no batch leaves its process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from ftlib.benchmark import baselines
from ftlib.benchmark.measure import Case, Cost, Part, by_turns, timed
from ftlib.config import Augment
from ftlib.data.augment import Box, TrainTransform, crop_and_resize, crop_box, decoder_shrink
from ftlib.data.decode import Jpeg, decode, dimensions
from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.data.shards import Dataset, Split
from ftlib.data.tiles import tiles_of

EPOCHS = 4
"""Crops of each picture."""
KEPT = 128
"""Pictures until the floor writes to the same memory again: four batches of 32, so that a picture
goes to memory, as it does in any loader. That alone costs 0.015 ms at 224 px."""


class Crop(NamedTuple):
    jpeg: bytes
    """The tiles that cover the box; the whole picture where it has none."""
    box: Box
    """Within `jpeg`."""
    shrink: int
    """Reduction that the decoder does."""


def crops(dataset: Dataset, augment: Augment, epochs: int = EPOCHS) -> list[Crop]:
    """The crops that training with seed 0 makes in its first epochs."""
    split, randomness, found = dataset.split("train"), Randomness(), []
    for epoch, row in itertools.product(range(epochs), range(len(split))):
        jpeg: Jpeg = split.image(row)
        box = drawn_box(split, augment, randomness, epoch, row)
        top, left, height, width = box
        shrink = decoder_shrink(min(height, width) / augment.size)
        tiles = tiles_of(jpeg)
        part = None if tiles is None else tiles.cut(*box, shrink)
        if part is not None:
            jpeg, top, left = part.jpeg, top - part.top, left - part.left
        found.append(Crop(bytes(jpeg), (top, left, height, width), shrink))
    return found


def drawn_box(split: Split, augment: Augment, randomness: Randomness, epoch: int, row: int) -> Box:
    """The box that training with seed 0 crops."""
    randomness.rewind(key(AUGMENT, 0, epoch, row))
    size = dimensions(split.image(row))
    return crop_box(*size, augment.crop_scale, augment.crop_ratio, randomness)


class Floor(torch.utils.data.Dataset[Any]):
    """Numbers of crops -> (nothing, the numbers), when they have been decoded and resized."""

    def __init__(self, made: Sequence[Crop], size: int) -> None:
        self.crops, self.out, self.made = made, np.empty((KEPT, size, size, 3), np.uint8), 0

    def __getitem__(self, numbers: list[int]) -> tuple[None, list[int]]:
        for i in numbers:
            jpeg, box, _ = self.crops[i]
            out = self.out[self.made % KEPT]
            crop_and_resize(jpeg, None, box, len(out), out)
            self.made += 1
        return None, numbers


def opened(made: Sequence[Crop], size: int, batch_size: int, workers: int) -> baselines.Opened:
    """The floor as a loader, to be measured as the others are."""
    sampler = BatchSampler(baselines.Endless(len(made)), batch_size, drop_last=True)
    return baselines.endless(
        lambda: DataLoader(
            Floor(made, size),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=baselines.AHEAD if workers else None,
            worker_init_fn=baselines.one_thread,
            collate_fn=tuple,  # as they are
        )
    )


def pieces(
    title: str, dataset: Dataset, augment: Augment, rounds: int, say: Callable[[str], None]
) -> Part:
    """CPU time of each piece of a training transform, in this process.

    A piece is the difference of two cases that take turns: the transform with it and without.
    """
    split, made, randomness = dataset.split("train"), crops(dataset, augment), Randomness()
    out = np.empty((augment.size, augment.size, 3), np.uint8)
    rows = list(itertools.product(range(EPOCHS), range(len(split))))
    plain = Augment(size=augment.size, color_jitter_p=0.0)

    def case(name: str, items: Sequence[Any], act: Callable[[Any], Any]) -> Case:
        def work() -> int:
            for item in items:
                act(item)
            return len(items)

        return Case(name, lambda: timed(work))

    def transformed(name: str, settings: Augment) -> Case:
        transform = TrainTransform(settings, 0)
        return case(name, rows, lambda at: transform(split.image(at[1]), at[0], at[1], out))

    cases = [
        case("decoded", made, lambda crop: decode(crop.jpeg, crop.shrink)),
        case("resized", made, lambda c: crop_and_resize(c.jpeg, None, c.box, augment.size, out)),
        case("drawn", rows, lambda at: drawn_box(split, augment, randomness, *at)),
        transformed("cropped", replace(plain, flip=0.0)),
        transformed("flipped", plain),
        transformed("jittered", replace(plain, color_jitter_p=augment.color_jitter_p)),
        transformed("whole", augment),
    ]
    measured = by_turns(title, "image", cases, goals=[], rounds=rounds, say=say)
    decoded, resized, drawn, cropped, flipped, jittered, whole = measured.costs.values()
    costs = {
        "decoding the crop's tiles": decoded,
        "resizing": _difference(resized, decoded),
        "seeding and drawing the crop": drawn,
        "finding the JPEG and its tiles, cutting them": _difference(
            _difference(cropped, resized), drawn
        ),
        "flipping half of the images": _difference(flipped, cropped),
        "color jitter, mean over the images": _difference(jittered, flipped),
        "RandAugment, mean over the images": _difference(whole, jittered),
        "in all": whole,
    }
    return Part(title, "image", costs, [])


def _difference(whole: list[Cost], part: list[Cost]) -> list[Cost]:
    return [Cost(a.cpu - b.cpu, a.wall - b.wall) for a, b in zip(whole, part, strict=True)]
