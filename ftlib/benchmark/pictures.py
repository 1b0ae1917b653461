"""What faster pictures cost in quality: re-encoding at smaller sizes, and training on ftlib's
ops instead of Albumentations' own."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from ftlib.benchmark import baselines
from ftlib.benchmark.loader import PHASE2, QUALITY, ours, pictures_of, prepared, sized
from ftlib.benchmark.measure import Case, Cost, Part, by_turns, timed
from ftlib.benchmark.training import Say, device
from ftlib.config import AdamW, Cosine, CrossEntropy, Data, Mix, Model, Run, Train
from ftlib.data import sampler
from ftlib.data.augment import crop_box
from ftlib.data.decode import decode
from ftlib.data.loader import Batch, train_batches
from ftlib.data.rng import AUGMENT, Randomness, key
from ftlib.data.shards import Dataset, Split
from ftlib.launch.timing import run_steps
from ftlib.preparation.options import PrepareOptions
from ftlib.training.loop import Training, WorkerContext

WAYS = tuple(
    PrepareOptions(max_side=side, quality=QUALITY, subsampling=chroma)
    for side, chroma in (
        (256, None),
        (288, None),
        (320, None),
        (352, None),
        (352, "keep"),
        (416, None),
        (None, None),
    )
)
"""What to compare originals with."""
FAST, PLAIN = "ftlib's transform and ops", "Albumentations' chain and ops"


def sides(
    scratch: Path,
    source: Path | None,
    *,
    images: int,
    rounds: int,
    workers: int,
    size: int,
    say: Say,
) -> Part:
    """CPU per training image, length of a file and what is left of the picture, by the size that
    `prepare --max-side` keeps."""
    cv2.setNumThreads(1)
    folder = pictures_of(source, scratch, 64)
    kept = prepared(folder, scratch / "originals", PrepareOptions())
    batch = min(32, len(kept.split("train")))
    augment = sized(PHASE2, size)
    cases = [ours("originals", kept, augment=augment, batch=batch, workers=workers, images=images)]
    notes = [f"originals: {_kilobytes(kept.split('train')):.0f} kB a picture"]
    for i, rules in enumerate(WAYS):
        name = (
            f"longer side {rules.max_side}" if rules.max_side else f"quality {QUALITY} at full size"
        ) + (", whole chroma kept" if rules.subsampling else "")
        say(f"preparing: {name}")
        made = prepared(folder, scratch / f"way-{i}", rules)
        cases.append(ours(name, made, augment=augment, batch=batch, workers=workers, images=images))
        kilobytes = _kilobytes(made.split("train"))
        psnr = crop_psnr(kept.split("train"), made.split("train"), size)
        notes.append(
            f"{name}: {kilobytes:.0f} kB a picture; its crops at {size} px are {psnr:.1f} dB from "
            "the originals'"
        )
    return by_turns(
        "Sizes of prepared pictures",
        "image",
        cases,
        goals=[],
        rounds=rounds,
        say=say,
        notes=notes,
    )


def crop_psnr(whole: Split, reduced: Split, size: int) -> float:
    """Peak signal-to-noise ratio, in dB over 255 levels, between the same random training crops
    of both: the median over the pictures."""
    randomness, found = Randomness(), []
    for row in range(len(whole)):
        pictures = [decode(split.image(row)) for split in (whole, reduced)]
        height, width = pictures[0].shape[:2]
        randomness.rewind(key(AUGMENT, 0, 0, row))
        top, left, down, across = crop_box(
            height, width, PHASE2.crop_scale, PHASE2.crop_ratio, randomness
        )
        crops = []
        for picture in pictures:  # by fractions of pixels, so that both show the very same box
            y, x = picture.shape[0] / height, picture.shape[1] / width
            box = (left * x, top * y, (left + across) * x, (top + down) * y)
            crops.append(
                np.asarray(
                    Image.fromarray(picture).resize(
                        (size, size), Image.Resampling.BILINEAR, box=box
                    ),
                    np.float32,
                )
            )
        found.append(10 * np.log10(255**2 / max(float(np.mean((crops[0] - crops[1]) ** 2)), 1e-3)))
    return float(np.median(found))


def _kilobytes(split: Split) -> float:
    return sum(len(bytes(split.image(row))) for row in range(len(split))) / len(split) / 1000


def accuracy(
    scratch: Path, source: Path | None, *, seeds: int, epochs: int, arch: str, size: int, say: Say
) -> Part:
    """Validation top-1 after training from scratch on ftlib's pictures and on those of
    `peers.full_size_chain`: same seeds, weights, order, mixing and schedule."""
    dataset = prepared(
        pictures_of(source, scratch, 96), scratch / "prepared", PrepareOptions(), val_fraction=0.25
    )
    scores: dict[str, list[float]] = {FAST: [], PLAIN: []}

    def trained(
        name: str, feed: Callable[[Training], contextlib.AbstractContextManager[Iterator[Batch]]]
    ) -> Cost:
        run = Run(
            seed=len(scores[name]),
            data=Data(path=dataset.path, loader_workers=0),
            augment=sized(PHASE2, size),
            mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0),
            model=Model(arch=arch),
            loss=CrossEntropy(label_smoothing=0.1),
            optimizer=AdamW(lr=1e-3, weight_decay=1e-4),
            schedule=Cosine(min_lr=1e-6),
            train=Train(epochs=epochs, batch_size=64, microbatch_size=32),
        )
        training = Training(WorkerContext(run, dataset, "", device()))
        with feed(training) as batches:
            cost = timed(lambda: run_steps(training, batches, training.total))
        scores[name].append(training.score().metrics("val")["val/top1"])
        return cost

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = by_turns(
            "Accuracy",
            "image",
            [
                Case(FAST, partial(trained, FAST, _fast)),
                Case(PLAIN, partial(trained, PLAIN, _plain)),
            ],
            goals=[],
            rounds=seeds,
            say=say,
        )
    gains = [a - b for a, b in zip(scores[FAST], scores[PLAIN], strict=True)]
    noise = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    notes = [
        f"{arch}, {size} px, {epochs} epochs of {len(dataset.split('train'))} images from scratch, "
        f"{len(dataset.split('val'))} scored, {seeds} seeds",
        *(
            f"{name}: top-1 {', '.join(f'{v:.1f}' for v in values)}; "
            f"mean {statistics.mean(values):.2f} %"
            for name, values in scores.items()
        ),
        f"difference of the means {statistics.mean(gains):+.2f} points, standard error over seeds "
        f"{noise:.2f}",
    ]
    return Part(part.title, part.unit, part.costs, [], notes)


@contextlib.contextmanager
def _fast(training: Training) -> Iterator[Iterator[Batch]]:
    with contextlib.closing(
        train_batches(
            training.context.dataset,
            training.rows,
            training.run,
            rank=0,
            world=1,
            start_step=0,
            stop_step=training.total,
            workers=0,
        )
    ) as batches:
        yield batches


@contextlib.contextmanager
def _plain(training: Training) -> Iterator[Iterator[Batch]]:
    yield _plain_batches(training, training.context.dataset)


def _plain_batches(training: Training, dataset: Dataset) -> Iterator[Batch]:
    """The same rows in the same order, decoded whole and augmented as Albumentations does it."""
    import albumentations as A

    run, split = training.run, dataset.split("train")
    chain, randomness = A.Compose(baselines.full_size_chain(run.augment.size)), Randomness(run.seed)
    chain.set_random_state(randomness.generator, randomness.python)
    for step in range(training.total):
        for mb in sampler.owned(
            sampler.step_plan(
                run.seed, step, training.rows, run.train.batch_size, run.train.microbatch_size
            ),
            0,
            1,
        ):
            pictures = [chain(image=decode(split.image(int(row))))["image"] for row in mb.rows]
            yield Batch(
                step=mb.step,
                epoch=mb.epoch,
                index=mb.index,
                images_in_step=mb.images_in_step,
                rows=torch.from_numpy(mb.rows.copy()),
                labels=torch.from_numpy(split.labels[mb.rows].copy()),
                images=torch.from_numpy(np.stack(pictures)),
            )
