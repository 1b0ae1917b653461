"""Classify a folder of pictures with a packaged model.

    python jobs/predict.py --model models:/NAME@champion --source FOLDER --out answers.parquet
    python jobs/predict.py --model PACKAGE_FOLDER --source FOLDER --out answers.parquet --workers 4

It writes a Parquet file with a row per picture: path, class, probability, the top classes with
theirs, and why, where a picture could not be read. The same command goes on after an interruption.
From 2,000 pictures on it is a Ray Data job, on the cluster at RAY_ADDRESS (whose nodes must see
FOLDER), else on this machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ftlib.checks import check_model_folder
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import AtLeastOne
from ftlib.flags import FormerValue, Metavar
from ftlib.settings import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    model: Annotated[str, Metavar("URI")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a package's folder."""
    source: Annotated[str, Metavar("FOLDER")]
    """Pictures, at any depth."""
    out: Annotated[str, Metavar("FILE")]
    """A .parquet file for the answers."""
    top_k: AtLeastOne = 5
    """Classes that are named per picture."""
    engine: Annotated[Literal["auto", "local", "ray"], FormerValue("here", "local")] = "auto"
    """This process (local) or Ray Data; auto takes Ray from 2,000 pictures on."""
    workers: AtLeastOne = 1
    """Copies of the model under Ray."""
    tracking_uri: Annotated[str, Metavar("URI")] = ""
    """MLflow, for models:/ and runs:/. By default $MLFLOW_TRACKING_URI, or the database below
    $FTLIB_HOME."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    check_model_folder(asked.model)
    if not Path(asked.source).expanduser().exists():
        raise ConfigError(f"--source {asked.source}: there is no such folder")
    with reporting(asked) as result:
        answers = predict(asked)
        unreadable = answers.num_rows - answers["error"].null_count
        print(
            f"{asked.out}: {answers.num_rows:,} pictures, {unreadable:,} of which could not be "
            "read (their error says why)"
        )
        result.update(file=asked.out, pictures=answers.num_rows, unreadable=unreadable)


def predict(asked: Options) -> "pa.Table":
    """The answers: a row per picture."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ftlib.deploy.batch_predict import predict_folder
    from ftlib.packaging.package import locate

    _, tracking = locate(asked.model, asked.tracking_uri)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = asked.quiet or not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=hidden) as progress:
        task = progress.add_task("classifying", total=None)
        return predict_folder(
            asked.model,
            asked.source,
            asked.out,
            tracking=tracking,
            top_k=asked.top_k,
            engine="here" if asked.engine == "local" else asked.engine,
            workers=asked.workers,
            tick=lambda done, total: progress.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    job(main)
