"""Delivers one run's journal to MLflow: at least once, in order, retrying across failures.

Everything a `RunDelivery` does may be repeated without effect. Metrics carry their recorded time,
parameters and tags their value; the run is looked up by its key before it is made, a model by its
own. A server that fails is asked again later. A record that it will never take is kept in
`<name>.rejected.jsonl`, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftlib.track import experiment_note, views
from ftlib.track.journal import Owners, Record, State, encode, read, read_all, rejected_file
from ftlib.track.logged_model import ModelFolder, log_model
from ftlib.track.store import ensure_experiment, first_line, request_timeout

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run, RunTag

log = logging.getLogger("ftlib.track")

STATUS = {"completed": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
"""MLflow's status for each outcome; a trial that the search stopped early is no failure."""
BATCH_SIZES = {"metrics": 900, "params": 90, "tags": 90}
"""Items in one request; MLflow takes at most 1000, 100 and 100."""
UPLOAD_SECONDS = 300
TRIES = 4
"""Times that a file is tried while the server itself answers, before it is rejected."""
SPEED_NAMES = ("images_per_s", "epoch_s")
"""Last parts of metrics that measure speed: they differ each time a step is repeated."""

ErrorClass = Literal["down", "gone", "reject", "retry"]


class RunGoneError(Exception):
    """The run has been deleted in MLflow."""


class RunMissingError(Exception):
    """The run to be continued has been deleted in MLflow; it is made again from its journal."""


def classify_error(error: Exception) -> ErrorClass:
    """What a failure means for a record.

    `down`: the server fails, ask again later. `gone`: the run has been deleted. `reject`: this
    record will never be taken. `retry`: this record may be taken another time.
    """
    import requests

    code = getattr(error, "error_code", "")
    status = getattr(error, "get_http_status_code", lambda: 0)()
    text = str(error)
    is_deleted = "must be in the 'active' state" in text or "must be in 'active' lifecycle" in text
    if code == "RESOURCE_DOES_NOT_EXIST" or is_deleted:
        return "gone"
    if isinstance(error, requests.RequestException | ConnectionError | TimeoutError):
        return "down"
    if status in (401, 403, 408, 429) or status >= 500:
        return "down"
    if status in (400, 404, 413) and code in (
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
    ):
        return "reject"
    return "retry"


@dataclass
class RequestBatch:
    """Consecutive records that go into one request, and the offset behind them."""

    end: int = 0
    metrics: list[Metric] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)

    def fits(self, record: Record) -> bool:
        """Whether the request stays within MLflow's limits with this record."""
        kind = record["op"]
        return len(getattr(self, kind)) + len(record["values"]) <= BATCH_SIZES[kind]

    def add(self, record: Record) -> None:
        from mlflow.entities import Metric, Param, RunTag

        values = record["values"].items()
        if record["op"] == "metrics":
            self.metrics += [Metric(k, float(v), record["t"], record["step"]) for k, v in values]
        elif record["op"] == "params":
            self.params += [Param(k, v) for k, v in values]
        else:
            self.tags += [RunTag(k, v) for k, v in values]

    def __len__(self) -> int:
        return len(self.metrics) + len(self.params) + len(self.tags)

    def halves(self) -> tuple[RequestBatch, RequestBatch]:
        """The same items in two requests."""
        middle = len(self) // 2
        first, second = RequestBatch(), RequestBatch()
        position = 0
        for kind in BATCH_SIZES:
            for item in getattr(self, kind):
                getattr(first if position < middle else second, kind).append(item)
                position += 1
        return first, second

    def as_record(self) -> Record:
        """The journal's form of the one item that it holds."""
        if self.metrics:
            point = self.metrics[0]
            values = {point.key: point.value}
            return {"op": "metrics", "values": values, "step": point.step, "t": point.timestamp}
        if self.params:
            return {"op": "params", "values": {self.params[0].key: self.params[0].value}}
        return {"op": "tags", "values": {self.tags[0].key: self.tags[0].value}}


class SentPoints:
    """Which points of a run have been sent, so that repeated steps are not drawn twice.

    After a lost checkpoint a run repeats some steps and records their points again, at new times,
    and MLflow would keep both. A point is left out if its key and step were sent before with the
    same value, or if it measures speed. Another value is sent; the chart then shows both.
    """

    def __init__(self) -> None:
        self._values: dict[str, dict[int, float]] = {}

    def new(self, record: Record) -> Record | None:
        """The part of a `metrics` record that has not been sent; None if there is none."""
        if record.get("requeued"):
            return record
        step = record["step"]
        left = {k: v for k, v in record["values"].items() if self._is_new(k, step, float(v))}
        return {**record, "values": left} if left else None

    def _is_new(self, key: str, step: int, value: float) -> bool:
        if key.startswith("system/"):
            return True
        known = self._values.setdefault(key, {})
        if step in known and step > 0 and key.rsplit("/", 1)[-1] in SPEED_NAMES:
            return False
        before = known.get(step)
        known[step] = value
        return before is None or (before != value and not (before != before and value != value))


class RunDelivery:
    """Delivers one run's journal."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri
        self.state = State.load(path)
        self.is_gone = False
        self.is_uploading = False
        """Whether a file or model is on its way, which takes a while on a healthy server too."""
        self._tries = 0
        self._before: tuple[SentPoints, Owners] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether the journal holds complete lines that have not been delivered."""
        with contextlib.suppress(OSError):
            return (
                not self.is_gone
                and self.path.stat().st_size > self.state.offset
                and any(True for _ in read(self.path, self.state.offset, 1 << 12))
            )
        return False

    def deliver(self, mlflow: MlflowClient, done: Callable[[], None] = lambda: None) -> None:
        """Deliver about 1 MB of what waits; `done` is called after each request.

        Raises what the server raised. What was delivered before that stays delivered.
        """
        try:
            self._deliver_block(mlflow, done)
        except RunMissingError:
            log.warning(
                "tracking: the MLflow run %s no longer exists; it is made again from its journal",
                self.state.run_id,
            )
            self.state = State(rejected=self.state.rejected)
            self.state.save(self.path)
            self._before = None
        except RunGoneError:
            self.is_gone = True
            log.warning(
                "tracking: the MLflow run %s has been deleted; new records stay in %s",
                self.state.run_id,
                self.path,
            )

    def _deliver_block(self, mlflow: MlflowClient, done: Callable[[], None]) -> None:
        sent, owners = self._read_before()
        batch = RequestBatch()
        for record, end in read(self.path, self.state.offset):
            if record is None:
                log.warning("tracking: %s holds a torn line, which is skipped", self.path)
                batch.end = end
            elif owners.is_late(record):
                batch.end = end
            elif record["op"] in BATCH_SIZES:
                new = sent.new(record) if record["op"] == "metrics" else record
                for part in _parts(new) if new else []:
                    if not batch.fits(part):
                        self._send(mlflow, batch)
                        batch = RequestBatch(self.state.offset)
                    batch.add(part)
                batch.end = end
            else:
                self._send(mlflow, batch)
                batch = RequestBatch(end)
                self._carry_out(mlflow, record)
                self._advance(end)
                done()
        self._send(mlflow, batch)
        self._before = sent, owners
        self._count_late(owners.late)
        done()

    def _read_before(self) -> tuple[SentPoints, Owners]:
        """What has been sent, and who wrote it: read from the journal at first and after an
        error."""
        before, self._before = self._before, None
        if before is None:
            before = sent, owners = SentPoints(), Owners()
            for record in read_all(self.path, self.state.offset):
                if not owners.is_late(record) and record["op"] == "metrics":
                    sent.new(record)
        return before

    def _count_late(self, late: int) -> None:
        if late > self.state.late:
            log.warning(
                "tracking: %d records in %s were written by a launch after it had lost the run to "
                "another one, and are not sent",
                late - self.state.late,
                self.path,
            )
            self.state.late = late
            self.state.save(self.path)

    def _advance(self, end: int) -> None:
        if end > self.state.offset:
            self.state.offset = end
            self._tries = 0
            self.state.save(self.path)

    def _send(self, mlflow: MlflowClient, batch: RequestBatch) -> None:
        self.is_uploading = False
        if len(batch):
            self._send_items(mlflow, batch)
        self._advance(batch.end)

    def _send_items(self, mlflow: MlflowClient, batch: RequestBatch) -> None:
        """All in one request; if it is refused, in halves, so that only bad items are rejected."""
        try:
            mlflow.log_batch(
                self.state.run_id,
                metrics=batch.metrics,
                params=batch.params,
                tags=batch.tags,
                synchronous=True,
            )
        except Exception as error:
            kind = classify_error(error)
            if kind == "gone":
                raise RunGoneError from error
            if kind != "reject":
                raise
            if len(batch) == 1:
                self._reject(batch.as_record(), error)
                return
            for half in batch.halves():
                self._send_items(mlflow, half)

    def _reject(self, record: Record, error: Exception) -> None:
        why = first_line(error)
        log.warning(
            "tracking: MLflow does not take %s (%s); it is kept in %s",
            _label(record),
            why,
            rejected_file(self.path),
        )
        with open(rejected_file(self.path), "ab") as file:
            file.write(encode({**record, "why": why}))
        self.state.rejected += 1
        self.state.save(self.path)

    def _carry_out(self, mlflow: MlflowClient, record: Record) -> None:
        self.is_uploading = record["op"] in ("artifact", "text", "model")
        slow = request_timeout(UPLOAD_SECONDS) if self.is_uploading else contextlib.nullcontext()
        try:
            with slow:
                _OPS[record["op"]](self, mlflow, record)
        except RunMissingError:
            raise
        except Exception as error:
            kind = classify_error(error)
            if kind == "gone" and record["op"] != "run":
                raise RunGoneError from error
            if kind == "down" or record["op"] in ("run", "open", "end"):
                raise
            self._tries += 1
            is_final = kind == "reject" or isinstance(error, FileNotFoundError)
            if not is_final and self._tries < TRIES:
                raise
            self._reject(record, error)

    # --- one method per kind of record ---

    def _run(self, mlflow: MlflowClient, record: Record) -> None:
        """Find the run by its id or key, or make it; repeating this makes no second run."""
        experiment = ensure_experiment(mlflow, record["experiment"], self.uri)
        run = (
            _active(mlflow, self.state.run_id)
            or _active(mlflow, record.get("run_id", ""))
            or find(mlflow, [experiment], record["key"])
        )
        if run is None:
            tags = {**record["tags"], "ftlib.key": record["key"]}
            if parent := self._parent(mlflow, experiment, record):
                tags["mlflow.parentRunId"] = parent
            run = mlflow.create_run(
                experiment, start_time=record["t"], run_name=record["name"], tags=tags
            )
        elif run.info.status != "RUNNING":
            _reopen(mlflow, run.info.run_id)
        self.state.run_id = run.info.run_id
        self.state.experiment_id = str(run.info.experiment_id)
        self.state.ended = False
        self.state.save(self.path)
        if record["params"]:
            for part in _parts({"op": "params", "values": record["params"]}):
                batch = RequestBatch()
                batch.add(part)
                self._send_items(mlflow, batch)

    def _parent(self, mlflow: MlflowClient, experiment: str, record: Record) -> str:
        """The parent's run id; the journal names a parent that had none yet by its key."""
        parent: str = record.get("parent") or ""
        if not parent.startswith("key:"):
            return parent
        above = find(mlflow, [experiment], parent.removeprefix("key:"))
        return above.info.run_id if above else ""

    def _open(self, mlflow: MlflowClient, record: Record) -> None:
        if _active(mlflow, self.state.run_id) is None:
            raise RunMissingError
        _reopen(mlflow, self.state.run_id)
        self.state.ended = False

    def _end(self, mlflow: MlflowClient, record: Record) -> None:
        from mlflow.entities import RunTag

        tags = {"outcome": record["outcome"], **record.get("tags", {})}
        mlflow.log_batch(
            self.state.run_id, tags=[RunTag(k, v) for k, v in tags.items()], synchronous=True
        )
        mlflow.set_terminated(self.state.run_id, STATUS[record["outcome"]], end_time=record["t"])
        self.state.ended = True

    def _text(self, mlflow: MlflowClient, record: Record) -> None:
        mlflow.log_text(self.state.run_id, record["text"], record["file"])

    def _artifact(self, mlflow: MlflowClient, record: Record) -> None:
        path, folder = Path(record["path"]), record["folder"] or None
        if path.is_dir():
            mlflow.log_artifacts(self.state.run_id, str(path), folder)
        else:
            mlflow.log_artifact(self.state.run_id, str(path), folder)
        if path.parent.parent == self.path.parent / "files":
            shutil.rmtree(path.parent, ignore_errors=True)

    def _dataset(self, mlflow: MlflowClient, record: Record) -> None:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        source = HTTPDatasetSource(record["source"])
        data = MetaDataset(  # type: ignore[abstract]
            source, name=record["name"], digest=record["digest"]
        )
        context = InputTag("mlflow.data.context", record["context"])
        mlflow.log_inputs(self.state.run_id, [DatasetInput(data._to_mlflow_entity(), [context])])

    def _view(self, mlflow: MlflowClient, record: Record) -> None:
        try:
            if views.is_known_version(views.server_version(self.uri)):
                view = views.View(record["key"], record["name"], record["state"])
                views.save(mlflow, self.state.experiment_id, view)
        except Exception as error:
            if classify_error(error) == "down":
                raise
            log.info("tracking: the view %s could not be saved (%s)", record["name"], error)

    def _experiment_note(self, mlflow: MlflowClient, record: Record) -> None:
        try:
            experiment_note.update(mlflow, self.state.experiment_id)
        except Exception as error:
            if classify_error(error) == "down":
                raise
            log.info("tracking: the experiment's note could not be written (%s)", error)

    def _model(self, mlflow: MlflowClient, record: Record) -> None:
        folder = ModelFolder.from_record(record)
        log_model(mlflow, self.state.run_id, self.state.experiment_id, folder)


_OPS: dict[str, Callable[[RunDelivery, MlflowClient, Record], None]] = {
    "run": RunDelivery._run,
    "open": RunDelivery._open,
    "end": RunDelivery._end,
    "text": RunDelivery._text,
    "artifact": RunDelivery._artifact,
    "dataset": RunDelivery._dataset,
    "model": RunDelivery._model,
    "view": RunDelivery._view,
    "experiment_note": RunDelivery._experiment_note,
}


def _reopen(mlflow: MlflowClient, run_id: str) -> None:
    """Let an ended run go on; how and why it ended is no longer true."""
    mlflow.update_run(run_id, status="RUNNING")
    for tag in ("outcome", "reason"):
        with contextlib.suppress(Exception):  # it has no such tag
            mlflow.delete_tag(run_id, tag)


def _parts(record: Record) -> list[Record]:
    """A record with more items than one request takes, as several."""
    items, size = list(record["values"].items()), BATCH_SIZES[record["op"]]
    if len(items) <= size:
        return [record]
    starts = range(0, len(items), size)
    return [{**record, "values": dict(items[start : start + size])} for start in starts]


def _label(record: Record) -> str:
    names = [str(record[k]) for k in ("file", "name") if k in record]
    return " ".join([record["op"], *record.get("values", {}), *names])


def _active(mlflow: MlflowClient, run_id: str) -> Run | None:
    """The run with this id, or None if there is none or it has been deleted."""
    if not run_id:
        return None
    try:
        run = mlflow.get_run(run_id)
    except Exception as error:
        if classify_error(error) == "gone":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def find(mlflow: MlflowClient, experiments: list[str], key: str) -> Run | None:
    """The run with this key, or None."""
    found = mlflow.search_runs(
        experiments, filter_string=f"tags.`ftlib.key` = '{key}'", max_results=1
    )
    return found[0] if found else None


def requeue(journal: Path) -> int:
    """Give a journal's rejected records another try, by appending them. Returns how many."""
    path = rejected_file(journal)
    known = {*_OPS, *BATCH_SIZES}
    records = [record for record in read_all(path) if record["op"] in known]
    if records:
        with open(journal, "ab") as file:
            for record in records:
                record.pop("why", None)
                record.pop("owner", None)
                file.write(encode({**record, "requeued": True}))
        path.unlink()
    return len(records)
