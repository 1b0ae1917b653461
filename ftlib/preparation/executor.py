"""Where shards are made: in threads of this process, or as Ray tasks. Either way each one decodes in a process of its own.

Ray takes seconds to start and pays off over many shards or many machines; for `SMALL` sets it is not started.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ftlib.data.shards import DataError
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox
from ftlib.preparation.shard_task import ShardTask, build

SMALL_FILES = 10_000
SMALL_BYTES = 1_000_000_000
"""Up to both, a set is done here (at about 1,000 small files or 25 MB a second and core) before Ray, which takes about 9 s to start,
run and stop, would have caught up."""

Tick = Callable[[int], None]


def choose(tasks: list[ShardTask], engine: str) -> str:
    """`here` or `ray`, from `auto`."""
    if engine != "auto":
        return engine
    files, size = sum(len(t.entries) for t in tasks), sum(e.bytes for t in tasks for e in t.entries)
    return "here" if files <= SMALL_FILES and size <= SMALL_BYTES else "ray"


def run(tasks: list[ShardTask], engine: str, workers: int, tick: Tick) -> list[dict[str, Any]]:
    """The records of all tasks, in order. `workers` 0 takes all CPUs. The first error stops the rest and is raised."""
    return (_here if engine == "here" else _on_ray)(tasks, workers, tick)


def _here(tasks: list[ShardTask], workers: int, tick: Tick) -> list[dict[str, Any]]:
    stop, lock = threading.Event(), threading.Lock()

    def counted(n: int) -> None:
        with lock:
            tick(n)

    at_once = max(1, min(len(tasks), workers or os.cpu_count() or 1))
    with contextlib.ExitStack() as stack:
        examiners: SimpleQueue[DecoderSandbox] = SimpleQueue()
        for _ in range(at_once):
            examiners.put(stack.enter_context(contextlib.closing(DecoderSandbox(tasks[0].rules))))

        def make(task: ShardTask) -> dict[str, Any]:
            examiner = examiners.get()
            try:
                return build(task, examiner, counted, stop.is_set)
            finally:
                examiners.put(examiner)

        pool = stack.enter_context(ThreadPoolExecutor(at_once))
        futures = [pool.submit(make, task) for task in tasks]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]


def _on_ray(tasks: list[ShardTask], workers: int, tick: Tick) -> list[dict[str, Any]]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(ray)
    try:
        counter: Any = ray.remote(num_cpus=0)(_Counter).remote()
        make = ray.remote(num_cpus=1, max_retries=3)(
            _task
        )  # a node may go; making a shard twice does no harm
        at_once = workers or len(tasks)
        todo, told = list(enumerate(tasks)), 0
        running: dict[Any, int] = {}
        records: dict[int, dict[str, Any]] = {}
        while todo or running:
            while todo and len(running) < at_once:
                number, task = todo.pop(0)
                running[make.remote(task, counter)] = number
            done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in done:
                records[running.pop(reference)] = _result(ray, reference)
            count: int = ray.get(counter.value.remote())
            tick(count - told)
            told = count
        tick(sum(len(t.entries) for t in tasks) - told)
        return [records[number] for number in range(len(tasks))]
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any) -> None:
    """Join the cluster of RAY_ADDRESS, or start a Ray of our own; never one that merely happens to run on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            runtime_env=None if inside_job else _environment(),
        )
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env=_environment(),
        )


def _environment() -> dict[str, Any]:
    return {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(
                [
                    str(Path(__file__).resolve().parents[2]),
                    *filter(None, [os.environ.get("PYTHONPATH")]),
                ]
            )
        }
    }


def _result(ray: Any, reference: Any) -> dict[str, Any]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise


def _task(task: ShardTask, counter: Any) -> dict[str, Any]:
    if not os.path.isdir(task.root):
        raise DataError(
            f"{task.root} is not there on node {os.uname().nodename}. On several machines the pictures must lie on storage that all of them share"
        )
    tell = _Batched(lambda n: counter.add.remote(n))
    record = build(task, _examiner(task.rules), tell)
    tell.flush()
    return record


@lru_cache(maxsize=1)
def _examiner(rules: PrepareOptions) -> DecoderSandbox:
    """One per Ray worker; its child ends with the worker."""
    return DecoderSandbox(rules)


class _Counter:
    """Files done, over all tasks."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, n: int) -> None:
        self._count += n

    def value(self) -> int:
        return self._count


class _Batched:
    """Passes counts on at most twice a second."""

    def __init__(self, tell: Tick) -> None:
        self._tell, self._waiting, self._last = tell, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self._waiting += n
        if time.monotonic() - self._last > 0.5:
            self.flush()

    def flush(self) -> None:
        self._tell(self._waiting)
        self._waiting, self._last = 0, time.monotonic()
