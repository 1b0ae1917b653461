"""Score a run's model with 95 % intervals, and write a report of its mistakes.

    python jobs/evaluate.py RUN                          # the best model on the validation pictures
    python jobs/evaluate.py RUN --sizes 224,256 --flip   # larger inputs, and the average with the mirrored picture
    python jobs/evaluate.py RUN --data other             # other prepared pictures of the same classes
    python jobs/evaluate.py RUN --weights raw            # the newest checkpoint, without weight averaging

RUN is a name below $FTLIB_HOME/runs, or a run's folder or address. What comes out: a table on the screen, and a report (HTML, PNG, CSV)
in the run's report folder, which also goes to the run's page in MLflow. What it costs: one pass over the pictures per size, twice with
--flip, and about 5 s for the report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's name, folder or address")
    parser.add_argument(
        "--split",
        choices=("val", "test", "tuning", "train"),
        default="val",
        help="which pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        default="",
        help="another prepared data set with the same classes (default: the run's own)",
    )
    parser.add_argument(
        "--sizes",
        default="",
        metavar="PX,PX",
        help="sides of the input to try (default: the run's evaluation size)",
    )
    parser.add_argument(
        "--flip", action="store_true", help="average with the mirrored picture; doubles the cost"
    )
    parser.add_argument(
        "--weights",
        choices=("best", "last", "raw"),
        default="best",
        help="best: the best-scoring; last: the newest checkpoint; raw: the same without weight averaging (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="score at most N pictures, evenly spread (default: all)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=-1,
        metavar="N",
        help="loader processes; 0 loads in a thread (default: one per CPU but one)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the report goes (default: report/ in the run's folder)"
    )
    parser.add_argument("--no-report", action="store_true", help="only the table")
    parser.add_argument("--no-track", action="store_true", help="leave MLflow alone")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments = parser.parse_args(argv)
    try:
        sizes = [int(s) for s in arguments.sizes.split(",") if s] or [0]
    except ValueError:
        parser.error(f"--sizes {arguments.sizes}: needs whole numbers of pixels, such as 224,256")
    if min(sizes) < 0 or arguments.limit < 0:
        parser.error("--sizes and --limit must not be negative")

    from ftlib import storage
    from ftlib.data.shards import Dataset
    from ftlib.paths import absolute, data_path, home
    from ftlib.report.evaluation import load, score
    from ftlib.report.evaluation_report import write

    run_dir = arguments.run if "/" in arguments.run else str(home() / "runs" / arguments.run)
    run_dir = absolute(run_dir)
    loaded = load(run_dir, arguments.weights)
    own = (
        Dataset.open(data_path(loaded.run.data.path))
        if not arguments.data or loaded.run.data.tuning_fraction
        else None
    )
    dataset = Dataset.open(data_path(arguments.data)) if arguments.data else own
    assert dataset is not None
    workers = arguments.workers if arguments.workers >= 0 else max((os.cpu_count() or 1) - 1, 0)
    scored = [
        score(
            loaded,
            dataset,
            arguments.split,
            size=size,
            flip=arguments.flip,
            limit=arguments.limit,
            workers=workers,
            calibration_data=own,
        )
        for size in sizes
    ]
    print(table(loaded, dataset, arguments.split, scored))
    if arguments.no_report:
        return
    place = (
        Path(arguments.out)
        if arguments.out
        else (
            home() / "runs" / run_dir.rsplit("/", 1)[-1]
            if storage.is_remote(run_dir)
            else Path(run_dir)
        )
        / "report"
    )
    report = write(loaded, scored, dataset, place, arguments.split)
    print(f"\nreport: {report.page}")
    if not arguments.no_track:
        attach(
            run_dir,
            storage.read_json(storage.join(run_dir, "run.json")) or {},
            report.files,
            f"report/{dataset.name}-{arguments.split}",
        )


def table(loaded: Any, dataset: Any, split: str, scored: list[Any]) -> str:
    """The scores as text: one line per input size."""
    about = loaded.about
    averaged = "an average over steps" if about.get("ema") else "not averaged"
    lines = [
        f"{about.get('run', loaded.run.name)}: {loaded.run.model.arch}, weights of step {about.get('step', '?')} ({averaged}), on {len(scored[0].rows):,} pictures of {dataset.name} ({split})",
        "",
    ]
    rows = [("input", "top-1 %", "top-5 %", "NLL", "ECE", "NLL calibrated", "ECE calibrated", "T")]
    for s in scored:
        rows.append(
            (
                f"{s.size} px{' + mirror' if s.flip else ''}",
                s.before["top1"].show(),
                s.before["top5"].show(),
                s.before["nll"].show(3),
                s.before["ece"].show(3),
                s.after["nll"].show(3),
                s.after["ece"].show(3),
                f"{s.calibration.temperature:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"In brackets: 95 % bootstrap intervals. Temperature fitted on {scored[0].calibration.fitted_on}.",
        ]
    )


def attach(run_dir: str, record: dict[str, Any], files: tuple[Path, ...], folder: str) -> None:
    """Copy the report to the run's page in MLflow; a server that is away costs a warning."""
    known = record.get("mlflow") or {}
    if not known.get("run_id"):
        return
    from ftlib.track.links import absolute, run_page
    from ftlib.track.store import client, reach, store_of_run

    try:
        uri = store_of_run(known.get("uri", ""), known["run_id"], run_dir)
        reach(uri)
        mlflow = client(uri)
        for file in files:
            mlflow.log_artifact(known["run_id"], str(file), folder)
        page = absolute(uri, run_page(known.get("experiment_id", ""), known["run_id"]))
        print(f"in MLflow: {page} (artifacts, {folder})")
    except Exception as error:
        print(
            f"warning: MLflow did not take the report ({json.dumps(str(error).splitlines()[0])}); the files above are complete",
            file=sys.stderr,
        )


if __name__ == "__main__":
    job(main)
