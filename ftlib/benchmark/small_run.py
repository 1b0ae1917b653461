"""A small training as a process of its own, as a sweep's trial has it: by ftlib, or as the plain
function that people give to Ray Tune; or a job up to its first step.

python -m ftlib.benchmark.small_run ftlib|plain FOLDER      # FOLDER holds few/ (pictures) and
few-prepared/ (the same, prepared)
python -m ftlib.benchmark.small_run step JOB.py FLAGS...    # ends with the first optimizer step
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftlib.track.tracking import TrackerHandle

EPOCHS = 2
PHOTOS = 64
SIZE = 64
BATCH = 16


def undelivered(home: Path) -> TrackerHandle:
    """Tracking into a journal below `home` that nobody delivers."""
    from ftlib.process_identity import machine_id
    from ftlib.track.tracking import TrackerHandle
    from ftlib.track.writer import JournalLocation

    journal = home / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    where = JournalLocation(str(journal), machine_id())
    return TrackerHandle("sqlite:////nobody/delivers/this.db", "trials", where)


def by_ftlib(folder: Path) -> None:
    """What a trial of a sweep does in its process: `launch`, with a handle for its tracking,
    which the sweep's driver delivers."""
    home = folder / "home" / str(os.getpid())
    os.environ["FTLIB_HOME"] = str(home)
    from ftlib.config import AdamW, Augment, Data, Model, Run, Track, Train
    from ftlib.launch.launch import launch

    run = Run(
        data=Data(path=str(folder / "few-prepared"), loader_workers=0),
        augment=Augment(size=SIZE),
        model=Model(arch="resnet18"),
        optimizer=AdamW(lr=1e-4),
        train=Train(epochs=EPOCHS, batch_size=BATCH, microbatch_size=BATCH),
        track=Track(log_model=False, system_metrics=False),
    )
    launch(
        run,
        local=True,
        kind="trial",
        tracking=undelivered(home),
        quiet=True,
    )


def plain(folder: Path) -> None:
    """torchvision's pictures and model, a loop, a score and a checkpoint per epoch."""
    import torch
    import torchvision
    from ray import tune  # noqa: F401 - a Tune function has imported it
    from torch.nn import functional as F
    from torchvision import transforms as T

    steps = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    pictures = torchvision.datasets.ImageFolder(
        str(folder / "few"),
        T.Compose(
            [
                T.RandomResizedCrop(SIZE),
                T.RandomHorizontalFlip(),
                T.ColorJitter(0.4, 0.4, 0.4),
                *steps,
            ]
        ),
    )
    scored = torchvision.datasets.ImageFolder(
        str(folder / "few"), T.Compose([T.Resize(round(SIZE / 0.875)), T.CenterCrop(SIZE), *steps])
    )
    held_out = set(range(0, len(pictures), 4))
    train = torch.utils.data.DataLoader(
        torch.utils.data.Subset(pictures, [i for i in range(len(pictures)) if i not in held_out]),
        BATCH,
        shuffle=True,
    )
    val = torch.utils.data.DataLoader(torch.utils.data.Subset(scored, sorted(held_out)), BATCH)
    model = torchvision.models.resnet18(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in val)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "right": right},
            folder / f"plain-{epoch}.pt",
        )


def to_first_step(command: list[str]) -> None:
    """Run a job, and end the process once an optimizer has made its first step."""
    from ftlib.gc_pause import gc_paused

    with gc_paused():  # as the job itself imports it
        from torch.optim import optimizer
    optimizer.register_optimizer_step_post_hook(lambda *_: os._exit(0))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    raise SystemExit("the job has made no step")


if __name__ == "__main__":
    if sys.argv[1] == "step":
        to_first_step(sys.argv[2:])
    else:
        {"ftlib": by_ftlib, "plain": plain}[sys.argv[1]](Path(sys.argv[2]))
