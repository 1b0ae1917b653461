"""See any step of a run again: its images, augmentation, mixing and loss, exactly as they were.

    python jobs/replay.py RUN --step 1234              # a contact sheet, and the loss of every image
    python jobs/replay.py RUN --step 1234 --pictures   # the pictures alone: needs no weights, takes seconds

RUN is a run's name, or its folder. Steps count from 0. The loss needs the weights before the step: training is taken up from the newest
checkpoint at or before it (from the beginning, where there is none) in a scratch folder; the run itself is not touched.
"""

import argparse
from pathlib import Path

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/replay.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 0")
    parser.add_argument("--pictures", action="store_true", help="only the pictures, no loss")
    parser.add_argument(
        "--storage",
        default="",
        metavar="URI",
        help="where runs are kept (default: $FTLIB_HOME/runs)",
    )
    parser.add_argument(
        "--out",
        default="replay.png",
        metavar="FILE",
        help="where the contact sheet goes (default: %(default)s)",
    )
    return parser


def main() -> None:
    asked = options().parse_args()
    from ftlib import storage
    from ftlib.config import Run
    from ftlib.data.shards import Dataset
    from ftlib.paths import run_folder
    from ftlib.report.replay import replay, sheet
    from ftlib.settings import from_dict
    from ftlib.training.initial_weights import InitialWeights

    run_dir = run_folder(asked.run, asked.storage)
    record = storage.read_json(storage.join(run_dir, "run.json"))
    run = from_dict(Run, record["run"])
    dataset = Dataset.open(record["data"]["path"])
    source = InitialWeights.from_dict(record["init"]) if record.get("init") else None
    found = replay(run, dataset, run_dir, asked.step, source, with_loss=not asked.pictures)
    train = dataset.split("train")
    for k, rows in found.rows.items():
        for i, row in enumerate(rows):
            loss = f"  loss {found.losses[k][i]:.6f}" if found.losses else ""
            print(f"microbatch {k}  row {row}  {train.path(row)}{loss}")
    if found.losses:
        began = f"checkpoint step {found.start}" if found.start is not None else "the beginning"
        print(
            f"Step {found.step} of {run.name}: loss {found.loss:.6f}, trained again from {began}."
        )
    print(f"Contact sheet: {sheet(run, dataset, found, Path(asked.out)).absolute()}")


if __name__ == "__main__":
    job(main)
