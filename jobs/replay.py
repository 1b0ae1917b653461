"""See any step of a run again: its images, augmentation, mixing and loss, exactly as they were.

    python jobs/replay.py RUN --step 1234              # a contact sheet, and each image's loss
    python jobs/replay.py RUN --step 1234 --pictures   # the pictures alone: no weights, in seconds

RUN is a run's name or its folder. Steps count from 0. The loss needs the weights before the step:
training goes on from the newest checkpoint at or before it (or from the beginning) in a scratch
folder. The run is not touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ftlib import storage
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import Count, Run
from ftlib.flags import Metavar, Position
from ftlib.gc_pause import lasting_imports
from ftlib.paths import run_folder
from ftlib.settings import from_dict


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    run: Annotated[str, Position]
    """A run's name or its folder."""
    step: Count
    """The step, from 0."""
    pictures: bool = False
    """Show the pictures only, no loss."""
    storage: Annotated[str, Metavar("URI")] = ""
    """Where runs are. By default $FTLIB_HOME/runs."""
    out: Annotated[str, Metavar("FILE")] = "replay.png"
    """Where the contact sheet goes."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    run_dir = run_folder(asked.run, asked.storage)
    record = storage.read_json(storage.join(run_dir, "run.json")) or {}
    run = from_dict(Run, record["run"])
    with lasting_imports():
        from ftlib.data.shards import Dataset
        from ftlib.report.replay import replay, sheet
        from ftlib.training.initial_weights import InitialWeights

    with reporting(asked) as result:
        dataset = Dataset.open(record["data"]["path"])
        source = InitialWeights.from_dict(record["init"]) if record.get("init") else None
        found = replay(run, dataset, run_dir, asked.step, source, with_loss=not asked.pictures)
        train = dataset.split("train")
        for microbatch, rows in found.rows.items():
            for i, row in enumerate(rows):
                loss = f"  loss {found.losses[microbatch][i]:.6f}" if found.losses else ""
                print(f"microbatch {microbatch}  row {row}  {train.path(row)}{loss}")
        if found.losses:
            began = "the beginning" if found.start is None else f"checkpoint step {found.start}"
            print(
                f"Step {found.step} of {run.name}: loss {found.loss:.6f}, "
                f"trained again from {began}."
            )
            result["loss"] = found.loss
        drawn = sheet(run, dataset, found, Path(asked.out)).absolute()
        print(f"Contact sheet: {drawn}")
        result.update(run=run_dir, step=found.step, sheet=drawn)


if __name__ == "__main__":
    job(main)
