"""Run training: `TorchTrainer(...).fit()` on the cluster, or the same trainer in this process."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.data.fork_server import LoaderProcessError
from ftlib.data.shards import Dataset
from ftlib.launch import cluster, own_ray, worker
from ftlib.launch.driver_actor import (
    ActorChannel,
    Channel,
    DriverActor,
    LocalChannel,
    ignore_errors,
)
from ftlib.launch.errors import LeaseLostError, RunFailedError, StoppedError
from ftlib.launch.lease import Lease
from ftlib.launch.outcome import TrainingResult
from ftlib.launch.preflight import check_storage
from ftlib.launch.progress import ProgressDisplay
from ftlib.launch.signals import Signals, grace_seconds
from ftlib.launch.source_version import source_version
from ftlib.storage import StorageError, join
from ftlib.track.writer import Writer

LOOK_SECONDS = 0.3
"""How often the driver looks at its workers."""
DRAIN_SECONDS = 1.0
"""How often the driver asks Ray for nodes that are about to go."""
DURING = "the run was training"
SILENT_SECONDS = 8.0
"""A stop waits no longer than this for a Ray that does not answer."""
STORAGE_SECONDS = 300.0
"""Storage that failed is waited for as long."""
START_ATTEMPTS = 10
"""Times Ray may fail to start the workers (30 s each) before the run fails; enough to replace a
node by hand."""
START_ATTEMPTS_GROWING = 60
"""The same where an autoscaler has to start nodes first."""


@dataclass(frozen=True)
class TrainingTask:
    """What training needs beside the run."""

    run: Run
    dataset: Dataset
    run_dir: str
    source: dict[str, Any] | None
    """Where the first weights come from (`InitialWeights.to_dict`)."""
    writer: Writer
    lease: Lease
    placement: cluster.Placement
    can_grow: bool = False
    """Whether an autoscaler may add nodes."""
    on_report: Callable[[dict[str, float]], None] | None = None
    """Called after each epoch in local mode."""
    callbacks: Sequence[Any] = ()
    """ray.train.UserCallback objects, on the cluster."""

    def config(self, channel: Channel, local: bool) -> dict[str, Any]:
        """The `train_loop_config` of `worker.train_loop`."""
        values = {
            "run": settings.to_dict(self.run),
            "data": self.dataset.path,
            "run_dir": self.run_dir,
            "source": self.source,
            "writer": self.writer,
            "fence": self.lease.fence,
            "channel": channel,
            "cpus": self.placement.cpus,
            "gpus": self.placement.gpus,
            "local": local,
            "driver": None if local else (_node(), source_version()),
        }
        return {**values, "on_report": self.on_report} if local else values


def run_local(task: TrainingTask, display: ProgressDisplay) -> TrainingResult:
    """Train in this process. Raises what training raises, and StoppedError after a signal.

    As on a cluster, training starts again from the newest checkpoint after storage failed or loader
    processes died, up to cluster.max_failures times; and an error of the data is a failure of the
    run (RunFailedError), not wrong input. A crash of this process is not survived.
    """
    train, torch_train = _ray_train()
    actor = _LocalActor(display, task.lease)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would print every report
    with Signals(actor.request_stop) as signals:
        for failures in itertools.count(1):
            trainer = torch_train.TorchTrainer(
                worker.train_loop,
                train_loop_config=task.config(LocalChannel(actor), local=True),
                scaling_config=train.ScalingConfig(num_workers=0),
                run_config=train.RunConfig(name=task.run.name),
            )
            try:
                return _result(trainer.fit().return_value, signals)
            except (StorageError, LoaderProcessError) as error:
                if signals.count or failures > task.run.cluster.max_failures:
                    raise
                display.say(f"{error}. Starting again from the newest checkpoint")
            except ValueError as error:
                if not worker.is_final(error):
                    raise
                raise RunFailedError(str(error)) from error
    raise AssertionError("unreachable")


def run_on_cluster(task: TrainingTask, display: ProgressDisplay) -> TrainingResult:
    """Train in Ray workers.

    Ray restarts workers, but does not try again to write its own record of the run: where that
    fails because storage is away, training starts again once storage is back, from the newest
    checkpoint, up to cluster.max_failures times.

    Raises RunFailedError with the first worker's reason, StorageError, LeaseLostError, and
    StoppedError after a signal.
    """
    channel = ActorChannel.start()
    with Signals(raise_second=False) as signals, _Messages(channel, display) as messages:
        for failures in itertools.count(1):
            done = _fit(task, channel, messages, signals)
            reason = _storage_failure(done)
            if not reason or failures > task.run.cluster.max_failures:
                break
            display.say(
                f"{reason}. Training starts again from the newest checkpoint once {task.run_dir} "
                f"can be written; waiting up to {STORAGE_SECONDS:g} s"
            )
            if not _storage_is_back(task, signals):
                break
    _show(channel, display)
    failure = ignore_errors(lambda: channel.call("failure"))
    ignore_errors(lambda: _kill(channel))
    if isinstance(done, BaseException):
        raise _explained(done, failure) from done
    return _result(done, signals)


def _fit(task: TrainingTask, channel: ActorChannel, messages: _Messages, signals: Signals) -> Any:
    """What rank 0 returns, or the error that ended training."""
    done: list[Any] = []

    def fit() -> None:
        try:
            done.append(_trainer(task, channel).fit().return_value)
        except BaseException as error:
            done.append(error)

    # In a thread, so that signals come to us: Ray's handler ends the workers without a checkpoint.
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    with own_ray.announcing(DURING):
        _watch(thread, messages, signals, task.lease)
    return done[0]


def _storage_failure(done: Any) -> str:
    """Why Ray's controller could not write to storage; '' where something else ended training."""
    error = getattr(done, "controller_failure", done)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return str(error).strip()
    return ""


def _storage_is_back(task: TrainingTask, signals: Signals) -> bool:
    """Wait until the run's folder can be written, STORAGE_SECONDS at most.

    Raises StoppedError after a signal.
    """
    deadline = time.monotonic() + STORAGE_SECONDS
    while time.monotonic() < deadline:
        task.lease.check()
        if signals.count:
            raise StoppedError(
                signals.number or 15,
                "stopped while its storage was away; the same command resumes from the newest "
                "checkpoint",
            )
        try:
            check_storage(task.run_dir, 0)
        except (OSError, StorageError):
            time.sleep(1)
        else:
            return True
    return False


class _Messages:
    """Exchanges messages with the workers in a thread, while it is entered.

    A Ray that is dying may not answer for a minute; the driver itself must never wait for it.
    """

    def __init__(self, channel: ActorChannel, display: ProgressDisplay) -> None:
        self.channel, self.display = channel, display
        self._answered = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="messages", daemon=True)

    def __enter__(self) -> _Messages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(LOOK_SECONDS)

    @property
    def silence(self) -> float:
        """Seconds since Ray answered last."""
        return time.monotonic() - self._answered

    def _exchange(self) -> None:
        drains_checked = 0.0
        while not self._end.wait(LOOK_SECONDS):
            if _show(self.channel, self.display):
                self._answered = time.monotonic()
            if time.monotonic() - drains_checked > DRAIN_SECONDS:
                drains_checked = time.monotonic()
                _pass_on_drains(self.channel)


def _watch(thread: threading.Thread, messages: _Messages, signals: Signals, lease: Lease) -> None:
    """Until `thread` ends: notice stop requests, a lost lease and a lost Ray."""
    stop_requested = 0.0
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        lease.check()
        if thread.is_alive() and (process := own_ray.gone()):
            raise _without_ray(process, signals)
        now = time.monotonic()
        if signals.count and not stop_requested:
            stop_requested = now
            messages.display.say(
                f"{signals.name}: stopping with a checkpoint (once more stops at once)"
            )
            messages.channel.send("request_stop")
        if not (stop_requested and thread.is_alive()):
            continue
        if messages.silence > SILENT_SECONDS:
            own_ray.end_processes()
            raise StoppedError(
                signals.number or 15,
                "stopped without a checkpoint, because Ray does not answer; the same command "
                "resumes from the newest one",
                ends_at_once=True,
            )
        if signals.count > 1 or now - stop_requested > grace_seconds():
            raise StoppedError(
                signals.number or 15,
                "stopped without waiting for a checkpoint; the same command resumes from the "
                "newest one",
            )


def _without_ray(process: str, signals: Signals) -> BaseException:
    """The end of a run whose Ray is gone: nothing can be asked of it any more."""
    own_ray.end_processes()
    if signals.number:
        return StoppedError(
            signals.number,
            f"stopped without a checkpoint, because Ray's {process} had ended; the same command "
            "resumes from the newest one",
            ends_at_once=True,
        )
    return own_ray.gone_error(process, DURING)


def _trainer(task: TrainingTask, channel: ActorChannel) -> Any:
    train, torch_train = _ray_train()
    from ftlib.launch.torch_network import NodeNetworkConfig

    placement, run = task.placement, task.run
    # Ray's own folder is new at every launch: resuming is ours, so no state of Ray's can break a
    # run or resume another one.
    scratch = join(task.run_dir, "ray")
    ignore_errors(lambda: storage.delete_folder(scratch))
    limit = START_ATTEMPTS_GROWING if task.can_grow else START_ATTEMPTS
    return _without_helpers(torch_train.TorchTrainer)(
        worker.train_loop,
        train_loop_config=task.config(channel, local=False),
        torch_config=NodeNetworkConfig(timeout_s=600),
        scaling_config=train.ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=bool(placement.gpus),
            resources_per_worker=placement.resources,
            elastic_resize_monitor_interval_s=15.0,
        ),
        run_config=train.RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=train.FailureConfig(
                max_failures=run.cluster.max_failures, controller_failure_limit=limit
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=[worker.EndOnFinalError(channel), *task.callbacks],
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _without_helpers(trainer: Any) -> Any:
    """Ray's trainer without the actors that have nothing to do, and would start before training.

    These are the one for Ray Datasets, and on a Ray of this process's own, which ends with it, the
    one that frees the workers' resources after their controller has died.
    """
    unused = {"DatasetsCallback"}
    if own_ray.is_here():
        unused.add("PlacementGroupCleanerCallback")

    class Trainer(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [c for c in made if type(c).__name__ not in unused]

    return Trainer


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _ray_train() -> tuple[Any, Any]:
    """(ray.train, ray.train.torch). Their names change at import; type checkers cannot follow."""
    import ray.train
    import ray.train.torch

    return ray.train, ray.train.torch


def _result(result: dict[str, Any], signals: Signals) -> TrainingResult:
    if "interrupted" in result:
        raise StoppedError(signals.number or 15, result["interrupted"])
    return cast(TrainingResult, result)


def _explained(error: BaseException, failure: tuple[str, str] | None) -> Exception:
    """What a user needs to read of Ray's error. `failure`: a worker's own last words."""
    if failure is not None:
        kind, message = failure
        return LeaseLostError(message) if kind == "LeaseLostError" else RunFailedError(message)
    failures = getattr(error, "worker_failures", None)
    if failures:
        # Errors of a worker whose peer went away come last: the peer's own error says more.
        rank, first = min(
            failures.items(),
            key=lambda item: ("reset" in str(item[1]) or "closed" in str(item[1]), item[0]),
        )
        if "StorageError" in type(first).__name__ or "StorageError" in str(first)[:2000]:
            return StorageError(str(first).strip().splitlines()[-1])
        return RunFailedError(f"worker {rank} failed, and so did its restarts: {first}")
    return RunFailedError(f"training failed: {error}")


def _show(channel: ActorChannel, display: ProgressDisplay) -> bool:
    """Show what the workers have sent. Returns whether Ray answered."""
    items = ignore_errors(lambda: channel.call("take_output"))
    for item in items or []:
        if isinstance(item, str):
            display.say(item)
        else:
            display.show(item)
    return items is not None


def _pass_on_drains(channel: ActorChannel) -> None:
    """Tell the workers of nodes that Ray is about to lose (spot instances, scale-down)."""
    import ray

    nodes = ignore_errors(lambda: ray._private.state.state.get_draining_nodes())
    if nodes:
        channel.send("mark_draining", sorted(nodes))


def _kill(channel: ActorChannel) -> None:
    import ray

    ray.kill(channel.actor)


class _LocalActor(DriverActor):
    """In this process what comes is shown at once, and a lost lease stops the next step."""

    def __init__(self, display: ProgressDisplay, lease: Lease) -> None:
        super().__init__()
        self._display, self._lease = display, lease
        self._said = False

    def add_progress(self, values: dict[str, float]) -> None:
        self._display.show(values)

    def add_message(self, text: str) -> None:
        self._display.say(text)

    def requests(self) -> tuple[bool, int]:
        self._lease.check()
        if self.stop and not self._said:
            self._said = True
            self._display.say("stopping with a checkpoint (once more stops at once)")
        return super().requests()
