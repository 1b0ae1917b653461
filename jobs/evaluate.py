"""Score a run's model with 95 % intervals, and write a report of its mistakes.

    python jobs/evaluate.py RUN                          # the best model on the validation pictures
    python jobs/evaluate.py RUN --sizes 224,256 --flip   # larger inputs, averaged with the mirrored
    python jobs/evaluate.py RUN --data other             # other pictures of the same classes
    python jobs/evaluate.py RUN --weights raw            # the newest checkpoint, without averaging

It prints a table, and writes a report (HTML, PNG, CSV) to the run's report folder and to the run's
page in MLflow. It takes one pass over the pictures per size, two with --flip, and about 5 s for the
report.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ftlib import storage
from ftlib.checks import check_data
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.flags import Commas, Metavar, Position
from ftlib.gc_pause import gc_paused, lasting_imports
from ftlib.paths import data_path, job_command, local_run_folder, run_folder, run_words
from ftlib.settings import Between
from ftlib.text import wrapped

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset
    from ftlib.report.evaluation import LoadedModel, Scored


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    run: Annotated[str, Position]
    """A run's name below $FTLIB_HOME/runs, its folder or its address."""
    split: Literal["val", "test", "tuning", "train"] = "val"
    """Which pictures to score."""
    data: Annotated[str, Metavar("DATA")] = ""
    """Another prepared data set with the same classes. By default the run's own."""
    sizes: Annotated[tuple[Annotated[int, Between(8, 4096)], ...], Commas, Metavar("PX,PX")] = ()
    """Sides of the input to try, in pixels. By default the run's evaluation size."""
    flip: bool = False
    """Average with the mirrored picture; this doubles the cost."""
    weights: Literal["best", "last", "raw"] = "best"
    """best: of the best score; last: the newest checkpoint; raw: that without weight averaging."""
    limit: Annotated[int, Between(0, 2**31)] = 0
    """Score at most this many pictures, evenly spread. 0: all."""
    workers: Annotated[int, Between(-1, 256)] = -1
    """Loader processes. 0: a thread loads. -1: a thread for up to 2,000 pictures, else one process
    for each CPU but one."""
    out: Annotated[str, Metavar("FOLDER")] = ""
    """Where the report goes. By default report/ in the run's folder."""
    no_report: bool = False
    """Print the table only."""
    no_track: bool = False
    """Do not copy the report to MLflow."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    run_dir = run_folder(asked.run)
    if asked.data:
        check_data(asked.data)
    with lasting_imports():
        from ftlib.data.shards import Dataset, open_dataset
        from ftlib.report.evaluation import load

    with reporting(asked) as result:
        loaded = load(run_dir, asked.weights)
        own = None
        if not asked.data or loaded.run.data.tuning_fraction:
            own = open_dataset(loaded.run.data)
        dataset = Dataset.open(data_path(asked.data)) if asked.data else own
        assert dataset is not None
        scored = score_sizes(asked, loaded, dataset, own)
        print(table(loaded, dataset, asked.split, scored))
        result.update(run=run_dir, data=dataset.name, split=asked.split, weights=asked.weights)
        result["scores"] = [{"size": s.size, "flip": s.flip, **s.plain} for s in scored]
        if not asked.no_report:
            result["report"] = write_report(asked, run_dir, loaded, dataset, scored)
        export = f"{run_words(run_dir)} --out model --formats mlflow"
        print(f"\nNext: {job_command('export', export)}")


def score_sizes(
    asked: Options, loaded: "LoadedModel", dataset: "Dataset", own: "Dataset | None"
) -> list["Scored"]:
    """The scores, one for each size."""
    from ftlib.report.evaluation import score

    return [
        score(
            loaded,
            dataset,
            asked.split,
            size=size,
            flip=asked.flip,
            limit=asked.limit,
            workers=asked.workers,
            calibration_data=own,
        )
        for size in asked.sizes or (0,)
    ]


def write_report(
    asked: Options,
    run_dir: str,
    loaded: "LoadedModel",
    dataset: "Dataset",
    scored: Sequence["Scored"],
) -> str:
    """Write the report, copy it to MLflow, and return the path of its page."""
    with gc_paused():
        from ftlib.report.evaluation_report import write
        from ftlib.report.run_facts import run_facts
        from ftlib.track.links import place_lines

    place = Path(asked.out) if asked.out else local_run_folder(run_dir) / "report"
    facts = run_facts(loaded.run, run_dir)
    report = write(loaded, list(scored), dataset, place, asked.split, facts=facts)
    page, command = "", ""
    if not asked.no_track:
        record = storage.read_json(storage.join(run_dir, "run.json")) or {}
        folder = f"report/{dataset.name}-{asked.split}"
        page, command = attach(run_dir, record, report.files, folder)
    print()
    print("\n".join(place_lines({"report": str(report.page), "MLflow": page}, command)))
    return str(report.page)


def table(loaded: "LoadedModel", dataset: "Dataset", split: str, scored: Sequence["Scored"]) -> str:
    """The scores as text, a column for each input size."""
    about = loaded.about
    averaged = "an average over steps" if about.get("ema") else "not averaged"
    head = (
        f"{about.get('run', loaded.run.name)}: {loaded.run.model.arch}, "
        f"weights of step {about.get('step', '?')} ({averaged}), "
        f"on {len(scored[0].rows):,} pictures of {dataset.name} ({split})"
    )
    rows = [("input", *(f"{s.size} px{' + mirror' if s.flip else ''}" for s in scored))]
    rows += [(name, *(s.cells[name] for s in scored)) for name in scored[0].cells]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    foot = [
        "In brackets: 95 % bootstrap intervals. "
        f"Temperature fitted on {scored[0].calibration.fitted_on}."
    ]
    if scored[0].chose:
        from ftlib.report.evaluation import CHOSEN_HERE

        foot.append(CHOSEN_HERE)
    return "\n".join([wrapped(head), "", *lines, "", *(wrapped(line, "") for line in foot)])


def attach(
    run_dir: str, record: Mapping[str, Any], files: Sequence[Path], folder: str
) -> tuple[str, str]:
    """Copy the report, whose page is the first of `files`, to the run in MLflow.

    Returns its address there and the command that starts the UI. Both are empty for a run that is
    not tracked, and after a warning where the server is away.
    """
    known = record.get("mlflow") or {}
    if not known.get("run_id"):
        return "", ""
    from ftlib.track.links import absolute, artifact_page, opened_by
    from ftlib.track.store import client, ensure_store, reach, store_of_run

    try:
        uri = store_of_run(known.get("uri", ""), known["run_id"], run_dir)
        ensure_store(uri)  # which tells a home that was moved where its artifacts are
        reach(uri)
        mlflow = client(uri)
        for file in files:
            mlflow.log_artifact(known["run_id"], str(file), folder)
        page = artifact_page(
            known.get("experiment_id", ""), known["run_id"], f"{folder}/{files[0].name}"
        )
        return absolute(uri, page), opened_by(uri)
    except Exception as error:
        reason = json.dumps(str(error).splitlines()[0])
        print(
            f"warning: MLflow did not take the report ({reason}); the files above are complete",
            file=sys.stderr,
        )
        return "", ""


if __name__ == "__main__":
    job(main)
