"""The writer that training code holds: small, picklable, never raises, never waits for a server.

On the driver's machine it appends to the run's journal itself. Elsewhere it hands each line to the tracker actor on the driver's node
(`ftlib.track.tracker_actor`) without waiting for an answer. Nothing here imports MLflow or torch.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from ftlib.track.journal import Journal, encode, machine, now_ms
from ftlib.track.redact import redact, redact_value

log = logging.getLogger("ftlib.track")

LONGEST_TAG = 8000
LONGEST_PARAM = 6000
LARGEST_SHIPPED = 64 << 20
"""Bytes of an artifact that a writer on another machine still sends to the driver's."""
LARGEST_COPIED = 16 << 20
"""Bytes of an artifact that is copied into the journal's folder where it cannot be linked."""

_warned: set[str] = set()


def warn_once(message: str, *args: object) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning(message, *args)


def _never_raises(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            warn_once(
                f"tracking: {method.__name__} could not be recorded (%s: %s); training goes on",
                type(error).__name__,
                error,
            )

    return guarded


@dataclass(frozen=True)
class JournalLocation:
    """Where a run's journal is, and how to reach it from any process of the job."""

    folder: str
    machine: str
    actor: Any = None
    """Handle of the tracker actor, or None where every process is on the driver's machine."""

    @property
    def here(self) -> bool:
        return self.machine == machine() and os.access(self.folder, os.W_OK)


_journals: dict[str, Journal] = {}
_journals_lock = threading.Lock()


def journal_at(path: Path) -> Journal:
    """This process's appender for a file: one for all writers, so that lines waiting in memory keep their order."""
    with _journals_lock:
        return _journals.setdefault(f"{os.getpid()}:{path}", Journal(path))


def forget_journal(path: Path) -> None:
    """Closes the appender for a file."""
    with _journals_lock:
        journal = _journals.pop(f"{os.getpid()}:{path}", None)
    if journal is not None:
        journal.close()


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {str(k): redact_value(str(k), v)[:LONGEST_TAG] for k, v in tags.items() if v is not None}


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    return {str(k): redact_value(str(k), v)[:LONGEST_PARAM] for k, v in params.items()}


@dataclass(frozen=True)
class Writer:
    """Records metrics, tags, params, texts and files of one run; see the module's docstring."""

    place: JournalLocation
    name: str
    """File name of the run's journal."""
    wake: threading.Event | None = field(default=None, compare=False, repr=False)
    """Set to have the delivering thread of this process look at once."""

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "name": self.name, "wake": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)

    def put(self, record: dict[str, Any]) -> None:
        """Append a record, with the time if it has none."""
        line = encode({**record, "t": record.get("t") or now_ms()})
        if self.place.here:
            journal_at(Path(self.place.folder) / self.name).append(line)
        elif self.place.actor is not None:
            self.place.actor.append.remote(self.name, line)
        else:
            warn_once(
                "tracking: this process is on another machine than the driver and there is no tracker actor; its metrics are lost"
            )
        if self.wake is not None:
            self.wake.set()

    @_never_raises
    def metrics(self, values: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Numbers at a step. NaN and infinities are kept; what is no number is left out with a warning.

        Args:
            at: the point's time in milliseconds, now if left out. MLflow keeps a point that it is sent twice once if the times are the same,
                so whoever may repeat an epoch after a crash should remember the time with the epoch.
        """
        numbers_ = {}
        for key, value in values.items():
            if isinstance(value, numbers.Real) or hasattr(value, "__float__"):
                numbers_[str(key)] = float(value)
            else:
                warn_once(
                    f"tracking: metric {key} is no number (%s) and is left out",
                    type(value).__name__,
                )
        if numbers_:
            finite = {
                k: v if math.isfinite(v) else str(v) for k, v in numbers_.items()
            }  # JSON has no NaN
            self.put(
                {
                    "op": "metrics",
                    "step": int(step),
                    "values": finite,
                    "t": int(at) if at else now_ms(),
                }
            )

    @_never_raises
    def tags(self, values: Mapping[str, Any]) -> None:
        """Tags; None leaves a tag as it is."""
        self.put({"op": "tags", "values": clean_tags(values)})

    @_never_raises
    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters. MLflow keeps the first value of each."""
        self.put({"op": "params", "values": clean_params(values)})

    @_never_raises
    def text(self, text: str, file: str) -> None:
        """`text` as an artifact at the path `file` (such as run.json or report/index.html)."""
        self.put({"op": "text", "file": file, "text": redact(text)})

    @_never_raises
    def json(self, value: Any, file: str) -> None:
        """`value` as a JSON artifact."""
        self.put(
            {"op": "text", "file": file, "text": redact(json.dumps(value, indent=2, default=str))}
        )

    @_never_raises
    def artifact(self, local_path: str | os.PathLike[str], folder: str = "") -> None:
        """A file, or all that is in a folder, as artifacts below `folder`.

        The file is linked (or copied, up to 16 MB) into the journal's folder, so it may be deleted after the call; a larger one on another
        file system, and a folder, must stay where they are until they have been delivered.
        """
        path = Path(local_path).absolute()
        if self.place.here:
            self.put(
                {
                    "op": "artifact",
                    "path": str(_kept(path, Path(self.place.folder))),
                    "name": path.name,
                    "folder": folder,
                }
            )
            return
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            below = (
                folder
                if file == path
                else "/".join(
                    filter(None, [folder, file.parent.relative_to(path).as_posix().strip(".")])
                )
            )
            if file.stat().st_size > LARGEST_SHIPPED or self.place.actor is None:
                warn_once(
                    f"tracking: {file.name} is on another machine than the driver and too large to send; put it on shared storage or log it from the driver"
                )
                continue
            self.place.actor.store.remote(self.name, file.name, file.read_bytes(), below, now_ms())

    @_never_raises
    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """The data set the run used, shown by MLflow beside its metrics. `context` is training, tuning or validation."""
        self.put(
            {
                "op": "dataset",
                "name": name,
                "digest": digest[:36],
                "source": redact(source),
                "context": context,
            }
        )

    @_never_raises
    def flush(self, seconds: float = 5.0) -> None:
        """Wait until lines sent to the tracker actor are in the journal. At once on the driver's machine."""
        if not self.place.here and self.place.actor is not None:
            from ftlib.track.tracker_actor import wait_for

            wait_for(self.place.actor, seconds)


def _kept(path: Path, folder: Path) -> Path:
    """A link to (or copy of) a file that outlives it, or the path itself."""
    if not path.is_file() or folder in path.parents:
        return path
    kept = folder / "files" / uuid.uuid4().hex[:12] / path.name
    kept.parent.mkdir(parents=True)
    try:
        os.link(path, kept)
    except OSError:
        if path.stat().st_size > LARGEST_COPIED:
            kept.parent.rmdir()
            return path
        shutil.copyfile(path, kept)
    return kept
