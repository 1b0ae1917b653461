"""CPU per training image: ftlib's loader beside the peers', on the same pictures.

Two kinds of work are compared: Phase 2's whole transform (crop, flip, colour jitter, two of three
RandAugment groups) with the recipes of torchvision, timm and a full-size Albumentations chain, from
the original files (ftlib also from the same pictures as tiles, pixel for pixel); and crop and flip
alone with FFCV and DALI, on the pictures as ftlib re-encodes them. ftlib hands over bytes and
normalises on the device; the peers' own recipes normalise in their loaders (timm excepted), and
that is part of what they cost.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from ftlib.benchmark import baselines, floor
from ftlib.benchmark.measure import BenchmarkError, Case, Goal, Part, by_turns, stream_cost
from ftlib.config import Augment, Run, Train
from ftlib.data.loader import PREFETCH, train_batches
from ftlib.data.shards import Dataset
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.prepare import prepare

QUALITY = 90
PHASE2 = Augment(size=224, color_jitter_p=0.2, randaugment_n=2, randaugment_m=9, randaugment_p=0.3)
"""What Phase 2 does to a picture (jobs/phase2.py)."""
PLAIN = Augment(size=224, color_jitter_p=0.0)
"""Crop and flip."""

TORCHVISION = "torchvision reference + RandAugment(2, 9), originals"
TIMM = "timm rand-m9-mstd0.5, originals"
FULL_SIZE = "full-size Albumentations, three groups, float, originals"
FFCV, DALI, TORCHVISION_PLAIN = (
    "FFCV, crop and flip, re-encoded",
    "DALI on the CPU, crop and flip, re-encoded",
    "torchvision, crop and flip, re-encoded",
)
ORIGINALS, TILED = "ftlib Phase 2, originals", "ftlib Phase 2, originals as lossless tiles"
REENCODED, OURS_PLAIN = "ftlib Phase 2, re-encoded", "ftlib crop and flip, re-encoded"
FLOOR, FLOOR_TILED = (
    "decoding and resizing alone, re-encoded",
    "decoding and resizing alone, lossless tiles",
)

GOALS = (
    Goal(REENCODED, TORCHVISION, "cpu", 0.16),
    Goal(REENCODED, TIMM, "cpu", 0.15),
    Goal(REENCODED, FULL_SIZE, "cpu", 0.16),
    Goal(TILED, TORCHVISION, "cpu", 0.25),
    Goal(TILED, TIMM, "cpu", 0.29),
    Goal(TILED, FULL_SIZE, "cpu", 0.25),
    Goal(OURS_PLAIN, FFCV, "cpu", 0.42),
    Goal(OURS_PLAIN, DALI, "cpu", 0.40),
    Goal(OURS_PLAIN, TORCHVISION_PLAIN, "cpu"),
    # What decoding and resizing leave of each goal. Those against timm (tiles) and FFCV are what
    # decoding, resizing and the ops take, and a tenth (docs/performance.md).
    Goal(FLOOR, TIMM, "cpu"),
    Goal(FLOOR_TILED, TIMM, "cpu"),
    Goal(FLOOR_TILED, FULL_SIZE, "cpu"),
    Goal(FLOOR, FFCV, "cpu"),
    Goal(REENCODED, FLOOR, "cpu"),
    Goal(TILED, FLOOR_TILED, "cpu"),
    Goal(OURS_PLAIN, FLOOR, "cpu"),
)


def photos(folder: Path, count: int, seed: int = 0) -> None:
    """`count` JPEGs of about 375 x 500 pixels in two classes below `folder`: smooth random
    textures, whose files are about as long as a photo's."""
    random = np.random.default_rng(seed)
    for i in range(count):
        height, width = (375, 500) if random.random() < 0.7 else (500, 375)
        picture = np.full((height, width, 3), 128.0, np.float32)
        for cells, strength in (
            (4, 60),
            (12, 35),
            (40, 18),
            (150, 12),
        ):  # amplitude falls with frequency, as in photographs
            field = random.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            picture += cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
        target = folder / f"class{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(target), picture.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95]
        )


def benchmark(
    scratch: Path,
    source: Path | None,
    *,
    images: int,
    rounds: int,
    workers: int,
    max_side: int,
    size: int,
    only: Sequence[str] = (),
    say: Callable[[str], None],
) -> Part:
    """Every loader's CPU and wall time per image.

    Args:
        scratch: a folder for the prepared sets.
        source: a folder of pictures; None generates some.
        images: per case and round.
        max_side: longer side, in pixels, of the re-encoded pictures.
        only: measure only cases whose name contains one of these; all where there are none.
    """
    # Peers fork their processes; a thread pool does not survive a fork.
    cv2.setNumThreads(1)
    folder = pictures_of(source, scratch, max(8, min(images, 128)))
    say(f"preparing {folder}")
    kept = prepared(folder, scratch / "originals", PrepareOptions())
    tiles = prepared(folder, scratch / "tiles", PrepareOptions(tiles=True))
    reduced = prepared(
        folder, scratch / "reencoded", PrepareOptions(max_side=max_side, quality=QUALITY)
    )
    files, small = _files(kept, scratch / "files"), _files(reduced, scratch / "small-files")
    batch = min(32, len(files))
    phase2, plain = sized(PHASE2, size), sized(PLAIN, size)

    def dataloader_case(name: str, opened: baselines.Opened) -> Case:
        return Case(name, lambda: stream_cost(opened, images, baselines.AHEAD * workers * batch))

    def torch_case(
        name: str, names: list[Path], transform: Callable[[int], Callable[[Path], object]]
    ) -> Case:
        return dataloader_case(name, baselines.dataloader(names, transform(size), batch, workers))

    def floor_case(name: str, dataset: Dataset) -> Case:
        made = floor.crops(dataset, plain)
        return dataloader_case(name, floor.opened(made, size, batch, workers))

    our_case = partial(ours, batch=batch, workers=workers, images=images)
    making: dict[str, Callable[[], Case]] = {
        ORIGINALS: lambda: our_case(ORIGINALS, kept, phase2),
        TILED: lambda: our_case(TILED, tiles, phase2),
        REENCODED: lambda: our_case(REENCODED, reduced, phase2),
        OURS_PLAIN: lambda: our_case(OURS_PLAIN, reduced, plain),
        FLOOR: lambda: floor_case(FLOOR, reduced),
        FLOOR_TILED: lambda: floor_case(FLOOR_TILED, tiles),
        TORCHVISION: lambda: torch_case(TORCHVISION, files, baselines.torchvision_reference),
        FULL_SIZE: lambda: torch_case(FULL_SIZE, files, baselines.full_size_albumentations),
        TORCHVISION_PLAIN: lambda: torch_case(
            TORCHVISION_PLAIN, small, baselines.torchvision_plain
        ),
    }
    notes = [
        f"{len(files)} pictures, {_kilobytes(files):.0f} kB each; re-encoded with longer side "
        f"{max_side} at quality {QUALITY} {_kilobytes(small):.0f} kB",
        f"{size} px, {workers} loader processes, batches of {batch}, {images} images per case and "
        "round",
    ]
    optional, absent = _optional_peers(files, small, scratch, size, batch=batch, workers=workers)
    for name, (opened, ahead) in optional.items():
        making[name] = partial(Case, name, partial(stream_cost, opened, images, ahead))
    if absent:
        notes.append(f"not installed, so not measured: {', '.join(absent)}")
    wanted = [
        name for name in making if not only or any(words.lower() in name.lower() for words in only)
    ]
    if not wanted:
        raise BenchmarkError(
            f"--only {' '.join(only)}: no loader's name contains it. There are: {'; '.join(making)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers warn of is not the user's concern
        cases = [making[name]() for name in wanted]
        return by_turns(
            "Input pipeline", "image", cases, goals=GOALS, rounds=rounds, say=say, notes=notes
        )


def pieces(
    scratch: Path,
    source: Path | None,
    *,
    images: int,
    rounds: int,
    max_side: int,
    size: int,
    say: Callable[[str], None],
) -> list[Part]:
    """Where the CPU time of Phase 2's transform goes, without a loader; arguments as `benchmark`'s.

    Every picture is cropped `floor.EPOCHS` times a round.
    """
    cv2.setNumThreads(1)
    folder = pictures_of(source, scratch, max(8, min(images, 128)))
    return [
        floor.pieces(
            f"Phase 2 in pieces, {name}",
            prepared(folder, scratch / name, rules),
            sized(PHASE2, size),
            rounds,
            say,
        )
        for name, rules in (
            ("re-encoded", PrepareOptions(max_side=max_side, quality=QUALITY)),
            ("originals as lossless tiles", PrepareOptions(tiles=True)),
        )
    ]


def _optional_peers(
    files: list[Path], small: list[Path], scratch: Path, size: int, *, batch: int, workers: int
) -> tuple[dict[str, tuple[baselines.Opened, int]], list[str]]:
    """(loaders of packages that are installed, names of those that are not)."""
    found, absent = {}, []
    for name, make in (
        (TIMM, lambda: baselines.timm_reference(size, files, batch, workers)),
        (FFCV, lambda: baselines.ffcv(small, scratch, size, batch, workers)),
        (DALI, lambda: baselines.dali(small, size, batch, workers)),
    ):
        try:
            found[name] = make()
        except ImportError:
            absent.append(name.split()[0].strip(","))
    return found, absent


def pictures_of(source: Path | None, scratch: Path, count: int) -> Path:
    """The folder `source`, or one below `scratch` with `count` generated photos where there is
    none."""
    if source is None:
        photos(scratch / "photos", count)
    return source or scratch / "photos"


def sized(augment: Augment, size: int) -> Augment:
    return Augment(**{**vars(augment), "size": size})


def ours(
    name: str, dataset: Dataset, augment: Augment, batch: int, workers: int, images: int
) -> Case:
    """ftlib's loader on its training split without end."""
    return Case(
        name,
        lambda: stream_cost(
            lambda: _ours(dataset, augment, batch, workers),
            images,
            (PREFETCH * workers if workers else PREFETCH + 1) * batch,
        ),
    )


@contextlib.contextmanager
def _ours(dataset: Dataset, augment: Augment, batch: int, workers: int) -> Iterator[Iterator[int]]:
    run = Run(augment=augment, train=Train(batch_size=batch, microbatch_size=batch))
    n = len(dataset.split("train"))
    rows = np.resize(np.arange(n), n * batch)  # a whole number of full batches
    with train_batches(
        dataset, rows, run, rank=0, world=1, start_step=0, stop_step=2**31, workers=workers
    ) as batches:
        yield (len(b.labels) for b in batches)


def prepared(folder: Path, out: Path, rules: PrepareOptions, val_fraction: float = 0.0) -> Dataset:
    """A folder's pictures as a prepared set; where it has no train/ and val/, `val_fraction` of
    them are for validation."""
    split = (folder / "train").is_dir()
    return prepare(
        folder,
        out,
        val_fraction=None if split else val_fraction,
        rules=rules,
        engine="local",
        progress=False,
        max_bad_fraction=0.5,
    ).dataset


def _files(dataset: Dataset, folder: Path) -> list[Path]:
    """The prepared pictures as files: for peers, the very bytes that ftlib reads."""
    split = dataset.split("train")
    folder.mkdir(exist_ok=True)
    files = [folder / f"{row}.jpg" for row in range(len(split))]
    for row, file in enumerate(files):
        file.write_bytes(bytes(split.image(row)))
    return files


def _kilobytes(files: list[Path]) -> float:
    return sum(os.path.getsize(f) for f in files) / len(files) / 1000
