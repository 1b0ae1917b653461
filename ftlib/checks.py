"""Quick answers to typing errors, before torch, Ray or MLflow is imported.

What these checks let through is checked again, fully, by the code that uses it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ftlib.config import Run
from ftlib.paths import data_path, home, runs_root, space_names
from ftlib.runs import NOT_A_STAGE, best_of_stage
from ftlib.settings import ConfigError, nearest
from ftlib.storage import folders, is_remote

LOCAL_MODEL = "a package's folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model"


def check_recipe(run: Run) -> None:
    """Raise ConfigError or DataError for a data set, model or starting run that does not exist."""
    manifest = check_data(run.data.path)
    _check_architecture(run.model.arch)
    if manifest is not None and not run.name:  # a run that has begun keeps its starting weights
        _check_stage(run, str(manifest["digest"]))


def check_data(name_or_path: str) -> dict[str, object] | None:
    """The manifest of a prepared data set on this machine; None for one at an address.

    Raises DataError or ConfigError, with the nearest name where there is no such set.
    """
    from ftlib.data.shards import DataError, read_manifest

    path = data_path(name_or_path)
    if is_remote(path):
        return None
    try:
        return read_manifest(path)
    except DataError as error:
        near = "" if Path(path).exists() else nearest(name_or_path, sorted(data_sets()))
        raise DataError(f"{error}.{near}" if near else str(error)) from None


def data_sets() -> list[str]:
    """Names of the data sets below $FTLIB_HOME/data."""
    root = home() / "data"
    return sorted(name for name in folders(str(root)) if (root / name / "manifest.json").is_file())


def check_model_folder(address: str) -> None:
    """Raise ConfigError if `address` is a folder that does not exist. Others are not looked at."""
    if address.startswith(("models:/", "runs:/", "mlflow-artifacts:/")) or is_remote(address):
        return
    if not Path(address).expanduser().is_dir():
        here = [str(path) for path in Path().glob("*") if path.is_dir()]
        raise ConfigError(
            f"--model {address}: there is no such folder.{nearest(address, here)} "
            f"It needs {LOCAL_MODEL}"
        )


def _check_architecture(arch: str) -> None:
    known = torchvision_names()
    if known and "/" not in arch and arch not in known:
        raise ConfigError(
            f"model.arch = {arch}: torchvision has no such classifier.{nearest(arch, known)}"
        )


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers, read from its source, which takes no import of torch.

    Empty where they cannot be read.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    names: list[str] = []
    for file in (Path(spec.origin).parent / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        names += re.findall(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", text, re.MULTILINE)
    return sorted(names)


def _check_stage(run: Run, digest: str) -> None:
    stage, root = run.model.init_from, runs_root(run)
    if stage in NOT_A_STAGE or ":" in stage or "/" in stage or is_remote(root):
        return
    best_of_stage(stage, run.data.path, digest, root)


def check_space(name: str) -> None:
    """Raise ConfigError, with the nearest name, if there is no space `name`."""
    if name.endswith(".py"):
        known, there = [], Path(name).is_file()
    else:
        known = space_names()
        there = name in known
    if not there:
        raise ConfigError(
            f"unknown space {name}.{nearest(name, known)} There are: {', '.join(space_names())}. "
            "A path to a .py file works too"
        )
