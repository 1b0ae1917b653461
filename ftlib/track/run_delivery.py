"""One run's journal on its way to MLflow: at least once, in order, whatever happens in between.

A `RunDelivery` delivers one run's journal. Everything it does may be repeated without effect: metrics carry their recorded time, parameters and
tags their value, the run is looked up by its key before it is made, a model by its own. A server that fails is asked again later; a record
that it will never take is put aside in `<name>.rejected.jsonl` and the rest goes on.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.track import views
from ftlib.track.journal import State, encode, read
from ftlib.track.logged_model import log_model
from ftlib.track.redact import redact
from ftlib.track.store import ensure_experiment, patient

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("ftlib.track")

STATUS = {"completed": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
"""MLflow's status for each outcome; a trial that the search stopped early is no failure."""
BATCH = {"metrics": 900, "params": 90, "tags": 90}
"""Items in one request; MLflow takes at most 1000, 100 and 100."""
UPLOAD_SECONDS = 300
TRIES = 4
"""Times that a file is tried while the server itself answers, before it is put aside."""


class RunGoneError(Exception):
    """The run has been deleted in MLflow."""


class StartOver(Exception):
    """The run has been deleted in MLflow, and is continued: it is made again from its journal."""


def verdict(error: Exception) -> str:
    """What a failure means: `down` (ask again later), `gone` (the run has been deleted), `reject` (this record will never be taken) or
    `retry` (this record may be taken another time)."""
    import requests

    code = getattr(error, "error_code", "")
    status = getattr(error, "get_http_status_code", lambda: 0)()
    text = str(error)
    if (
        code == "RESOURCE_DOES_NOT_EXIST"
        or "must be in the 'active' state" in text
        or "must be in 'active' lifecycle" in text
    ):
        return "gone"
    if (
        isinstance(error, requests.RequestException | ConnectionError | TimeoutError)
        or status in (401, 403, 408, 429, 502, 503, 504)
        or status >= 500
    ):
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
    metrics: list[Any] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    tags: list[Any] = field(default_factory=list)

    def fits(self, record: dict[str, Any]) -> bool:
        return len(getattr(self, record["op"])) + len(record["values"]) <= BATCH[record["op"]]

    def add(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if record["op"] == "metrics":
            self.metrics += [
                Metric(k, float(v), record["t"], record["step"])
                for k, v in record["values"].items()
            ]
        elif record["op"] == "params":
            self.params += [Param(k, v) for k, v in record["values"].items()]
        else:
            self.tags += [RunTag(k, v) for k, v in record["values"].items()]

    def items(self) -> list[tuple[str, Any]]:
        return (
            [("metrics", m) for m in self.metrics]
            + [("params", p) for p in self.params]
            + [("tags", t) for t in self.tags]
        )


class RunDelivery:
    """One run's journal on its way to MLflow."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri
        self.state = State.load(path)
        self.gone = False
        self.uploading = False
        """Whether a file or model is on its way, which may take a while on a healthy server too."""
        self._tries = 0

    @property
    def pending(self) -> bool:
        """Whether the journal holds complete lines that have not been delivered."""
        with contextlib.suppress(OSError):
            return (
                not self.gone
                and self.path.stat().st_size > self.state.offset
                and any(True for _ in read(self.path, self.state.offset, 1 << 12))
            )
        return False

    def deliver(self, mlflow: MlflowClient, done: Callable[[], None] = lambda: None) -> None:
        """Deliver about 1 MB of what waits. Raises what the server raised; what was delivered before that stays delivered."""
        batch = RequestBatch()
        try:
            for record, end in read(self.path, self.state.offset):
                if record is None:
                    log.warning("tracking: %s holds a torn line, which is skipped", self.path)
                    batch.end = end
                elif record["op"] in BATCH:
                    for part in _parts(record):
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
            done()
        except StartOver:
            log.warning(
                "tracking: the MLflow run %s no longer exists; it is made again from its journal",
                self.state.run_id,
            )
            self.state = State(rejected=self.state.rejected)
            self.state.save(self.path)
        except RunGoneError:
            self.gone = True
            log.warning(
                "tracking: the MLflow run %s has been deleted; what comes for it stays in %s",
                self.state.run_id,
                self.path,
            )

    def _advance(self, end: int) -> None:
        if end > self.state.offset:
            self.state.offset = end
            self._tries = 0
            self.state.save(self.path)

    def _send(self, mlflow: MlflowClient, batch: RequestBatch) -> None:
        self.uploading = False
        items = batch.items()
        if items:
            self._send_items(mlflow, items)
        self._advance(batch.end)

    def _send_items(self, mlflow: MlflowClient, items: list[tuple[str, Any]]) -> None:
        """All in one request; if it is refused, halves of it, so that only the culprits are put aside."""
        try:
            mlflow.log_batch(
                self.state.run_id,
                **{kind: [i for k, i in items if k == kind] for kind in BATCH},
                synchronous=True,
            )
        except Exception as error:
            what = verdict(error)
            if what == "gone":
                raise RunGoneError from error
            if what != "reject":
                raise
            if len(items) > 1:
                self._send_items(mlflow, items[: len(items) // 2])
                self._send_items(mlflow, items[len(items) // 2 :])
            else:
                self._reject(_record_of(*items[0]), error)

    def _reject(self, record: dict[str, Any], error: Exception) -> None:
        why = redact(str(error)).splitlines()[0][:300] if str(error) else type(error).__name__
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

    def _carry_out(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        self.uploading = record["op"] in ("artifact", "text", "model")
        try:
            with patient(UPLOAD_SECONDS) if self.uploading else contextlib.nullcontext():
                _OPS[record["op"]](self, mlflow, record)
        except StartOver:
            raise
        except Exception as error:
            what = verdict(error)
            if what == "gone" and record["op"] != "run":
                raise RunGoneError from error
            if what == "down" or record["op"] in ("run", "open", "end"):
                raise
            self._tries += 1
            if (
                what != "reject"
                and self._tries < TRIES
                and not isinstance(error, FileNotFoundError)
            ):
                raise
            self._reject(record, error)

    # --- one method per kind of record ---

    def _run(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        """Find the run, or make it. Its id, its key, then its name's absence decide, so that repeating this makes no second run."""
        experiment = ensure_experiment(mlflow, record["experiment"], self.uri)
        run = (
            _active(mlflow, self.state.run_id)
            or _active(mlflow, record.get("run_id", ""))
            or find(mlflow, [experiment], record["key"])
        )
        if run is None:
            parent = record.get("parent") or ""
            if parent.startswith("key:"):
                above = find(mlflow, [experiment], parent[4:])
                parent = above.info.run_id if above else ""
            tags = {
                **record["tags"],
                "ftlib.key": record["key"],
                **({"mlflow.parentRunId": parent} if parent else {}),
            }
            run = mlflow.create_run(
                experiment, start_time=record["t"], run_name=record["name"], tags=tags
            )
        elif run.info.status != "RUNNING":
            mlflow.update_run(run.info.run_id, status="RUNNING")
        self.state.run_id, self.state.experiment_id, self.state.ended = (
            run.info.run_id,
            str(run.info.experiment_id),
            False,
        )
        self.state.save(self.path)
        if record["params"]:
            batch = RequestBatch()
            for part in _parts({"op": "params", "values": record["params"]}):
                batch.add(part)
            self._send_items(mlflow, batch.items())

    def _open(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        if _active(mlflow, self.state.run_id) is None:
            raise StartOver
        mlflow.update_run(self.state.run_id, status="RUNNING")
        with contextlib.suppress(Exception):  # it has no such tag
            mlflow.delete_tag(self.state.run_id, "outcome")
        self.state.ended = False

    def _end(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        mlflow.log_batch(
            self.state.run_id,
            tags=[
                RunTag(k, v)
                for k, v in {"outcome": record["outcome"], **record.get("tags", {})}.items()
            ],
            synchronous=True,
        )
        mlflow.set_terminated(self.state.run_id, STATUS[record["outcome"]], end_time=record["t"])
        self.state.ended = True

    def _text(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        mlflow.log_text(self.state.run_id, record["text"], record["file"])

    def _artifact(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        path, folder = Path(record["path"]), record["folder"] or None
        if path.is_dir():
            mlflow.log_artifacts(self.state.run_id, str(path), folder)
        else:
            mlflow.log_artifact(self.state.run_id, str(path), folder)
        if path.parent.parent == self.path.parent / "files":
            shutil.rmtree(path.parent, ignore_errors=True)

    def _dataset(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        from mlflow.data.http_dataset_source import HTTPDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        data = MetaDataset(
            HTTPDatasetSource(record["source"]), name=record["name"], digest=record["digest"]
        )  # type: ignore[abstract]
        mlflow.log_inputs(
            self.state.run_id,
            [
                DatasetInput(
                    data._to_mlflow_entity(), [InputTag("mlflow.data.context", record["context"])]
                )
            ],
        )

    def _view(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        try:
            if views.known(views.server_version(self.uri)):
                views.save(
                    mlflow,
                    self.state.experiment_id,
                    views.View(record["key"], record["name"], record["state"]),
                )
        except Exception as error:
            if verdict(error) == "down":
                raise
            log.info("tracking: the view %s could not be saved (%s)", record["name"], error)

    def _model(self, mlflow: MlflowClient, record: dict[str, Any]) -> None:
        log_model(mlflow, self.state.run_id, self.state.experiment_id, record)


_OPS: dict[str, Callable[[RunDelivery, Any, dict[str, Any]], None]] = {
    "run": RunDelivery._run,
    "open": RunDelivery._open,
    "end": RunDelivery._end,
    "text": RunDelivery._text,
    "artifact": RunDelivery._artifact,
    "dataset": RunDelivery._dataset,
    "model": RunDelivery._model,
    "view": RunDelivery._view,
}


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record with more items than one request takes, as several."""
    items, size = list(record["values"].items()), BATCH[record["op"]]
    return (
        [record]
        if len(items) <= size
        else [{**record, "values": dict(items[i : i + size])} for i in range(0, len(items), size)]
    )


def _record_of(kind: str, item: Any) -> dict[str, Any]:
    """The journal's form of one metric, parameter or tag."""
    record = {"op": kind, "values": {item.key: item.value}}
    return {**record, "step": item.step, "t": item.timestamp} if kind == "metrics" else record


def _label(record: dict[str, Any]) -> str:
    return " ".join(
        [
            record["op"],
            *record.get("values", {}),
            *(str(record[k]) for k in ("file", "name") if k in record),
        ]
    )


def _active(mlflow: MlflowClient, run_id: str) -> Any:
    """The run with this id, or None if there is none or it has been deleted."""
    if not run_id:
        return None
    try:
        run = mlflow.get_run(run_id)
    except Exception as error:
        if verdict(error) == "gone":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def rejected_file(journal: Path) -> Path:
    return journal.with_suffix(".rejected.jsonl")


def find(mlflow: MlflowClient, experiments: list[str], key: str) -> Any:
    """The run with this key, or None."""
    found = mlflow.search_runs(
        experiments, filter_string=f"tags.`ftlib.key` = '{key}'", max_results=1
    )
    return found[0] if found else None


def put_back(journal: Path) -> int:
    """Give rejected records of a journal another try, by appending them to it. Returns how many."""
    path = rejected_file(journal)
    lines = [
        record
        for record, _ in read(path, 0, 1 << 30)
        if record and (record["op"] in _OPS or record["op"] in BATCH)
    ]
    if lines:
        with open(journal, "ab") as file:
            file.writelines(encode({k: v for k, v in r.items() if k != "why"}) for r in lines)
        path.unlink()
    return len(lines)
