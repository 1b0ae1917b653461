"""Tags that say where a run comes from: code, data, user, command and job."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ftlib.config import Run
from ftlib.track.redact import redact


@lru_cache(maxsize=4)
def git_state(folder: Path) -> dict[str, str]:
    """Commit, branch and whether files differ from it; empty outside a checkout or without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = git("rev-parse", "HEAD")
        if commit:
            dirty = git("status", "--porcelain", "--untracked-files=no")
            return {
                "mlflow.source.git.commit": commit,
                "mlflow.source.git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
                "git.dirty": str(bool(dirty)).lower(),
            }
    return {}


def command_line() -> str:
    """The command as it was typed, as far as Python knows, without secrets."""
    return redact(shlex.join([Path(sys.executable).name, *sys.argv]))


def data_tag(name: str, digest: str) -> str:
    """`name@digest8`, which groups runs by the exact data they saw."""
    return f"{name}@{digest[:8]}"


def lineage_tags() -> dict[str, str]:
    """Code, user, command and Ray job."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "JOB",
        "command": command_line(),
        **git_state(Path(__file__).parent),
    }
    with contextlib.suppress(Exception):  # no such user, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    if job := os.environ.get("RAY_JOB_SUBMISSION_ID", ""):
        tags["ray.job_id"] = job
    return tags


def run_tags(
    run: Run,
    *,
    kind: str = "train",
    dataset: tuple[str, str] | None = None,
    sweep: str = "",
    trial: str = "",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """A run's tags.

    Args:
        kind: train, trial, sweep, comparison or eval.
        dataset: the data set's name and digest.
        sweep: the sweep a trial belongs to.
        trial: the trial's id within it.
        extra: more tags, which win.
    """
    tags = {
        "kind": kind,
        "stage": run.stage,
        "arch": run.model.arch,
        "seed": str(run.seed),
        "sweep": sweep,
        "trial": trial,
        "promoted_from": run.promoted_from,
    }
    if dataset is not None:
        tags["dataset"] = data_tag(*dataset)
    tags |= lineage_tags()
    tags |= {k: str(v) for k, v in (extra or {}).items()}
    return {k: v for k, v in tags.items() if v}
