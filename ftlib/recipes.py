"""Finding a recipe by name: a JSON file, one of recipes/, or the `Run` of a job such as jobs/phase2.py. For all jobs that take a recipe as a word."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.config import Run
from ftlib.settings import ConfigError, from_json, nearest, override

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "sample-"
"""`sample-phase2` is PHASE2 of jobs/sample.py, the recipe's small twin on a data set that comes with ftlib."""


def available() -> list[str]:
    jobs = sorted(p.stem for p in (ROOT / "jobs").glob("phase*.py"))
    twin = ROOT / "jobs" / "sample.py"
    defined = (
        re.findall(r"^([A-Z0-9_]+) *=", twin.read_text(encoding="utf-8"), re.MULTILINE)
        if twin.exists()
        else []
    )
    sample = [SAMPLE + name for name in jobs if name.upper() in defined]
    return jobs + sample + sorted(p.stem for p in (ROOT / "recipes").glob("*.json"))


def load(name: str, settings: Sequence[str] = ()) -> Run:
    """The recipe `name` (phase2, sample-phase2, a file of recipes/, or a path to a .json file) with `settings` ("mix.off_epochs=2") put in.

    Raises ConfigError with the nearest name, or what is wrong with the file or a setting.
    """
    return override(_load(name), dict(map(_setting, settings)))


def _load(name: str) -> Run:
    for path in (Path(name).expanduser(), ROOT / "recipes" / f"{name}.json"):
        if path.suffix == ".json" and path.is_file():
            try:
                return from_json(Run, path.read_text(encoding="utf-8"))
            except (ConfigError, UnicodeDecodeError) as error:
                raise ConfigError(f"recipe {name}: {error}") from None
    job, wanted = ("sample", name.removeprefix(SAMPLE)) if name.startswith(SAMPLE) else (name, name)
    path = ROOT / "jobs" / f"{job}.py"
    if not name.endswith(".json") and job.isidentifier() and path.is_file():
        spec = importlib.util.spec_from_file_location(f"jobs.{job}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = {k: v for k, v in vars(module).items() if isinstance(v, Run)}
        for key in (wanted.upper().replace("-", "_"), name.upper().replace("-", "_")):
            if key in found:
                return found[key]
        if len(found) == 1:
            return next(iter(found.values()))
    raise ConfigError(
        f"unknown recipe {name}.{nearest(name, available())} There are: {', '.join(available())}. A path to a .json file (as --show prints it) works too"
    )


def _setting(text: str) -> tuple[str, Any]:
    """("mix.off_epochs", 2) from "mix.off_epochs=2"; values are JSON, and text where they are none."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text}: needs PATH=VALUE, such as --set mix.off_epochs=2")
    path = path.strip().replace("-", "_")
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value
