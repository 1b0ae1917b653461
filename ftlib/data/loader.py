"""Prepared pictures to batches of uint8, in the order of the plan, from one iterator that lasts the whole run.

A microbatch is read, decoded and augmented whole by one process, straight into memory that the training process shares; no
pixel is copied on the way. What a batch holds depends on its place in the plan alone, not on the number of processes.

Processes come from a fork server rather than from a fork: the training process runs threads of Ray and CUDA, which a fork
would break. The server has imported this module already, so a process starts in a few hundredths of a second and shares those pages.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection, forkserver, popen_forkserver
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from ftlib import config
from ftlib.data.augment import EvalTransform, TrainTransform
from ftlib.data.decode import DecodeError
from ftlib.data.order import Microbatch, owned, step_plan

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset, Split

AHEAD = 2
"""Microbatches that each process (or the thread) works ahead."""


class LoadError(ValueError):
    """A picture could not be read while training; the message says which, and what to do."""


@dataclass(frozen=True)
class Batch:
    step: int
    """Optimizer step, from 0, over the whole run (0 at evaluation)."""
    epoch: int
    """Epoch, from 0 (0 at evaluation)."""
    k: int
    """The microbatch's position within the step; at evaluation the batch's within the split."""
    images_in_step: int
    """Images in all microbatches of the step, over all workers."""
    rows: torch.Tensor
    """int64[b]: rows of the split."""
    labels: torch.Tensor
    """int64[b]"""
    images: torch.Tensor
    """uint8[b, S, S, 3]"""

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes only the images go through shared memory, which costs a handshake per tensor.
        return _batch, (self.step, self.epoch, self.k, self.images_in_step, self.rows.numpy(), self.labels.numpy(), self.images)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader: the same with tensors in page-locked memory."""
        tensors = (t.pin_memory() for t in (self.rows, self.labels, self.images))
        return Batch(self.step, self.epoch, self.k, self.images_in_step, *tensors)


def _batch(step: int, epoch: int, k: int, images_in_step: int, rows: np.ndarray, labels: np.ndarray, images: torch.Tensor) -> Batch:
    return Batch(step, epoch, k, images_in_step, torch.from_numpy(rows), torch.from_numpy(labels), images)


def train_batches(dataset: Dataset, rows: np.ndarray, run: config.Run, rank: int, world: int, start_step: int, stop_step: int, workers: int) -> Batches:
    """The microbatches of worker `rank` of `world`, of steps start_step to stop_step - 1 of training on `rows` (int64[n]) of the
    train split, in order. `workers` loader processes; 0 loads in a thread. Close it, or use it in a `with`.

    Iterating raises LoadError for pictures that cannot be read."""
    train = run.train
    plan = (
        mb
        for step in range(start_step, stop_step)
        for mb in owned(step_plan(run.seed, step, rows, train.batch_size, train.microbatch_size), rank, world)
    )
    return Batches(_TrainSource(dataset, run.augment, run.seed), plan, workers)


def eval_batches(split: Split, rows: np.ndarray, size: int, crop: float, batch_size: int, workers: int) -> Batches:
    """`rows` (int64[n]) of a split in their order, in batches of `batch_size` (the last may be smaller), as `EvalTransform` makes them."""
    plan = (
        Microbatch(step=0, epoch=0, k=k, rows=rows[start : start + batch_size], images_in_step=min(batch_size, len(rows) - start))
        for k, start in enumerate(range(0, len(rows), batch_size))
    )
    return Batches(_EvalSource(split, size, crop), plan, workers)


# --- sources: a microbatch of the plan -> a Batch. Picklable; what they open, they open in the process that reads ---------------------

class _TrainSource:
    def __init__(self, dataset: Dataset, augment: config.Augment, seed: int) -> None:
        self.dataset, self.transform, self.size = dataset, TrainTransform(augment, seed), augment.size

    @cached_property
    def split(self) -> Split:
        return self.dataset.split("train")

    @cached_property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def __getitem__(self, mb: Microbatch) -> Batch | _Failure:
        return _load(mb, self.split, self.labels, self.size, lambda jpeg, row, out: self.transform(jpeg, mb.epoch, row, out))


class _EvalSource:
    def __init__(self, split: Split, size: int, crop: float) -> None:
        self.split, self.size, self.transform = split, size, EvalTransform(size, crop)

    @cached_property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def __getitem__(self, mb: Microbatch) -> Batch | _Failure:
        return _load(mb, self.split, self.labels, self.size, lambda jpeg, _, out: self.transform(jpeg, out))


@dataclass(frozen=True)
class _Failure:
    """An error on its way from the reading process: as a value, since DataLoader would bury its message in a traceback."""

    message: str


def _load(mb: Microbatch, split: Split, labels: np.ndarray, size: int, transform: Any) -> Batch | _Failure:
    images = _empty_images(len(mb.rows), size)
    row = -1
    try:
        for out, row in zip(images.numpy(), mb.rows.tolist()):
            transform(split.image(row), row, out)
    except DecodeError as error:
        return _Failure(f"{split.where(row)}: {error}. The stored data are damaged: check them with jobs/prepare.py --verify, and restore or prepare them again")
    except Exception as error:  # whatever it is, it must reach the training process and say which picture
        return _Failure(f"{split.where(row) if row >= 0 else 'the loader'}: {type(error).__name__}: {error}")
    rows = torch.from_numpy(np.array(mb.rows, np.int64))
    return Batch(mb.step, mb.epoch, mb.k, mb.images_in_step, rows, torch.from_numpy(np.array(labels[mb.rows], np.int64)), images)


def _empty_images(n: int, size: int) -> torch.Tensor:
    """uint8[n, size, size, 3], in a loader process in memory that the training process can map."""
    shape = (n, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(n * size * size * 3)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


# --- the iterator -------------------------------------------------------------------------------------------------------------------

class Batches(Iterator[Batch]):
    """Batches in the order of a plan; a context manager. `close()` ends its processes or thread, and is idempotent."""

    def __init__(self, source: _TrainSource | _EvalSource, plan: Iterable[Microbatch], workers: int, pin_memory: bool | None = None) -> None:
        """`pin_memory`: page-lock the batches, for copies to a GPU that do not wait; None does where there is a GPU."""
        if workers < 0:
            raise ValueError(f"{workers} loader workers: needs 0 (a thread) or more processes")
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._items: _Thread | Iterator[Any] | None = _Thread(source, plan, pin) if workers == 0 else _processes(source, plan, workers, pin)

    def __next__(self) -> Batch:
        if self._items is None:
            raise StopIteration
        try:
            item = next(self._items)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # A torn connection is noticed before the process's end is; torch itself reports an end as RuntimeError.
            died = not isinstance(error, RuntimeError) or (not isinstance(self._items, _Thread) and any(not w.is_alive() for w in self._items._workers))
            self.close()
            if not died:
                raise
            raise LoadError(
                "a loader process died. Most often memory ran out: lower data.loader_workers, or give the machine or container more memory (and more "
                f"/dev/shm). What it left: {type(error).__name__}: {error}") from None
        if isinstance(item, _Failure):
            self.close()
            raise LoadError(item.message)
        return item

    def close(self) -> None:
        items, self._items = self._items, None
        if isinstance(items, _Thread):
            items.close()
        elif items is not None:
            items._shutdown_workers()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_items", None) is not None:
            self.close()


class _Thread(Iterator[Any]):
    """Loads in one background thread: decoding and OpenCV let the interpreter go."""

    END = object()

    def __init__(self, source: Any, plan: Iterable[Microbatch], pin: bool) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=_Thread._fill, args=(source, plan, pin, self._ready, self._stop), name="ftlib-loader", daemon=True)
        self._thread.start()

    @staticmethod  # holds no reference to the iterator, so that dropping the iterator ends the thread
    def _fill(source: Any, plan: Iterable[Microbatch], pin: bool, ready: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            for mb in plan:
                if stop.is_set():
                    return
                item = source[mb]
                ready.put(item.pin_memory() if pin and isinstance(item, Batch) else item)
        except Exception as error:
            ready.put(_Failure(f"the loader: {type(error).__name__}: {error}"))
        ready.put(_Thread.END)

    def __next__(self) -> Any:
        item = self._ready.get()
        if item is _Thread.END:
            raise StopIteration
        return item

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # makes room, should it be waiting to put one


def _processes(source: Any, plan: Iterable[Microbatch], workers: int, pin: bool) -> Iterator[Any]:
    loader = DataLoader(
        source, batch_size=None, sampler=plan, num_workers=workers, prefetch_factor=AHEAD, collate_fn=_as_it_is, pin_memory=pin,
        multiprocessing_context=_context(), worker_init_fn=_start_worker, generator=torch.Generator())  # its own generator: torch's stays untouched
    return iter(loader)


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """In a new loader process: one thread each, and an end with the training process, however that ends."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="ftlib-watchdog", daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


class _Popen(popen_forkserver.Popen):
    """Starts a process that does not import the training process's main module again: loading needs nothing of it, and in a Ray
    worker it would bring all of Ray into each loader process."""

    def _launch(self, process_obj: Any) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super()._launch(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def _context() -> _Context:
    """The fork server's context, the server running and this module imported in it."""
    context = _Context()
    context.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"  # the server looks for this module there
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context
