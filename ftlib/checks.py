"""Quick answers to typing errors, before torch, Ray or MLflow is imported.

What these checks let through is checked again, fully, by the code that uses it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import os
import re
import sqlite3
from pathlib import Path

from ftlib.config import Run
from ftlib.paths import data_path, home, runs_root, space_names
from ftlib.runs import NOT_A_STAGE, best_of_stage
from ftlib.settings import ConfigError, nearest
from ftlib.storage import folders, is_remote

STORE_VARIABLES = {"MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"}
LOCAL_MODEL = "a package's folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model"


def check_recipe(run: Run) -> None:
    """Raise ConfigError or DataError for a data set, model or starting run that does not exist."""
    manifest = check_data(run.data.path)
    _check_architecture(run.model.arch)
    if manifest is not None and not run.name:  # a run that has begun keeps its starting weights
        _check_stage(run, str(manifest["digest"]))


def check_cluster(run: Run) -> None:
    """Raise LaunchError where the run cannot join the cluster at RAY_ADDRESS."""
    address = os.environ.get("RAY_ADDRESS")
    if address and run.cluster.local != "true":
        from ftlib.launch import ray_address

        ray_address.check(address)


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
        raise DataError(str(error).replace(". Prepare", f".{near} Prepare", 1)) from None


def data_sets() -> list[str]:
    """Names of the data sets below $FTLIB_HOME/data."""
    root = home() / "data"
    return sorted(name for name in folders(str(root)) if (root / name / "manifest.json").is_file())


def check_model(address: str, tracking: str = "") -> None:
    """Raise ConfigError if `address` is a folder that does not exist, or no registered model.

    `tracking` is the address of the store that was asked for. Registered models are looked up in
    $FTLIB_HOME/mlflow.db where that is the store; other addresses are not looked at.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@(.+)|/(\d+))", address)
    if found and not (tracking or STORE_VARIABLES & set(os.environ)):
        _check_registered(address, found[1], found[2] or "")
    if address.startswith(("models:/", "runs:/", "mlflow-artifacts:/")) or is_remote(address):
        return
    if not Path(address).expanduser().is_dir():
        here = [str(path) for path in Path().glob("*") if path.is_dir()]
        raise ConfigError(
            f"--model {address}: there is no such folder.{nearest(address, here)} "
            f"It needs {LOCAL_MODEL}"
        )


def _check_registered(address: str, name: str, alias: str) -> None:
    """Raise ConfigError if the home's own database has no such model, or no such alias of it."""
    database = home() / "mlflow.db"
    if not database.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as open_:
            names = [n for (n,) in open_.execute("SELECT name FROM registered_models")]
            of_name = "SELECT alias FROM registered_model_aliases WHERE name = ?"
            aliases = [a for (a,) in open_.execute(of_name, [name])]
    except sqlite3.Error:  # a database of another MLflow, or one in use: MLflow says what is wrong
        return
    if name not in names:
        raise ConfigError(
            f"{address}: no model {name} is registered in {database}.{nearest(name, names)} "
            f"There are: {', '.join(sorted(names)) or 'none'}"
        )
    if alias and alias not in aliases:
        raise ConfigError(
            f"{address}: {name} has no alias {alias}.{nearest(alias, aliases)} "
            f"There are: {', '.join(sorted(aliases)) or 'none'}"
        )


def _check_architecture(arch: str) -> None:
    library, _, name = arch.rpartition("/")
    name = name.partition(".")[0] if library == "timm" else name
    if library not in ("", "timm"):
        return
    known, text = _registered_names(library or "torchvision")
    # timm also takes names that it has given up, and lists them in quotes.
    if known and name not in known and f"'{name}'" not in text:
        near = nearest(arch, [f"{library}/{n}" for n in known] if library else known)
        raise ConfigError(
            f"model.arch = {arch}: {library or 'torchvision'} has no such classifier.{near}"
        )


def torchvision_names() -> list[str]:
    """Names of torchvision's classifiers. Empty where its source cannot be read."""
    return _registered_names("torchvision")[0]


@functools.cache
def _registered_names(library: str) -> tuple[list[str], str]:
    """(names of the library's classifiers, all text that they are read from).

    They are read from its source, which takes no import of torch.
    """
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return [], ""
    files = (Path(spec.origin).parent / "models").glob("*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    pattern = r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\("
    return sorted(re.findall(pattern, text, re.MULTILINE)), text


def nearest_path(path: str) -> str:
    """' Did you mean X?' for a path that does not exist, from what lies beside it; or ''."""
    asked = Path(path).expanduser()
    with contextlib.suppress(OSError):
        names = difflib.get_close_matches(asked.name, os.listdir(asked.parent), n=1)
        return f" Did you mean {asked.parent / names[0]}?" if names else ""
    return ""


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
