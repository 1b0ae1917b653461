"""One training of `jobs/benchmark.py --what recipes` as a process of its own, so that its CPU time
is all of it: a run of ftlib, or a plain loop with torchvision's pictures.

    python -m ftlib.benchmark.one_recipe ftlib RUN.json FOLDER       # a complete recipe
    python -m ftlib.benchmark.one_recipe loop LOOP.json FOLDER       # the fields of `Loop`

It prints validation top-1 in percent after each epoch, as one line of JSON. FOLDER is scratch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlib.config import IMAGENET_MEAN, IMAGENET_STD, Run


@dataclass(frozen=True)
class Loop:
    """The loop that everybody writes: torchvision's pictures and model, cross-entropy, a rate that
    falls by epoch."""

    pictures: str
    """Folder with train/ and val/, class folders in each."""
    arch: str
    """A torchvision classifier."""
    size: int
    """Side of the training and evaluation input in pixels."""
    epochs: int
    seed: int
    batch: int
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    schedule: Literal["step", "cosine"]
    """step: a tenth of the rate after each third of the epochs."""


def train(loop: Loop) -> list[float]:
    """Validation top-1 in percent after each epoch."""
    import torch
    import torchvision
    from torch.nn import functional as F
    from torchvision import transforms as T

    torch.manual_seed(loop.seed)
    last = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = [T.RandomResizedCrop(loop.size), T.RandomHorizontalFlip()]
    center = [T.Resize(round(loop.size / 0.875)), T.CenterCrop(loop.size)]
    folder, images = Path(loop.pictures), torchvision.datasets.ImageFolder
    pictures = images(str(folder / "train"), T.Compose([*crop, *last]))
    scored = images(str(folder / "val"), T.Compose([*center, *last]))
    batches = torch.utils.data.DataLoader(pictures, loop.batch, shuffle=True, drop_last=True)
    held_out = torch.utils.data.DataLoader(scored, 128)
    model = torchvision.models.get_model(loop.arch, num_classes=len(pictures.classes))
    values, lr, decay = model.parameters(), loop.lr, loop.weight_decay
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(values, lr=lr, momentum=0.9, weight_decay=decay)
        if loop.optimizer == "sgd"
        else torch.optim.AdamW(values, lr=lr, weight_decay=decay)
    )
    schedule: Any = (
        torch.optim.lr_scheduler.StepLR(optimizer, max(1, loop.epochs // 3))
        if loop.schedule == "step"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, loop.epochs)
    )
    curve = []
    for _ in range(loop.epochs):
        model.train()
        for x, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in held_out)
        curve.append(100 * right / len(scored))
    return curve


def by_ftlib(run: Run, folder: Path) -> list[float]:
    """Validation top-1 in percent after each epoch; what is tracked stays in `folder`."""
    from ftlib.benchmark.small_run import undelivered
    from ftlib.launch.launch import launch

    outcome = launch(
        run, local=True, kind="benchmark", tracking=undelivered(folder / "home"), quiet=True
    )
    history = json.loads(Path(outcome.run_dir, "result.json").read_text("utf-8"))["history"]
    return [row["val/top1"] for row in history]


def main(way: str, settings: Path, folder: Path) -> None:
    text = settings.read_text("utf-8")
    if way == "ftlib":
        os.environ["FTLIB_HOME"] = str(folder / "home")
        from ftlib.settings import from_json

        found = by_ftlib(from_json(Run, text), folder)
    else:
        found = train(Loop(**json.loads(text)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
