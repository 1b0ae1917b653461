"""Carrying training out: `TorchTrainer(...).fit()` on the cluster, or the same trainer in local mode within this process."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.data.shards import Dataset
from ftlib.launch import cluster, worker
from ftlib.launch.driver_actor import ActorChannel, DriverActor, LocalChannel, quietly
from ftlib.launch.errors import RunFailed, StoppedError
from ftlib.launch.progress import ProgressDisplay
from ftlib.launch.signals import Signals, grace_seconds
from ftlib.storage import StorageError, join

LOOK_SECONDS = 0.3
DRAIN_SECONDS = 1.0
START_ATTEMPTS = 10
"""Times Ray may fail to start the workers (30 s each) before the run is given up; enough for a node to be replaced by hand."""
START_ATTEMPTS_GROWING = 60
"""The same where an autoscaler has to start nodes first."""


@dataclass(frozen=True)
class Fit:
    """What a training needs beside its run."""

    run: Run
    dataset: Dataset
    run_dir: str
    source: dict[str, Any] | None
    writer: Any
    placement: cluster.Placement
    can_grow: bool = False
    on_report: Callable[[dict[str, float]], None] | None = None
    """Called after each epoch in local mode."""
    callbacks: Sequence[Any] = ()
    """ray.train.UserCallback objects, on the cluster."""

    def config(self, desk: LocalChannel | ActorChannel, local: bool) -> dict[str, Any]:
        values = {
            "run": settings.to_dict(self.run),
            "data": self.dataset.path,
            "run_dir": self.run_dir,
            "source": self.source,
            "writer": self.writer,
            "desk": desk,
            "cpus": self.placement.cpus,
            "gpus": self.placement.gpus,
            "local": local,
        }
        return {**values, "on_report": self.on_report} if local else values


def here(fit: Fit, screen: ProgressDisplay) -> dict[str, Any]:
    """Train in this process. Raises what training raises, and StoppedError after a signal."""
    train, torch_train = _ray_train()
    desk = _DisplayingActor(screen)

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would print every report

    def stop() -> None:
        desk.stop = True

    with Signals(stop) as signals:
        trainer = torch_train.TorchTrainer(
            worker.train_loop,
            train_loop_config=fit.config(LocalChannel(desk), local=True),
            scaling_config=train.ScalingConfig(num_workers=0),
            run_config=train.RunConfig(name=fit.run.name),
        )
        result = trainer.fit().return_value
    return _answer(result, signals)


def on_cluster(fit: Fit, screen: ProgressDisplay) -> dict[str, Any]:
    """Train in Ray workers. Raises RunFailed with the first worker's reason, StorageError, and StoppedError after a signal."""
    desk = ActorChannel.start()
    trainer = _trainer(fit, desk)
    done: list[Any] = []

    def carry_out() -> None:
        try:
            done.append(trainer.fit().return_value)
        except BaseException as error:
            done.append(error)

    # In a thread, so that Ray leaves the signals to us: its own handler ends the workers without a checkpoint.
    thread = threading.Thread(target=carry_out, name="fit", daemon=True)
    with Signals(raise_second=False) as signals:
        thread.start()
        asked, drained = 0.0, 0.0
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            _show(desk, screen)
            if signals.count and not asked:
                asked = time.monotonic()
                screen.say(f"{signals.name}: stopping with a checkpoint (once more stops at once)")
                desk.tell("ask_to_stop")
            if (
                asked
                and (signals.count > 1 or time.monotonic() - asked > grace_seconds())
                and thread.is_alive()
            ):
                raise StoppedError(
                    signals.number or 15,
                    "stopped without waiting for a checkpoint; the same command goes on from the newest one",
                )
            if time.monotonic() - drained > DRAIN_SECONDS:
                drained = time.monotonic()
                _pass_on_drains(desk)
    _show(desk, screen)
    outcome = done[0]
    last_words = quietly(lambda: desk.ask("failed"))
    quietly(lambda: _forget(desk))
    if isinstance(outcome, BaseException):
        raise _explained(outcome, last_words) from outcome
    return _answer(outcome, signals)


def _trainer(fit: Fit, desk: ActorChannel) -> Any:
    train, torch_train = _ray_train()
    place, run = fit.placement, fit.run
    # Ray's own folder is new at every launch: resuming is ours, so no state of Ray's can brick a run or resume another one.
    scratch = join(fit.run_dir, "ray")
    quietly(lambda: storage.delete_folder(scratch))
    limit = START_ATTEMPTS_GROWING if fit.can_grow else START_ATTEMPTS
    return _without_idle_helpers(torch_train.TorchTrainer)(
        worker.train_loop,
        train_loop_config=fit.config(desk, local=False),
        torch_config=torch_train.TorchConfig(timeout_s=600),
        scaling_config=train.ScalingConfig(
            num_workers=place.num_workers,
            use_gpu=bool(place.gpus),
            resources_per_worker=place.resources,
            elastic_resize_monitor_interval_s=15.0,
        ),
        run_config=train.RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=train.FailureConfig(
                max_failures=run.cluster.max_failures, controller_failure_limit=limit
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=[worker.EndOnFinalError(desk), *fit.callbacks],
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _without_idle_helpers(trainer: Any) -> Any:
    """Ray's trainer without its manager of Ray Datasets, of which ftlib uses none: one process less to start before training does."""

    class Trainer(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [
                c
                for c in super()._create_default_callbacks()
                if type(c).__name__ != "DatasetsCallback"
            ]

    return Trainer


def _ray_train() -> tuple[Any, Any]:
    """(ray.train, ray.train.torch), which change their own names at import in ways that type checkers do not follow."""
    import ray.train
    import ray.train.torch

    return ray.train, ray.train.torch


def _answer(result: dict[str, Any], signals: Signals) -> dict[str, Any]:
    if "interrupted" in result:
        raise StoppedError(signals.number or 15, result["interrupted"])
    return result


def _explained(error: BaseException, last_words: tuple[str, str] | None) -> Exception:
    """What a user needs to read of Ray's error."""
    if last_words:
        return RunFailed(last_words[1])
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(
            failures.items(),
            key=lambda item: ("reset" in str(item[1]) or "closed" in str(item[1]), item[0]),
        )
        if "StorageError" in type(first).__name__ or "StorageError" in str(first)[:2000]:
            return StorageError(str(first).strip().splitlines()[-1])
        return RunFailed(f"worker {rank} failed, and so did its restarts: {first}")
    return RunFailed(f"training could not be carried out: {error}")


def _show(desk: ActorChannel, screen: ProgressDisplay) -> None:
    for item in quietly(lambda: desk.ask("take")) or []:
        screen.say(item) if isinstance(item, str) else screen.show(item)


def _pass_on_drains(desk: ActorChannel) -> None:
    """Tell the workers of nodes that Ray is about to lose (spot instances, scale-down)."""
    import ray

    nodes = quietly(lambda: ray._private.state.state.get_draining_nodes())
    if nodes:
        desk.tell("drain", sorted(nodes))


def _forget(desk: ActorChannel) -> None:
    import ray

    ray.kill(desk.actor)


class _DisplayingActor(DriverActor):
    """In this process a progress point goes straight to the screen."""

    def __init__(self, screen: ProgressDisplay) -> None:
        super().__init__()
        self._screen = screen

    def show(self, values: dict[str, float]) -> None:
        self._screen.show(values)
