"""Find a recipe by name: a JSON file, or the `Run` of a job such as jobs/phase2.py.

For every job that takes a recipe as a word.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib.config import Run
from ftlib.paths import data_path, jobs_folder
from ftlib.settings import ConfigError, from_json, nearest, override

SAMPLE = "sample-"
"""`sample-phase2` is PHASE2 of jobs/sample.py: the small version of the recipe on the digits."""


def available() -> list[str]:
    """Names that `load` takes, less paths."""
    defined = {path.stem: _constants(path) for path in jobs_folder().glob("[!_]*.py")}
    jobs = sorted(job for job, names in defined.items() if job.upper() in names)
    small = [SAMPLE + job for job in jobs if job.upper() in defined.get("sample", ())]
    files = {path.stem for folder in _json_folders() for path in folder.glob("*.json")}
    return jobs + small + sorted(files)


def _constants(path: Path) -> list[str]:
    """Names in capitals that a job assigns; read from its text, which takes no import."""
    return re.findall(r"^([A-Z0-9_]+)(?:: \w+)? *=", path.read_text("utf-8"), re.MULTILINE)


def load(name: str, settings: Sequence[str] = ()) -> Run:
    """The recipe `name`, with `settings` such as "mix.off_epochs=2" applied in order.

    `name` is that of a job (phase2), of the sample (sample-phase2), of a file in recipes/, or the
    path of a .json file. Raises ConfigError with the nearest name, or with what is wrong in the
    file or in a setting.
    """
    return override(_load(name), dict(map(_setting, settings)))


def _load(name: str) -> Run:
    for path in (Path(name).expanduser(), *(f / f"{name}.json" for f in _json_folders())):
        if path.suffix == ".json" and path.is_file():
            return _from_file(name, path)
    from_sample = name.startswith(SAMPLE)
    job = "sample" if from_sample else name.replace("-", "_")
    path = jobs_folder() / f"{job}.py"
    if job.isidentifier() and path.is_file():
        wanted = name.removeprefix(SAMPLE).upper().replace("-", "_")
        found = {k: v for k, v in vars(_module(job, path)).items() if isinstance(v, Run)}
        if wanted in found:
            return found[wanted]
        if len(found) == 1 and not from_sample:
            return next(iter(found.values()))
    known = available()
    near = nearest(name, known)
    if name and (Path(data_path(name)) / "manifest.json").is_file():
        near = f" It is a data set: name a recipe first, then --data.path {name}."
    raise ConfigError(
        f"unknown recipe {name}.{near} There are: {', '.join(known)}. "
        "A path to a .json file (as --show prints it) works too"
    )


def _json_folders() -> tuple[Path, ...]:
    """Folders with recipes in JSON: recipes/ here, where promotion writes, and of the checkout."""
    return Path("recipes"), jobs_folder().parent / "recipes"


def _from_file(name: str, path: Path) -> Run:
    try:
        return from_json(Run, path.read_text(encoding="utf-8"))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name}: {error}") from None


def _module(job: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"jobs.{job}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _setting(text: str) -> tuple[str, Any]:
    """("mix.off_epochs", 2) from "mix.off_epochs=2". Values are JSON, or else plain text."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text}: needs PATH=VALUE, such as --set mix.off_epochs=2")
    path = path.strip().replace("-", "_")
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value
