"""Classify a picture, or a folder of pictures, with a packaged model.

    python jobs/predict.py --model models:/NAME@champion --source cat.jpg
    python jobs/predict.py --model models:/NAME@champion --source FOLDER --out answers.parquet
    python jobs/predict.py --model PACKAGE_FOLDER --source FOLDER --out answers.csv --workers 4

For one picture it prints the classes. For a folder it writes a file with a row per picture: path,
class, probability, the top classes with theirs, and why, where a picture could not be read. Files
that are no pictures are counted. The same command goes on after an interruption. From 2,000
pictures on it is a Ray Data job, on the cluster at RAY_ADDRESS (whose nodes must see FOLDER), else
on this machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ftlib.checks import check_model, nearest_path
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import AtLeastOne
from ftlib.flags import FormerValue, Metavar
from ftlib.settings import ConfigError
from ftlib.text import percent, printable

if TYPE_CHECKING:
    from ftlib.deploy.batch_predict import PredictOptions


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    model: Annotated[str, Metavar("URI")]
    """models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a package's folder."""
    source: Annotated[str, Metavar("PATH")]
    """A picture, or a folder with pictures at any depth."""
    out: Annotated[str, Metavar("FILE")] = ""
    """A .parquet or .csv file for the answers; for one picture it may be left out."""
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
    check_model(asked.model, asked.tracking_uri)
    source = Path(asked.source).expanduser()
    if not source.exists():
        raise ConfigError(
            f"--source {asked.source}: there is no such folder or file.{nearest_path(asked.source)}"
        )
    if not asked.out and source.is_dir():
        raise ConfigError("--out is missing: name a .parquet or .csv file for the folder's answers")
    with reporting(asked) as result:
        if asked.out:
            result.update(classify_folder(asked, source))
        else:
            result.update(classify_file(asked, source))


def predict_options(asked: Options) -> "PredictOptions":
    from ftlib.deploy.batch_predict import PredictOptions
    from ftlib.packaging.package import locate

    _, tracking = locate(asked.model, asked.tracking_uri)
    return PredictOptions(tracking, asked.top_k, asked.engine, asked.workers)


def classify_file(asked: Options, source: Path) -> dict[str, Any]:
    """Print the classes of one picture."""
    from ftlib.deploy.batch_predict import PredictError, predict_file

    row = predict_file(asked.model, source, predict_options(asked))
    if row["error"]:
        raise PredictError(f"{source}: {row['error']}")
    names = [printable(name) for name in row["top_classes"]]
    width = max(map(len, names))
    print(f"{printable(str(source))}: {names[0]}, {percent(row['probability'], 1)}")
    for name, probability in zip(names, row["top_probabilities"]):
        bar = "#" * round(40 * probability)
        print(f"  {name:{width}}  {percent(probability, 1):>7}  {bar}".rstrip())
    return row


def classify_folder(asked: Options, source: Path) -> dict[str, Any]:
    """Write the answers of a folder."""
    from ftlib.console import Progress
    from ftlib.deploy.batch_predict import pictures_of, predict_folder

    found = pictures_of(source)
    with Progress(
        len(found.files), "classifying", unit="pictures", shown=not asked.quiet
    ) as progress:
        answers = predict_folder(
            asked.model,
            source,
            asked.out,
            predict_options(asked),
            files=found.files,
            tick=progress.update,
        )
    unreadable = answers.num_rows - answers["error"].null_count
    refused = ""
    if unreadable:
        refused = f", {unreadable:,} of which could not be read (their error says why)"
    print(f"{asked.out}: {answers.num_rows:,} pictures{refused}")
    if found.left_aside:
        print(found.left_aside_text())
    return {
        "file": asked.out,
        "pictures": answers.num_rows,
        "unreadable": unreadable,
        "left_aside": dict(found.left_aside),
    }


if __name__ == "__main__":
    job(main)
