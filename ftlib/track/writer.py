"""The writer that training code holds: small, picklable, never raises, never waits for a server.

On the driver's machine it appends to the run's journal itself. Elsewhere it sends each line to the
tracker actor on the driver's node (`ftlib.track.tracker_actor`) without waiting for an answer.
Imports neither MLflow, Ray nor torch.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftlib.clock import now_ms
from ftlib.process_identity import machine_id
from ftlib.track.journal import Record, State, encode, journal_at
from ftlib.track.redact import redact, redact_value

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("ftlib.track")

MAX_TAG_LENGTH = 8000
MAX_PARAM_LENGTH = 6000
MAX_SENT_BYTES = 64 << 20
"""Largest artifact that a writer on another machine sends to the driver's machine."""
MAX_COPIED_BYTES = 16 << 20
"""Largest artifact that is copied into the journal's folder where it cannot be linked."""

_warned: set[str] = set()


def warn_once(message: str, *args: object) -> None:
    """Log a warning the first time this process gives the message."""
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


class RemoteJournal(Protocol):
    """The way to the journals for processes on other machines. Calls do not wait for an answer."""

    def append(self, name: str, line: bytes) -> None:
        """Append an encoded record to the journal file `name`."""

    def store(self, name: str, file: str, data: bytes, folder: str, time_ms: int) -> None:
        """Keep the bytes of an artifact and record it."""

    def state(self, name: str, seconds: float) -> State:
        """The state of the journal `name`; a fresh one if there is no answer in time."""

    def flush(self, seconds: float) -> None:
        """Wait until earlier calls of this process have been carried out, at most `seconds`."""


@dataclass(frozen=True)
class JournalLocation:
    """Where a job's journals are, and how any process of the job reaches them."""

    folder: str
    machine: str
    """`machine_id()` of the driver's machine."""
    remote: RemoteJournal | None = None
    """None where every process is on the driver's machine."""
    owner: str = ""
    """Token of the launch, for each line that its processes write."""

    @property
    def is_local(self) -> bool:
        """Whether this process can write the files itself."""
        return self.machine == machine_id() and os.access(self.folder, os.W_OK)


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them: text, without secrets, cut to its limit, None left out."""
    given = {str(k): v for k, v in tags.items() if v is not None}
    return {k: redact_value(k, v)[:MAX_TAG_LENGTH] for k, v in given.items()}


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow takes them: text, without secrets, cut to its limit."""
    return {str(k): redact_value(str(k), v)[:MAX_PARAM_LENGTH] for k, v in params.items()}


@dataclass(frozen=True)
class Writer:
    """Records metrics, tags, parameters, texts and files of one run."""

    location: JournalLocation
    name: str
    """File name of the run's journal."""
    wake: threading.Event | None = field(default=None, compare=False, repr=False)
    """Set after each record, so that the delivery thread of this process looks at once."""

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "name": self.name, "wake": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)

    def put(self, record: Record) -> None:
        """Append a record; it gets the present time if it has none."""
        record = {**record, "t": record.get("t") or now_ms()}
        if self.location.owner:
            record["owner"] = self.location.owner
        line = encode(record)
        if self.location.is_local:
            journal_at(Path(self.location.folder) / self.name).append(line)
        elif self.location.remote is not None:
            self.location.remote.append(self.name, line)
        else:
            warn_once(
                "tracking: this process runs on another machine than the driver and there is no "
                "tracker actor; its metrics are lost"
            )
        if self.wake is not None:
            self.wake.set()

    @_never_raises
    def metrics(self, values: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Record numbers at a step. NaN and infinities are kept; other values warn once.

        Args:
            at: the points' time in milliseconds since 1970; now if left out. MLflow stores a point
                that it is sent twice once if the times are equal, so code that may repeat an epoch
                after a crash keeps the time with the epoch.
        """
        points: dict[str, float | str] = {}
        for key, value in values.items():
            if isinstance(value, numbers.Real) or hasattr(value, "__float__"):
                number = float(value)
                points[str(key)] = number if math.isfinite(number) else str(number)
            else:
                warn_once(
                    f"tracking: metric {key} is no number (%s) and is left out",
                    type(value).__name__,
                )
        if points:
            time_ms = int(at) if at else now_ms()
            self.put({"op": "metrics", "step": int(step), "values": points, "t": time_ms})

    @_never_raises
    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; None leaves a tag as it is."""
        self.put({"op": "tags", "values": clean_tags(values)})

    @_never_raises
    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters. MLflow keeps the first value of each."""
        self.put({"op": "params", "values": clean_params(values)})

    @_never_raises
    def text(self, text: str, file: str) -> None:
        """Store `text` as an artifact at the path `file`, such as run.json."""
        self.put({"op": "text", "file": file, "text": redact(text)})

    @_never_raises
    def json(self, value: object, file: str) -> None:
        """Store `value` as a JSON artifact."""
        self.text(json.dumps(value, indent=2, default=str), file)

    @_never_raises
    def artifact(self, local_path: str | os.PathLike[str], folder: str = "") -> None:
        """Store a file, or all files of a folder, as artifacts below `folder`.

        A file is linked (or copied, up to 16 MB) into the journal's folder, so it may be deleted
        after the call. A larger file on another file system, and a folder, must stay where they are
        until they have been delivered.
        """
        path = Path(local_path).absolute()
        if self.location.is_local:
            kept = _keep(path, Path(self.location.folder))
            self.put({"op": "artifact", "path": str(kept), "name": path.name, "folder": folder})
        elif path.is_file():
            self._send(path, folder)
        else:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                below = file.parent.relative_to(path).as_posix().strip(".")
                self._send(file, "/".join(filter(None, [folder, below])))

    @_never_raises
    def image(self, image: Image, key: str, step: int) -> None:
        """Store a picture of a step, which MLflow shows with a slider over the steps of its `key`.

        The file names are those of `mlflow.log_image`, but for a time and a random part: the same
        step given again replaces its picture.
        """
        name = f"{key}+step+{step}+timestamp+{step}+{uuid.uuid5(uuid.NAMESPACE_OID, key)}"
        with tempfile.TemporaryDirectory() as folder:
            full, small = Path(folder, f"{name}.png"), Path(folder, f"{name}+compressed.webp")
            image.quantize(256).save(full, optimize=True)
            image.save(small, quality=80)
            self.artifact(full, "images")
            self.artifact(small, "images")
        self.tags({"mlflow.loggedImages": "True"})

    def _send(self, file: Path, folder: str) -> None:
        remote = self.location.remote
        if remote is None or file.stat().st_size > MAX_SENT_BYTES:
            warn_once(
                f"tracking: {file.name} is on another machine than the driver and too large to "
                "send; write it to shared storage or log it from the driver"
            )
            return
        remote.store(self.name, file.name, file.read_bytes(), folder, now_ms())

    @_never_raises
    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Record the data set of the run. `context` is training, tuning or validation."""
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
        """Wait until sent lines are in the journal; returns at once on the driver's machine."""
        if not self.location.is_local and self.location.remote is not None:
            self.location.remote.flush(seconds)


def _keep(path: Path, folder: Path) -> Path:
    """A link to (or copy of) a file that outlives it, or the path itself."""
    if not path.is_file() or folder in path.parents:
        return path
    kept = folder / "files" / uuid.uuid4().hex[:12] / path.name
    kept.parent.mkdir(parents=True)
    try:
        os.link(path, kept)
    except OSError:
        if path.stat().st_size > MAX_COPIED_BYTES:
            kept.parent.rmdir()
            return path
        shutil.copyfile(path, kept)
    return kept
