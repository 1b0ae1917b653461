"""Classify a folder of pictures with a packaged model.

    python jobs/predict.py --model models:/NAME@champion --source FOLDER --out answers.parquet
    python jobs/predict.py --model PACKAGE_FOLDER --source FOLDER --out answers.parquet --workers 4

What comes out: a Parquet file with a row per picture: path, class, probability, the top classes with theirs, and why, where a picture
could not be read. Killed, it goes on where it stopped when the same command is given again. From 2,000 pictures on it is a Ray Data job,
on the cluster at RAY_ADDRESS (whose nodes must see FOLDER), else on this machine.
"""

from __future__ import annotations

import argparse
import sys

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="URI",
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a package's folder",
    )
    parser.add_argument("--source", required=True, metavar="FOLDER", help="pictures, at any depth")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .parquet file")
    parser.add_argument(
        "--top-k",
        type=int,
        default=5,
        metavar="K",
        help="classes named per picture (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "here", "ray"),
        default="auto",
        help="auto takes Ray from 2,000 pictures on (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="copies of the model under Ray (default: %(default)s)",
    )
    parser.add_argument(
        "--tracking-uri",
        default="",
        metavar="URI",
        help="MLflow, for models:/ and runs:/ (default: $MLFLOW_TRACKING_URI, or the database below $FTLIB_HOME)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1 or arguments.workers < 1:
        parser.error("--top-k and --workers need to be 1 or more")

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ftlib.deploy.batch_predict import predict_folder

    tracking = ""
    if arguments.model.startswith(("models:/", "runs:/")):
        from ftlib.track.store import reach, resolve_uri

        tracking = resolve_uri(arguments.tracking_uri)
        reach(tracking)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("classifying", total=None)
        table = predict_folder(
            arguments.model,
            arguments.source,
            arguments.out,
            tracking=tracking,
            top_k=arguments.top_k,
            engine=arguments.engine,
            workers=arguments.workers,
            tick=lambda done, total: progress.update(task, completed=done, total=total),
        )
    bad = table["error"].null_count
    print(
        f"{arguments.out}: {table.num_rows:,} pictures, {table.num_rows - bad:,} of which could not be read (their error says why)"
    )


if __name__ == "__main__":
    job(main)
