"""The Python way in: prepare pictures, train a recipe, use the model. Re-exported by `ftlib`.

    import ftlib

    ftlib.prepare("photos/", "pets")
    run = ftlib.train(ftlib.recipe("phase2", data="pets", **{"mix.mixup_alpha": 0.4}))
    run.metrics["best/val_top1"]
    run.predict("cat.jpg")

Everything is the code of the jobs: the same runs, the same resume, the same MLflow store.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ftlib import recipes, storage
from ftlib.config import Run
from ftlib.paths import home, run_folder
from ftlib.settings import from_dict, override

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset
    from ftlib.packaging.package import PackagedModel, Prediction

Picture = bytes | str | Path
"""A picture: the bytes of its file, or the file's path."""


def recipe(name: str, /, data: str = "", **settings: Any) -> Run:
    """A recipe by name, with settings replaced.

    Args:
        name: phase1, finetune, sample-phase2 ... (`ftlib.recipes.available()`), or a .json file.
        data: a prepared data set: the name given to `prepare`, a folder or an address.
        settings: those of the recipe, also by dotted paths: `name="my-run"`,
            `**{"mix.mixup_alpha": 0.4, "train.epochs": 5}`.

    Raises:
        ConfigError: an unknown recipe or setting (with the nearest name), or a wrong value.
    """
    changes = {**({"data.path": data} if data else {}), **settings}
    return override(recipes.load(name), changes)


def prepare(source: str | Path, name: str, **options: Any) -> Dataset:
    """Check the pictures below `source` and write them as the data set `name`, or find it done.

    Args:
        source: a folder, archive, label table or address (docs/data.md), or `digits`.
        name: the data set's name below $FTLIB_HOME/data, or a path.
        options: the options of jobs/prepare.py, such as `val_fraction=0.1`, `layout="table"` or
            `max_side=352`, and keywords of `ftlib.preparation.prepare.prepare`.

    Returns the data set: `.classes`, `.split("train")`, `.digest`.

    Raises:
        ConfigError, DataError: the pictures or options do not fit; the message says what to do.
    """
    import dataclasses

    from ftlib.launch.cluster import connect
    from ftlib.preparation.options import PrepareOptions
    from ftlib.preparation.prepare import prepare as prepare_pictures
    from ftlib.preparation.sources.options import SourceOptions

    def taken(cls: type[Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: options.pop(name) for name in names & options.keys()}

    rules, reading = PrepareOptions(**taken(PrepareOptions)), SourceOptions(**taken(SourceOptions))
    options.setdefault("connect_ray", connect)
    with _errors_name_arguments():
        done = prepare_pictures(str(source), out=name, rules=rules, reading=reading, **options)
    return done.dataset


@contextlib.contextmanager
def _errors_name_arguments() -> Iterator[None]:
    """Errors within speak of arguments and settings, not of the flags of a job."""
    try:
        yield
    except ValueError as error:
        error.args = (_with_arguments(str(error)), *error.args[1:])
        raise


_SWITCHES = {"accept-warnings", "allow-similar-names", "append", "follow-links", "nested"}
_SWITCHES |= {"overwrite", "tiles"}


def _with_arguments(message: str) -> str:
    """`message` with `overwrite=True` for --overwrite and `train.batch_size` for
    --train.batch-size. Commands stay as they are."""

    def argument(found: re.Match[str]) -> str:
        flag = found[1]
        if not flag:
            return found[0]
        name = "name" if flag == "out" else flag.replace("-", "_")
        return f"{name}=True" if flag in _SWITCHES else name

    command = r"`[^`]*`|\S*python\S* \S*jobs/\S+ .*?(?=\. |\n|$)"
    return re.sub(rf"{command}|(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])", argument, message)


def train(run: Run, *, quiet: bool = False) -> TrainedRun:
    """Train `run` to its end, go on with it where it was interrupted, or find it finished.

    Args:
        run: from `recipe`, or any `ftlib.config.Run`.
        quiet: print nothing but problems.

    Raises:
        ValueError: the run cannot start; the message says why and what to do.
        RunFailedError: training failed for good.
    """
    from ftlib.launch.launch import launch

    with _errors_name_arguments():
        return load(launch(run, quiet=quiet).run_dir)


def finetune(
    data: str, *, steps: int = 300, probe: bool = True, quiet: bool = False, **settings: Any
) -> TrainedRun:
    """Fine-tune a pretrained model on the data set `data`, as jobs/finetune.py does.

    Args:
        data: a prepared data set: the name given to `prepare`, a folder or an address.
        steps: optimizer steps that the number of epochs is chosen for; 0 keeps `train.epochs`.
        probe: start with the classifier of a linear probe, which is made where it is missing.
        quiet: print nothing but problems.
        settings: dotted paths into the recipe, as for `recipe`.

    Raises what `train` raises.
    """
    from ftlib.launch.fine_tune import fine_tune

    run = recipe("finetune", data=data, **settings)
    steps = 0 if "train.epochs" in settings else steps
    with _errors_name_arguments():
        return load(fine_tune(run, steps=steps, probe=probe, quiet=quiet).run_dir)


def load(run: str | Path) -> TrainedRun:
    """A finished run by its name below $FTLIB_HOME/runs, or by its folder or address.

    Raises:
        ConfigError: there is no such run, or it is not finished.
    """
    from ftlib.settings import ConfigError

    with _errors_name_arguments():
        folder = run_folder(str(run))
    result = storage.read_json(storage.join(folder, "result.json"))
    if not result or result.get("status") != "completed":
        raise ConfigError(
            f"{run}: this run is not finished. Its command, or ftlib.train, goes on with it"
        )
    record = storage.read_json(storage.join(folder, "run.json")) or {}
    return TrainedRun(folder, from_dict(Run, record["run"]), result, record)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its scores, its files and its model."""

    folder: str
    """Folder or address with checkpoints, best model, report and result.json."""
    recipe: Run = field(repr=False)
    """The settings that it was trained with."""
    result: Mapping[str, Any] = field(repr=False)
    """result.json."""
    record: Mapping[str, Any] = field(repr=False)
    """run.json: settings, data, starting weights, MLflow run."""

    @property
    def name(self) -> str:
        return self.folder.rstrip("/").rsplit("/", 1)[-1]

    @property
    def metrics(self) -> dict[str, float]:
        """best/* and final/* scores in percent, losses as they are."""
        return dict(self.result["metrics"])

    @property
    def history(self) -> list[dict[str, float]]:
        """One entry per epoch, with the training and validation scores."""
        return list(self.result["history"])

    @property
    def passed(self) -> bool:
        """Whether all its success criteria (gates) were met."""
        return all(gate["passed"] for gate in self.result["gates"].get("gates", []))

    @property
    def mlflow_run_id(self) -> str:
        return str((self.record.get("mlflow") or {}).get("run_id", ""))

    @property
    def classes(self) -> list[str]:
        return list(self.record["data"]["classes"])

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is one picture, not a sequence
        self, pictures: Picture, top_k: int = 5
    ) -> Prediction: ...

    @overload
    def predict(self, pictures: Sequence[Picture], top_k: int = 5) -> list[Prediction]: ...

    def predict(
        self, pictures: Picture | Sequence[Picture], top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Classes and calibrated probabilities: a dict for one picture, a list for several.

        The model is the packaged one that `jobs/export.py` writes and `jobs/serve.py` serves, so
        the probabilities are theirs. The first call packages it, which takes some seconds.

        Returns {"class": name, "probability": p, "top": [{"class", "probability"}, ...]} per
        picture.

        Raises:
            PictureError: a picture that cannot be read.
        """
        one = isinstance(pictures, bytes | str | Path)
        asked = [pictures] if one else list(pictures)  # type: ignore[list-item,arg-type]
        read = [Path(p) if isinstance(p, str) else p for p in asked]
        answers = self._packaged.predict(read, params={"top_k": top_k})
        return answers[0] if one else answers

    @cached_property
    def _packaged(self) -> PackagedModel:
        from ftlib.packaging.package import load as load_package

        place = (
            Path(self.folder) if not storage.is_remote(self.folder) else home() / "runs" / self.name
        )
        return load_package(str(self._package_into(place / "package")))

    def _package_into(self, out: Path) -> Path:
        """The folder of the packaged model, written unless it is there already."""
        from ftlib.data.shards import open_dataset
        from ftlib.packaging.package import package
        from ftlib.report.evaluation import load as load_model
        from ftlib.report.evaluation import score

        if (out / "MLmodel").is_file():
            return out
        loaded = load_model(self.folder, "best")
        dataset = open_dataset(self.recipe.data)
        calibration = score(loaded, dataset, limit=2000).calibration
        loaded.model.cpu()
        return package(
            loaded.model,
            loaded.run,
            classes=loaded.classes,
            scores=loaded.about.get("scores", {}),
            temperature=calibration.temperature,
            out=out,
            data=loaded.about.get("data"),
            calibrated_on=calibration.fitted_on,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows for the run."""
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(k)}</td><td>{v:.2f}</td></tr>"
            for k, v in sorted(self.metrics.items())
        )
        return f"<b>{escape(self.name)}</b> {escape(json.dumps(self.passed))}<table>{rows}</table>"
