"""The files of a sweep: what was decided, tried and found, in small JSON files.

    <root>/<sweep>/sweep.json            recipe, space and search; written once
    <root>/<sweep>/trials/t03/trial.json the trial's values, its score by epoch, and its outcome

A trial's file is written before the trial starts and after each epoch, whole and atomically, by the
driver alone. A trial with an outcome is done and is never run again. A restart rebuilds the search
and the early stopping from these files; there are no pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftlib.config import Run
from ftlib.launch.errors import LeaseLostError
from ftlib.settings import ConfigError, Settings
from ftlib.storage import is_remote, join, read_json, write_file

SCHEMA = 1


@dataclass
class Trial:
    """One trial. `number` 0 is the recipe as it is."""

    number: int
    values: dict[str, Any]
    """Dotted path -> value, of the searched settings."""
    origin: str
    """recipe, point, tpe, random or grid. Of a confirmation run: recipe, or the trial's name."""
    outcome: str = ""
    """completed, pruned (stopped early, others score higher) or failed; empty while it is open."""
    reason: str = ""
    """Why it was stopped or failed."""
    history: list[dict[str, float]] = field(default_factory=list)
    """An entry per epoch: epoch, score, seconds, and the metrics of that epoch."""
    result: dict[str, Any] = field(default_factory=dict)
    """What the finished run returned: best score, run folder, MLflow run."""
    seed: int | None = None
    """Seed of a confirmation run. Trials of a sweep keep the recipe's."""

    @property
    def name(self) -> str:
        return f"t{self.number:02d}"

    @property
    def label(self) -> str:
        """Its name in tables: t03; of a confirmation run `t18 s42`."""
        return self.name if self.seed is None else f"{self.origin} s{self.seed}"

    @property
    def score(self) -> float | None:
        """Best score over its epochs, in percent."""
        if "score" in self.result:
            return self.result["score"]
        return max((p["score"] for p in self.history), default=None)

    @property
    def epoch(self) -> int:
        """Last epoch that it has finished, from 1; 0 before the first."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def seconds(self) -> float:
        """Training time, without what crashes and restarts lost."""
        return sum(p.get("seconds", 0.0) for p in self.history)

    def record(self, point: Mapping[str, float]) -> None:
        """Add an epoch. One that was run again after a crash replaces the first."""
        self.history = [p for p in self.history if p["epoch"] < point["epoch"]] + [dict(point)]


class TrialStore:
    """The trials of one sweep or promotion, in memory and on disk."""

    def __init__(self, root: str, name: str):
        self.uri = join(root, name)
        self.name = name
        self.trials: dict[int, Trial] = {}
        self.about: dict[str, Any] = {}
        """Contents of sweep.json."""
        self.token = ""
        """Names this driver in sweep.json, while it holds the lock."""

    def trials_root(self) -> str:
        return join(self.uri, "trials")

    def read(self) -> bool:
        """Load the files. False if there is no such sweep."""
        about = read_json(join(self.uri, "sweep.json"))
        if about is None:
            return False
        if about.get("schema", 0) > SCHEMA:
            raise ConfigError(
                f"{self.uri} was written by a newer ftlib (schema {about['schema']}, this one "
                f"reads {SCHEMA}). Update ftlib, or choose another --name"
            )
        self.about = about
        known = {f.name for f in fields(Trial)}
        self.trials = {}
        for number in range(about.get("proposed", 0)):
            stored = read_json(join(self.trials_root(), f"t{number:02d}", "trial.json"))
            if stored is not None:
                trial = Trial(**{k: v for k, v in stored.items() if k in known})
                if trial.result.get("run_dir", "").endswith(f"/trials/{trial.name}"):
                    # The sweep may have been moved since.
                    trial.result["run_dir"] = join(self.trials_root(), trial.name)
                self.trials[number] = trial
        return True

    def open(
        self,
        identity: Mapping[str, Any],
        more: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start the sweep, or go on with one of the same identity. True when it goes on.

        defaults: path -> default of the recipe's settings. A setting that an earlier version did
            not have counts as its default.
        Raises ConfigError when the name belongs to another sweep, saying what differs.
        """
        if self.read():
            asked = json.loads(json.dumps(identity))
            known = _with_new_settings(self.about["identity"], asked, defaults or {})
            differ = _differences(known, asked)
            if differ:
                kind = self.about.get("kind", "sweep")
                raise ConfigError(
                    f"the name {self.name} is taken by another {kind} ({self.uri}):\n  "
                    + "\n  ".join(differ)
                    + "\nChoose another --name, or repeat that command's settings to go on with it"
                )
            if self.token:
                self._write_about()
            return True
        self.about = {
            "schema": SCHEMA,
            "name": self.name,
            "created": time.time(),
            "proposed": 0,
            "identity": dict(identity),
            **more,
        }
        self._write_about()
        return False

    def save_about(self, **changes: Any) -> None:
        self._fence()
        self.about.update(changes)
        self._write_about()

    def _write_about(self) -> None:
        if self.token:
            self.about["driver"] = self.token
        write_file(join(self.uri, "sweep.json"), json.dumps(self.about, indent=1).encode())

    def _fence(self) -> None:
        """Raise LeaseLostError when another driver has opened the store since this one did: a
        machine that was paused or cut off loses its lock, and object stores have none."""
        if not self.token:
            return
        driver = (read_json(join(self.uri, "sweep.json")) or {}).get("driver")
        if driver != self.token:
            raise LeaseLostError(
                f"{self.name} does not belong to this process any more: another one has gone on "
                "with it while this one was suspended or cut off. This process stops and writes "
                "nothing more"
            )

    def add(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self.save(trial)
        self.save_about(proposed=max(self.about["proposed"], trial.number + 1))

    def save(self, trial: Trial) -> None:
        self._fence()
        text = json.dumps(asdict(trial), indent=1)
        write_file(join(self.trials_root(), trial.name, "trial.json"), text.encode())

    def reopen(self, trial: Trial) -> None:
        """Let a failed trial run again."""
        trial.outcome = trial.reason = ""
        self.save(trial)

    def done(self) -> list[Trial]:
        return [t for t in self.trials.values() if t.outcome]

    def open_trials(self) -> list[Trial]:
        return [t for t in self.trials.values() if not t.outcome]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other drivers out. The system frees the lock when the process ends, however it ends.

        Object stores have no locks: there, and where a lock was lost, the driver that opens the
        store last owns it. Raises ConfigError when the lock is taken.
        """
        self.token = uuid.uuid4().hex
        if is_remote(self.uri):
            yield
            return
        folder = Path(self.uri)
        folder.mkdir(parents=True, exist_ok=True)
        holder = folder / ".lock-holder"
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            by = holder.read_text() if holder.exists() else "elsewhere"
            raise ConfigError(
                f"{self.name} is running already ({by}). Wait for it, or stop it first"
            ) from None
        try:
            write_file(str(holder), f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            lock.release()


def leaf_defaults(run: Run) -> dict[str, Any]:
    """Path -> default of each setting of `run`, as JSON; of those that have one."""
    found: dict[str, Any] = {}

    def visit(node: Settings, prefix: str) -> None:
        for f in fields(node):
            value = getattr(node, f.name)
            if isinstance(value, Settings):
                visit(value, f"{prefix}{f.name}.")
            elif f.default is not MISSING:
                found[prefix + f.name] = f.default
            elif f.default_factory is not MISSING:
                found[prefix + f.name] = f.default_factory()

    visit(run, "")
    return json.loads(json.dumps(found))


def _with_new_settings(
    known: Mapping[str, Any], asked: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """`known` with the recipe's settings that it lacks, at their defaults."""
    if "recipe" not in known:
        return dict(known)
    new = [p for p in asked.get("recipe", {}) if p not in known["recipe"] and p in defaults]
    return {**known, "recipe": {**known["recipe"], **{p: defaults[p] for p in new}}}


def _differences(known: Mapping[str, Any], asked: Mapping[str, Any], where: str = "") -> list[str]:
    found = []
    for key in {**known, **asked}:
        a, b, path = known.get(key), asked.get(key), f"{where}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path} is {a!r} there, {b!r} here")
    return found
