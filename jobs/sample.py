"""Train a sample from start to end: prepare the digits, then train Phase 1 and Phase 2 on them.

    make run                        # or: python jobs/sample.py

The data are scikit-learn's 1,797 digits; nothing is downloaded. The recipes are those of
jobs/phase1.py and jobs/phase2.py with a smaller model, smaller pictures, fewer epochs and matching
success criteria. It takes about 4 minutes on 2 cores.
Expected: 97 % top-1 or more after Phase 2 on digits that were held out.
The same command again reports what is there; another FTLIB_HOME starts over.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ftlib import recipes
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.settings import override

SMALL = {"data.path": "digits", "data.subset": 0.9, "model.arch": "resnet18", "augment.size": 32}
# One of the 359 held-out digits is 0.28 points, so a point between the phases says nothing.
PHASE1 = override(recipes.load("phase1"), {**SMALL, "train.epochs": 16, "gates.val_top1": 90.0})
PHASE2 = override(
    recipes.load("phase2"), {**SMALL, "train.epochs": 2, "gates.val_top1": 97.0, "gates.gain": -1.5}
)


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """The sample has no options of its own."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    with reporting(asked) as result:
        result.update(train_sample(asked.quiet))


def train_sample(quiet: bool) -> dict[str, object]:
    started = time.monotonic()
    from ftlib.launch.launch import launch
    from ftlib.launch.summary import sample
    from ftlib.preparation.prepare import prepare
    from ftlib.track.links import ui_command
    from ftlib.track.store import resolve_uri

    prepare("digits", engine="local")
    # A worker per core trains a small network faster than one worker with two threads. The
    # pictures and the mathematics are the same.
    workers = {"cluster.workers": str(min(len(os.sched_getaffinity(0)), 2))}
    one = launch(override(PHASE1, workers), quiet=quiet)
    two = launch(override(PHASE2, workers), quiet=quiet)
    uri = resolve_uri()
    python = os.path.relpath(sys.executable)
    sweep = f"{python} jobs/sweep.py --recipe sample-phase2 --space quick --trials 8"
    commands = [
        ("open the MLflow UI", ui_command(uri)),
        ("score a run, see its errors", f"{python} jobs/evaluate.py {two.name}"),
        ("start a sweep", sweep),
        ("your own pictures", f"{python} jobs/prepare.py --source FOLDER --out NAME"),
    ]
    print(sample(one, two, uri, commands, time.monotonic() - started))
    return {"phase1": vars(one), "phase2": vars(two)}


if __name__ == "__main__":
    job(main)
