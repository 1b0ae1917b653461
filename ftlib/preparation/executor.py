"""Where shards are made: in threads of this process, or as Ray tasks.

Either way each one decodes in a process of its own. Threads serve one machine, however large the
set; Ray is for a cluster.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

from ftlib import storage
from ftlib.cpus import available_cpus
from ftlib.data.shards import DataError
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox
from ftlib.preparation.shard_task import ShardRecord, ShardTask, build

ENGINES = ("auto", "local", "ray")
SECONDS_BETWEEN_COUNTS = 0.5

Tick = Callable[[int], None]
Connect = Callable[[], object]
"""Joins the cluster of RAY_ADDRESS or starts Ray; `ftlib.launch.cluster.connect`."""


def choose(engine: str) -> str:
    """`local` or `ray`; `auto` takes Ray where RAY_ADDRESS names a cluster. Raises DataError."""
    if engine not in ENGINES:
        raise DataError(f"--engine {engine}: needs to be one of {', '.join(ENGINES)}")
    if engine == "auto":
        return "ray" if os.environ.get("RAY_ADDRESS") else "local"
    return engine


def run(
    tasks: Sequence[ShardTask],
    engine: str,
    workers: int,
    tick: Tick,
    connect_ray: Connect | None = None,
) -> list[ShardRecord]:
    """The records of all tasks, in order. `workers` 0 takes all CPUs.

    The first error stops the rest and is raised.
    """
    if not tasks:
        return []
    if choose(engine) == "local":
        return _run_threads(tasks, workers, tick)
    return _run_on_ray(tasks, workers, tick, connect_ray)


def _run_threads(tasks: Sequence[ShardTask], workers: int, tick: Tick) -> list[ShardRecord]:
    stop, lock = threading.Event(), threading.Lock()

    def counted(n: int) -> None:
        with lock:
            tick(n)

    at_once = max(1, min(len(tasks), workers or available_cpus()))
    with contextlib.ExitStack() as stack:
        sandboxes: SimpleQueue[DecoderSandbox] = SimpleQueue()
        for _ in range(at_once):
            sandboxes.put(stack.enter_context(contextlib.closing(DecoderSandbox(tasks[0].rules))))

        def make(task: ShardTask) -> ShardRecord:
            sandbox = sandboxes.get()
            try:
                return build(task, sandbox, counted, stop.is_set)
            finally:
                sandboxes.put(sandbox)

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


# --- Ray ---


def _run_on_ray(
    tasks: Sequence[ShardTask], workers: int, tick: Tick, connect_ray: Connect | None
) -> list[ShardRecord]:
    import ray

    ours = not ray.is_initialized()
    if ours:
        if connect_ray is None:
            raise DataError(
                "--engine ray: this process has not connected to Ray. Call "
                "ftlib.launch.cluster.connect() first, or take --engine local"
            )
        connect_ray()
    try:
        return _submit_all(tasks, workers or len(tasks), tick)
    finally:
        if ours:
            ray.shutdown()


def _submit_all(tasks: Sequence[ShardTask], at_once: int, tick: Tick) -> list[ShardRecord]:
    import ray

    counter: Any = ray.remote(num_cpus=0)(_Counter).remote()
    # A node may go; making a shard twice does no harm.
    make = ray.remote(num_cpus=1, max_retries=3)(_task)
    todo, told = list(enumerate(tasks))[::-1], 0
    running: dict[Any, int] = {}
    records: dict[int, ShardRecord] = {}
    while todo or running:
        while todo and len(running) < at_once:
            number, task = todo.pop()
            running[make.remote(task, counter)] = number
        done, _ = ray.wait(list(running), num_returns=1, timeout=SECONDS_BETWEEN_COUNTS)
        for reference in done:
            records[running.pop(reference)] = _result(reference)
        count: int = ray.get(counter.value.remote())
        tick(count - told)
        told = count
    tick(sum(len(task.entries) for task in tasks) - told)
    return [records[number] for number in range(len(tasks))]


def _result(reference: Any) -> ShardRecord:
    import ray

    try:
        record: ShardRecord = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise
    return record


def _task(task: ShardTask, counter: Any) -> ShardRecord:
    if not storage.is_remote(task.root) and not os.path.exists(task.root):
        raise DataError(
            f"{task.root} is not there on node {os.uname().nodename}. On several machines the "
            "pictures must lie on storage that all of them share"
        )
    tell = _Batched(lambda n: counter.add.remote(n))
    record = build(task, _sandbox(task.rules), tell)
    tell.flush()
    return record


@lru_cache(maxsize=1)
def _sandbox(rules: PrepareOptions) -> DecoderSandbox:
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
    """Passes counts on at most once per `SECONDS_BETWEEN_COUNTS`."""

    def __init__(self, tell: Tick) -> None:
        self._tell, self._waiting, self._last = tell, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self._waiting += n
        if time.monotonic() - self._last > SECONDS_BETWEEN_COUNTS:
            self.flush()

    def flush(self) -> None:
        self._tell(self._waiting)
        self._waiting, self._last = 0, time.monotonic()
