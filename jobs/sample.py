"""The whole way on a sample: scikit-learn's 1,797 digits are prepared, Phase 1 and Phase 2 are trained on them.

    make run                        # or: python jobs/sample.py

The recipes are those of jobs/phase1.py and jobs/phase2.py with a smaller model, smaller pictures, fewer epochs (and success criteria to
match). Nothing is downloaded. Cost: about 4 minutes on 2 cores. Expected: 97 % top-1 or more after Phase 2 on digits that were held out.
The same command again says what is there; another FTLIB_HOME starts over.
"""

import os
import sys
import time

from ftlib import recipes
from ftlib.cli import job
from ftlib.settings import override

SMALL = {"data.path": "digits", "data.subset": 1.0, "model.arch": "resnet18", "augment.size": 32}
# 359 held-out digits: one of them is 0.28 points, so a point more or less between the phases says nothing.
PHASE1 = override(recipes.load("phase1"), {**SMALL, "train.epochs": 16, "gates.val_top1": 90.0})
PHASE2 = override(
    recipes.load("phase2"), {**SMALL, "train.epochs": 2, "gates.val_top1": 97.0, "gates.gain": -1.5}
)


def main() -> None:
    started = time.monotonic()
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if sys.argv[1:]:
        raise SystemExit(
            "jobs/sample.py takes no options. Use jobs/prepare.py, jobs/phase1.py and jobs/phase2.py with your own"
        )
    from ftlib.launch.launch import launch
    from ftlib.launch.summary import sample
    from ftlib.preparation.prepare import prepare
    from ftlib.track.links import ui_command
    from ftlib.track.store import resolve_uri

    prepare("digits", engine="here")
    # A worker per core trains a small network faster than one worker with two threads; the pictures and the mathematics are the same.
    workers = {"cluster.workers": str(min(len(os.sched_getaffinity(0)), 2))}
    one = launch(override(PHASE1, workers))
    two = launch(override(PHASE2, workers))
    uri = resolve_uri()
    python = os.path.relpath(sys.executable)
    commands = [
        ("open the MLflow UI", ui_command(uri)),
        ("score a run, see its errors", f"{python} jobs/evaluate.py {two.name}"),
        (
            "start a sweep",
            f"{python} jobs/sweep.py --recipe sample-phase2 --space quick --trials 8",
        ),
        ("your own pictures", f"{python} jobs/prepare.py --source FOLDER --out NAME"),
    ]
    print(sample(one, two, uri, commands, time.monotonic() - started))


if __name__ == "__main__":
    job(main)
