"""The worst mistakes of an epoch as one picture, which MLflow shows with a slider over the epochs.

An evaluation keeps three numbers of every image on the device, without waiting for it; the few
pictures that are shown are decoded again afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ftlib.config import Run
from ftlib.data.augment import EvalTransform
from ftlib.data.shards import Split
from ftlib.lettering import fit, font
from ftlib.text import percent

SHOWN, ACROSS, SIDE, CAPTION, GAP = 12, 4, 128, 30, 8
"""Mistakes, columns; pixels of a picture's side, of the caption below it, and between two."""


class Losses:
    """What an evaluation remembers of its images."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, rows: Tensor, labels: Tensor, answers: Tensor, nll: Tensor) -> None:
        """Remember a batch: rows of the split, labels and answers int64[b], and the negative
        log-likelihoods of the labels float32[b]."""
        nll = nll.where(answers != labels, -1.0)  # negative: no mistake
        self._rows.append(rows)
        self._values.append(torch.stack([nll, labels.float(), answers.float()]))

    def worst(self) -> list[tuple[int, float, int, int]]:
        """(row, negative log-likelihood, label, answer) of the worst mistakes, the worst first."""
        if not self._rows:
            return []
        rows, values = torch.cat(self._rows), torch.cat(self._values, dim=1).cpu()
        order = values[0].argsort(descending=True, stable=True)[:SHOWN]
        order = order[values[0, order] >= 0]
        return [
            (int(rows[i]), float(values[0, i]), int(values[1, i]), int(values[2, i]))
            for i in order.tolist()
        ]


def sheet(losses: Losses, split: Split, classes: Sequence[str], run: Run) -> Image.Image | None:
    """The worst mistakes beside and below each other; None where there are none.

    Below each picture: the true class, the answer, and the true class's probability.
    """
    found = losses.worst()
    if not found:
        return None
    transform = EvalTransform(run.eval_size, run.evaluate.crop, run.evaluate.interpolation)
    down = -(-len(found) // ACROSS)
    width, height = ACROSS * (SIDE + GAP) + GAP, down * (SIDE + CAPTION + GAP) + GAP
    page = Image.new("RGB", (width, height), "white")
    draw, letters = ImageDraw.Draw(page), font(11)
    for place, (row, nll, label, answer) in enumerate(found):
        y, x = divmod(place, ACROSS)
        left, top = GAP + x * (SIDE + GAP), GAP + y * (SIDE + CAPTION + GAP)
        pixels = transform(split.image(row))
        page.paste(Image.fromarray(pixels).resize((SIDE, SIDE)), (left, top))
        lines = (f"{classes[label]} ({percent(np.exp(-nll))})", f"taken for {classes[answer]}")
        for number, line in enumerate(lines):
            corner = (left, top + SIDE + 2 + 13 * number)
            draw.text(corner, fit(line, SIDE, letters), "black", letters)
    return page
