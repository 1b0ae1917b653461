"""Where things are: `$FTLIB_HOME` (default ~/ftlib) holds data/, runs/, mlflow.db and more.

Also the folders of jobs and spaces, the command of a job, and environment variables for a while.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ftlib
from ftlib.config import Run
from ftlib.settings import ConfigError, nearest
from ftlib.storage import folders, is_remote, join, read_file
from ftlib.text import hide_password


def home() -> Path:
    """`$FTLIB_HOME` as an absolute path, `~/ftlib` where it is not set. It need not exist yet."""
    return Path(os.path.abspath(Path(os.environ.get("FTLIB_HOME") or "~/ftlib").expanduser()))


def jobs_folder() -> Path:
    """The folder of the jobs: inside the package in an installed wheel, beside it in a checkout."""
    return _beside_or_inside("jobs")


def spaces_folder() -> Path:
    """The folder of the tune spaces, found as `jobs_folder` finds the jobs."""
    return _beside_or_inside("tune_spaces")


def space_names() -> list[str]:
    """Names of the tune spaces that are there."""
    return sorted(path.stem for path in spaces_folder().glob("[!_]*.py"))


def _beside_or_inside(name: str) -> Path:
    package = Path(ftlib.__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def job_command(job: str, options: str = "") -> str:
    """A command line of a job that works where it is pasted: in this folder, with this Python.

    It is `ftlib JOB` where that started this process, else `python jobs/JOB.py` with as much of
    both paths as this shell needs. A job of a cluster prints what works in a checkout.
    """
    if Path((sys.orig_argv[1:2] or [""])[0]).name == "ftlib":
        words = [_typed("ftlib", Path(sys.executable).with_name("ftlib")), job]
    else:
        file = jobs_folder() / f"{job}.py"
        words = [_typed("python", Path(sys.executable)), _shown(file)]
    if os.environ.get("RAY_ADDRESS"):
        words = ["python", f"jobs/{job}.py"]
    return " ".join(filter(None, [*map(shlex.quote, words), options]))


def _typed(name: str, program: Path) -> str:
    """`name` where the shell finds `program` by it, else the program's path."""
    found = shutil.which(name)
    return name if found and Path(os.path.abspath(found)) == program else _shown(program)


def _shown(path: Path) -> str:
    """The path, relative where it is below the current folder."""
    path = Path(os.path.abspath(path))
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def absolute(path: str) -> str:
    """An address as it is; a folder as an absolute path.

    Ray's workers have another working folder than the user's shell.
    """
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(Path(path.removeprefix("file://")).expanduser())


def data_path(name_or_path: str) -> str:
    """The place of a prepared data set from what the user wrote.

    A bare name lies below $FTLIB_HOME/data; all else is a path or an address. Raises ConfigError
    for an empty name.
    """
    if not name_or_path:
        raise ConfigError(
            "data.path is empty: name a prepared data set with --data.path. "
            f"`{job_command('prepare', '--source FOLDER --out NAME')}` makes one"
        )
    if is_remote(name_or_path) or os.sep in name_or_path or name_or_path.startswith((".", "~")):
        return absolute(name_or_path)
    return str(home() / "data" / name_or_path)


def runs_root(run: Run) -> str:
    """The folder or address that holds the run's folder: checkpoint.storage or $FTLIB_HOME/runs."""
    return absolute(run.checkpoint.storage) if run.checkpoint.storage else str(home() / "runs")


def local_run_folder(run_dir: str) -> Path:
    """Where this machine keeps a run's local files, such as its tracking journal.

    The run's own folder, or one below $FTLIB_HOME/runs where the run is on an object store.
    """
    name = run_dir.rstrip("/").rsplit("/", 1)[-1]
    return home() / "runs" / name if is_remote(run_dir) else Path(run_dir)


def run_folder(name_or_folder: str, storage: str = "") -> str:
    """A run's folder or address from its name below `storage`, or from the folder itself.

    `storage` is $FTLIB_HOME/runs by default. Raises ConfigError, with the nearest name, when there
    is no such run.
    """
    root = absolute(storage) if storage else str(home() / "runs")
    place = absolute(name_or_folder) if "/" in name_or_folder else join(root, name_or_folder)
    if read_file(join(place, "run.json")) is None:
        known = sorted(folders(root))
        raise ConfigError(
            f"there is no run {hide_password(name_or_folder)}: {hide_password(place)} has no "
            f"run.json.{nearest(name_or_folder.rstrip('/').rsplit('/', 1)[-1], known)}"
        )
    return place


def run_words(run_dir: str) -> str:
    """How a command names a run: by its name below $FTLIB_HOME/runs, else by its place."""
    name = run_dir.rstrip("/").rpartition("/")[2]
    return shlex.quote(name if run_dir.rstrip("/") == str(home() / "runs" / name) else run_dir)


@contextlib.contextmanager
def environment_variables(**values: str) -> Iterator[None]:
    """Set environment variables of this process, and of those it starts, within a `with` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
