"""What runs in each Ray worker: rebuild the run from plain values and hand it to the training loop.

Ray's controller imports this module too, so what only a worker needs is imported in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train import Checkpoint, UserCallback

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.data.fork_server import LoaderProcessError
from ftlib.gc_pause import lasting_imports
from ftlib.launch.driver_actor import Channel, DriverLogHandler, StopSignals
from ftlib.launch.source_version import check_version, source_version
from ftlib.storage import StorageError

if TYPE_CHECKING:
    import torch

    from ftlib.data.shards import Dataset


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The `train_loop_per_worker`. `config` is made by `executor.TrainingTask.config`.

    Returns the training's result; an interrupted one returns {"interrupted": message}. An error
    that a restart would only repeat is reported to the driver before it is raised.
    """
    with contextlib.nullcontext() if config["local"] else lasting_imports():
        import torch

        from ftlib.data.fetch_ahead import warm_up
        from ftlib.training import loop
        from ftlib.training.initial_weights import InitialWeights

    run = settings.from_dict(Run, config["run"])
    channel = config["channel"]
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would print every report
    context = ray.train.get_context()
    threads_before = torch.get_num_threads()
    stop_signals = StopSignals(channel)
    try:
        if not config["local"]:
            _join(channel, *config["driver"])
        dataset = open_again(config["data"], run.data.cache_limit)
        loaders, threads = processes_and_threads(run, dataset, config["cpus"])
        if not (config["local"] and "OMP_NUM_THREADS" in os.environ):
            torch.set_num_threads(threads)
        worker_context = loop.WorkerContext(
            run=run,
            dataset=dataset,
            run_dir=config["run_dir"],
            device=_device(config["gpus"]),
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            source=InitialWeights.from_dict(config["source"]) if config["source"] else None,
            loader_workers=loaders,
            tracking=config["writer"],
            report=reporter(config.get("on_report"), config["local"]),
            progress=lambda values: channel.send("add_progress", values),
            fence=config["fence"],
            owner=config["fence"].token,
            notice=stop_signals,
        )
        with warm_up(
            worker_context.needed,
            worker=context.get_local_rank(),
            workers=context.get_local_world_size(),
            say=lambda text: channel.send("add_message", text),
        ):
            return loop.train(worker_context)
    except loop.InterruptedTrainingError as error:
        return {"interrupted": str(error)}
    except Exception as error:
        if is_final(error):
            channel.call("report_failure", type(error).__name__, str(error))
        raise
    finally:
        stop_signals.close()
        torch.set_num_threads(threads_before)  # in local mode the process goes on


def open_again(path: str, cache_limit: float) -> Dataset:
    """The data set, which the driver has opened before.

    Raises DataError for a damaged one, and StorageError where its manifest cannot be found or read
    any more: that is storage which is away for now.
    """
    from ftlib.data.shards import MANIFEST, DataError, Dataset

    try:
        return Dataset.open(path, limit=cache_limit)
    except DataError as error:
        try:
            gone = storage.read_file(storage.join(path, MANIFEST)) is None
        except (OSError, StorageError):
            raise StorageError(str(error)) from error
        if gone:
            raise StorageError(
                f"{path}: the data set was there when the run started, and is gone. Was its disk "
                "unmounted?"
            ) from error
        raise


def _device(gpus: float) -> torch.device:
    """This worker's GPU, where it has one and was given it."""
    import ray.train.torch
    import torch

    if torch.cuda.is_available() and gpus:
        gpu: torch.device = ray.train.torch.get_device()
        return gpu
    return torch.device("cpu")


def _join(channel: Channel, drivers_node: str, drivers_version: str) -> None:
    """Be known to the driver; LaunchError where this node, which may be new, has another ftlib."""
    logging.getLogger("ftlib").addHandler(DriverLogHandler(channel))
    node = ray.get_runtime_context().get_node_id()
    channel.send("register_node", node)
    if node != drivers_node:  # there, somebody only goes on writing code
        check_version(ray.util.get_node_ip_address(), source_version(), drivers_version)


def processes_and_threads(run: Run, dataset: Dataset, cpus: int) -> tuple[int, int]:
    """(loader processes, threads of the training process) of one worker with `cpus`.

    Processes: as asked, or (-1) one per CPU but one; none for a run of so few pictures that a
    thread has loaded them before processes start. Threads: the CPUs that those processes have not.
    More would spin against the loaders and each other, several times slower. A small run has as
    many threads as a larger one, because their number changes the last bits of sums.
    """
    from ftlib.data.loader import FEW
    from ftlib.data.sampler import run_rows

    asked = run.data.loader_workers
    loaders = asked if asked >= 0 else max(cpus - 1, 0)
    rows, tuning = run_rows(dataset.split("train").labels, run.data)
    pictures = run.train.epochs * (len(rows) + (len(tuning) or len(dataset.split("val"))))
    return (0 if asked < 0 and pictures <= FEW else loaders), max(cpus - loaders, 1)


def reporter(
    on_report: Callable[[dict[str, float]], None] | None, local: bool
) -> Callable[[dict[str, float], str | None], None]:
    """The loop's `report`: plain floats and a checkpoint that names ours to Ray, then the hook."""

    def report(metrics: dict[str, float], checkpoint: str | None) -> None:
        if local:
            ray.train.report(metrics)
        else:
            with tempfile.TemporaryDirectory() as folder:
                # On every rank: Ray matches the calls up and keeps rank 0's numbers.
                Path(folder, "pointer.json").write_text(json.dumps({"checkpoint": checkpoint}))
                ray.train.report(
                    metrics,
                    Checkpoint.from_directory(folder)
                    if ray.train.get_context().get_world_rank() == 0
                    else None,
                )
        if on_report is not None:
            on_report(metrics)

    return report


def is_final(error: BaseException) -> bool:
    """Whether a restart would only meet the same error again.

    True of ftlib's own errors, except for storage that is away or full for now, and for loader
    processes that died.
    """
    own = type(error).__module__.split(".")[0] == "ftlib"
    return own and not isinstance(error, StorageError | LoaderProcessError)


class EndOnFinalError(UserCallback):
    """Ends the run at an error that a restart would only repeat.

    Runs in Ray's controller, where an exception is not retried.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        try:
            error = self.channel.call("failure")
        except Exception:
            return
        if error is not None:
            raise RuntimeError(f"{error[0]}: {error[1]}")
