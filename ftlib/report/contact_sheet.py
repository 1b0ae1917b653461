"""The contact sheet: what the network sees, and what each op does at every strength.

It is one picture per run, drawn from the run's own data, recipe and random keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from ftlib.config import Run
from ftlib.data import ops
from ftlib.data.augment import EvalTransform, TrainTransform
from ftlib.data.loader import Batch, train_batches
from ftlib.data.pipeline import Pipeline
from ftlib.data.policy import apply, chosen
from ftlib.data.rng import AUGMENT, MIX, Randomness, key
from ftlib.data.sampler import run_rows
from ftlib.data.shards import Dataset
from ftlib.lettering import fit, font
from ftlib.settings import override
from ftlib.training import losses, mixing

TILE, GAP, LABEL, MARGIN = 120, 6, 190, 28
"""Pixels: side of a tile, space between two, width of the label column, margin of the sheet."""
COLUMNS = 11
QUALITY = 28
"""Of a .webp: below half a megabyte, with tiles that are still judged by eye."""
INK, QUIET, PAPER, MARK = (25, 28, 33), (110, 116, 125), (255, 255, 255), (220, 60, 40)
NAMES = {"mixup": "Mixup", "cutmix": "CutMix"}
COLORS = {"geometric": (38, 99, 168), "noise": (122, 88, 158), "color": (186, 104, 24)}


@dataclass(frozen=True)
class Tile:
    image: np.ndarray
    """uint8[H, W, 3]"""
    caption: str = ""
    marked: bool = False
    """Framed: what the recipe uses."""


@dataclass(frozen=True)
class Row:
    title: str
    note: str
    tiles: Sequence[Tile]
    color: tuple[int, int, int] = INK


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    rows: Sequence[Row]


def contact_sheet(dataset: Dataset, run: Run, path: str | Path, step: int = 0) -> Path:
    """Draw the sheet of a run on a data set at `path` (.webp for a fifteenth of .png's bytes).

    It shows what the network sees at step `step`, some images over many epochs, Mixup and CutMix,
    the run's own pipeline where it has one, and the table of ops.
    """
    sections = [
        network_section(dataset, run, step),
        epochs_section(dataset, run),
        mixing_section(dataset, run),
        *([pipeline_section(dataset, run)] if run.augment.pipeline else []),
        ops_section(dataset, run),
    ]
    sheet = draw_sheet(f"{run.stage} on {dataset.name}", _summary(run), sections)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=QUALITY, method=6)
    return path


# --- sections ---


def network_section(dataset: Dataset, run: Run, step: int) -> Section:
    """The first microbatches of a step exactly as training mixes them, with their soft targets."""
    rows: list[Row] = []
    for batch, plan in seen_by_the_network(dataset, run, step):
        images, targets = mixed(batch, plan, run, len(dataset.classes))
        note = "not mixed" if plan is None else f"{NAMES[plan.kind]}, λ {plan.lam:.2f}"
        tiles = [
            Tile(i, targets_text(t, dataset.classes, run))
            for i, t in zip(images[:COLUMNS], targets)
        ]
        rows.append(Row(f"microbatch {batch.index}", note, tiles))
        if len(rows) == 4:
            break
    return Section(
        f"What the network sees at step {step}",
        "the recipe's own pictures, crops, partners and targets (before normalization)",
        rows,
    )


def seen_by_the_network(
    dataset: Dataset, run: Run, step: int
) -> Iterator[tuple[Batch, mixing.MixPlan | None]]:
    """The microbatches of a step of the run, on one worker, with the mixing plan of each."""
    with train_batches(
        dataset,
        training_rows(dataset, run),
        run,
        rank=0,
        world=1,
        start_step=step,
        stop_step=step + 1,
        workers=0,
    ) as batches:
        for batch in batches:
            plan = None
            if batch.epoch < run.train.epochs - run.mix.off_epochs:
                drawn_by = key(MIX, run.seed, batch.step, batch.index)
                height, width = batch.images.shape[1:3]
                plan = mixing.draw(run.mix, drawn_by, len(batch.rows), height, width)
            yield batch, plan


def training_rows(dataset: Dataset, run: Run) -> np.ndarray:
    """int64[n]: the rows of the train split that the run trains on."""
    return run_rows(dataset.split("train").labels, run.data)[0]


def epochs_section(dataset: Dataset, run: Run, images: int = 4) -> Section:
    """A few images whole, then as the first epochs will have them."""
    split, whole, train = (
        dataset.split("train"),
        EvalTransform(run.eval_size, run.evaluate.crop, run.evaluate.interpolation),
        TrainTransform(run.augment, run.seed),
    )
    rows = []
    for row in _examples(dataset, run, images):
        jpeg = split.image(row)
        epochs = [train(jpeg, epoch, row) for epoch in range(COLUMNS - 1)]
        tiles = [
            Tile(whole(jpeg), "at evaluation"),
            *(Tile(image, f"epoch {i}") for i, image in enumerate(epochs, start=1)),
        ]
        file = fit(Path(split.path(row)).name, LABEL - 24, font(13))
        rows.append(Row(dataset.classes[int(split.labels[row])], file, tiles))
    return Section("The same image, epoch by epoch", _policy(run), rows)


def mixing_section(dataset: Dataset, run: Run) -> Section:
    """Mixup and CutMix on one batch each, with the recipe's alphas.

    Where the recipe has one of them off, its usual alpha is shown.
    """
    split, whole = dataset.split("train"), EvalTransform(run.augment.size, run.evaluate.crop)
    examples = _examples(dataset, run, COLUMNS)
    images = np.stack([whole(split.image(row)) for row in examples])
    labels = torch.from_numpy(split.labels[np.array(examples)])
    batch = Batch(
        step=0,
        epoch=0,
        index=0,
        images_in_step=len(examples),
        rows=torch.tensor(examples),
        labels=labels,
        images=torch.from_numpy(images),
    )
    rows = []
    for kind, alpha, usual, share in (
        ("mixup", run.mix.mixup_alpha, 0.2, 0.0),
        ("cutmix", run.mix.cutmix_alpha, 1.0, 1.0),
    ):
        cfg = override(
            run.mix,
            {
                "off_epochs": 0,
                "p": 1.0,
                "mixup_alpha": (alpha or usual) if kind == "mixup" else 0.0,
                "cutmix_alpha": (alpha or usual) if kind == "cutmix" else 0.0,
                "cutmix_share": share,
            },
        )
        plans = [
            mixing.draw(cfg, key(MIX, run.seed, 0, k), len(examples), *images.shape[1:3])
            for k in range(64)
        ]
        plan = min(
            (p for p in plans if p is not None),
            key=lambda p: (
                abs(p.lam - 0.65) + 0.05 * int((p.partner == torch.arange(len(examples))).sum())
            ),
        )
        images, targets = mixed(batch, plan, run, len(dataset.classes))
        note = f"α {alpha or usual:g}, here λ {plan.lam:.2f}" + (
            "" if alpha else "\noff in this recipe"
        )
        rows.append(
            Row(
                NAMES[kind],
                note,
                [Tile(i, targets_text(t, dataset.classes, run)) for i, t in zip(images, targets)],
            )
        )
    smoothing = run.loss.label_smoothing
    smoothed = f", label smoothing {smoothing:g} included" if smoothing else ""
    return Section(
        "Mixing",
        f"soft targets below each picture{smoothed}; λ drawn from Beta(α, α)",
        rows,
    )


def ops_section(dataset: Dataset, run: Run) -> Section:
    """One row per op of the table, one column per strength 0 to 10, all with the same random
    numbers."""
    cfg = run.augment
    split, whole = dataset.split("train"), EvalTransform(cfg.size, run.evaluate.crop)
    image = max((whole(split.image(row)) for row in _examples(dataset, run, 24)), key=_liveliness)
    used, randomness, rows = chosen(cfg), Randomness(), []
    on = cfg.has_policy
    for i, op in enumerate(ops.OPS):
        tiles = []
        for strength in range(COLUMNS):
            randomness.rewind(key(AUGMENT, run.seed, 0, i))
            mark = (
                on
                and op in used
                and not cfg.trivialaugment
                and strength == round(cfg.randaugment_m)
            )
            tiles.append(
                Tile(apply(op.at(strength / 10, cfg.size), image, randomness), str(strength), mark)
            )
        note = op.at_most if op in used else f"{op.at_most}\nnot in this recipe"
        rows.append(Row(op.name, f"{op.group}\nat 10: {note}", tiles, COLORS[op.group]))
    framed = (
        f"; framed: this recipe's M = {cfg.randaugment_m:g}"
        if on and not cfg.trivialaugment
        else ""
    )
    return Section(
        "Every op at strengths 0 to 10",
        f"0 changes nothing; signed ops draw their sign{framed}",
        rows,
    )


def pipeline_section(dataset: Dataset, run: Run, images: int = 2) -> Section:
    """What the run's own pipeline does by itself: a few images, each with several random keys."""
    cfg = run.augment
    split, whole = dataset.split("train"), EvalTransform(cfg.size, run.evaluate.crop)
    pipeline, randomness, rows = Pipeline(cfg.pipeline), Randomness(), []
    for row in _examples(dataset, run, images):
        image = whole(split.image(row))
        tiles = [Tile(image, "without it")]
        for draw in range(COLUMNS - 1):
            randomness.rewind(key(AUGMENT, run.seed, draw, row))
            tiles.append(Tile(pipeline(image, randomness), f"draw {draw + 1}"))
        rows.append(Row(dataset.classes[int(split.labels[row])], "augment.pipeline", tiles))
    return Section("Your own pipeline, by itself", " → ".join(pipeline.names), rows)


def _examples(dataset: Dataset, run: Run, n: int) -> list[int]:
    """Rows of the run's training images, spread over the classes."""
    rows = training_rows(dataset, run)
    by_class = rows[np.argsort(dataset.split("train").labels[rows], kind="stable")]
    return [int(by_class[(2 * i + 1) * len(by_class) // (2 * n)]) for i in range(n)]


def _liveliness(image: np.ndarray) -> float:
    """How much an op can change: colorfulness (Hasler and Suesstrunk 2003) plus contrast."""
    r, g, b = np.moveaxis(image.astype(np.float32), 2, 0)
    return float((r - g).std() + ((r + g) / 2 - b).std() + image.std())


def mixed(
    batch: Batch, plan: mixing.MixPlan | None, run: Run, classes: int
) -> tuple[np.ndarray, torch.Tensor]:
    """(uint8[b, S, S, 3], targets [b, classes])."""
    targets = losses.soft_targets(batch.labels, classes, run.loss.label_smoothing)
    images, targets = mixing.apply(plan, batch.images.permute(0, 3, 1, 2), targets)
    return images.permute(0, 2, 3, 1).contiguous().numpy(), targets


def targets_text(target: torch.Tensor, classes: Sequence[str], run: Run) -> str:
    """The two largest entries of a soft target that exceed what label smoothing gives to all."""
    values, indices = target.topk(min(2, len(classes)))
    floor = run.loss.label_smoothing / len(classes) + 1e-6
    return "\n".join(
        f"{v:.2f} {classes[i]}" for v, i in zip(values.tolist(), indices.tolist()) if v > floor
    )


def _policy(run: Run) -> str:
    a = run.augment
    parts = [
        f"crop {a.crop_scale[0]:g}-{a.crop_scale[1]:g} of the area",
        f"flip {a.flip:g}",
    ]
    if a.vflip:
        parts.append(f"vertical flip {a.vflip:g}")
    if a.rotate90:
        parts.append(f"quarter turns {a.rotate90:g}")
    parts.append(f"color jitter {a.color_jitter_p:g}")
    if a.randaugment_n:
        parts.append(
            f"RandAugment N {a.randaugment_n}, M {a.randaugment_m:g}, "
            f"each with probability {a.randaugment_p:g}"
        )
    if a.trivialaugment:
        parts.append("TrivialAugment")
    if a.pipeline:
        parts.append("your own pipeline")
    if a.erasing_p:
        parts.append(f"erasing {a.erasing_p:g}")
    return ", ".join(parts)


def _summary(run: Run) -> str:
    mixing = (
        " and ".join(
            f"{name} α {alpha:g}"
            for name, alpha in (("Mixup", run.mix.mixup_alpha), ("CutMix", run.mix.cutmix_alpha))
            if alpha
        )
        or "no mixing"
    )
    return f"{run.augment.size} px · {_policy(run)} · {mixing} · seed {run.seed}"


# --- drawing ---


def draw_sheet(head: str, summary: str, sections: Sequence[Section]) -> Image.Image:
    """The sections below each other under a heading."""
    width = 2 * MARGIN + LABEL + COLUMNS * (TILE + GAP)
    parts = [_heading(head, summary, width, 30)]
    for section in sections:
        parts.append(_heading(section.title, section.note, width, 21))
        parts += [_row(row, width) for row in section.rows]
    sheet = Image.new("RGB", (width, sum(p.height for p in parts) + MARGIN), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _heading(title: str, note: str, width: int, size: int) -> Image.Image:
    part = Image.new("RGB", (width, size + 62), PAPER)
    pen = ImageDraw.Draw(part)
    pen.text((MARGIN, 22), title, INK, font(size, bold=True))
    pen.text((MARGIN, 22 + size + 9), fit(note, width - 2 * MARGIN, font(14)), QUIET, font(14))
    return part


def _row(row: Row, width: int) -> Image.Image:
    lines = max((tile.caption.count("\n") + 1 for tile in row.tiles if tile.caption), default=0)
    part = Image.new("RGB", (width, TILE + 17 * lines + 15), PAPER)
    pen = ImageDraw.Draw(part)
    top = 3  # room for a frame
    pen.rectangle((MARGIN, top, MARGIN + 3, top + TILE - 1), row.color)
    pen.text(
        (MARGIN + 14, top + 2),
        fit(row.title, LABEL - 24, font(16, bold=True)),
        row.color,
        font(16, bold=True),
    )
    note = "\n".join(line for text in row.note.split("\n") for line in textwrap.wrap(text, 23))
    pen.multiline_text((MARGIN + 14, top + 27), note, QUIET, font(13), spacing=3)
    for column, tile in enumerate(row.tiles):
        left = MARGIN + LABEL + column * (TILE + GAP)
        if tile.marked:
            pen.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), MARK)
        part.paste(Image.fromarray(_shown(tile.image)), (left, top))
        for line, text in enumerate(tile.caption.split("\n")):
            lettering = font(13, bold=tile.marked)
            text = fit(text, TILE, lettering)
            pen.text(
                (left + TILE / 2, top + TILE + 11 + 17 * line),
                text,
                MARK if tile.marked else INK if line == 0 else QUIET,
                lettering,
                anchor="mm",
            )
    return part


def _shown(image: np.ndarray) -> np.ndarray:
    """At the tile's size: large pictures averaged, small ones with their pixels visible."""
    small = min(image.shape[:2]) < TILE
    return cv2.resize(
        image, (TILE, TILE), interpolation=cv2.INTER_NEAREST if small else cv2.INTER_AREA
    )
