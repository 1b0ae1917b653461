"""Prepared pictures to batches of uint8, in the order of the plan, from one iterator that lasts the whole run.

A microbatch is read, decoded and augmented whole by one process, straight into memory that the training process shares (`ftlib.data.shared_memory`);
no pixel is copied on the way. What a batch holds depends on its place in the plan alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from ftlib import config
from ftlib.data.augment import EvalTransform, TrainTransform
from ftlib.data.decode import DecodeError
from ftlib.data.fork_server import context
from ftlib.data.sampler import Microbatch, owned, step_plan
from ftlib.data.shared_memory import SharedMemoryRing, lease

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset, Split

AHEAD = 2
"""Microbatches that each process (or the thread) works ahead."""
HELD = 4
"""Microbatches that the training process may hold at a time before new ones take memory of their own."""


class LoadError(ValueError):
    """A picture could not be read while training; the message says which, and what to do."""


@dataclass(frozen=True)
class Batch:
    step: int
    """Optimizer step, from 0, over the whole run (0 at evaluation)."""
    epoch: int
    """Epoch, from 0 (0 at evaluation)."""
    index: int
    """The microbatch's position within the step; at evaluation the batch's within the split."""
    images_in_step: int
    """Images in all microbatches of the step, over all workers."""
    rows: torch.Tensor
    """int64[b]: rows of the split."""
    labels: torch.Tensor
    """int64[b]"""
    images: torch.Tensor
    """uint8[b, S, S, 3]"""

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader: the same with tensors in page-locked memory."""
        tensors = (t.pin_memory() for t in (self.rows, self.labels, self.images))
        return Batch(self.step, self.epoch, self.index, self.images_in_step, *tensors)


def train_batches(
    dataset: Dataset,
    rows: np.ndarray,
    run: config.Run,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
    workers: int,
) -> Batches:
    """The microbatches of worker `rank` of `world`, of steps start_step to stop_step - 1 of training on `rows` (int64[n]) of the
    train split, in order. `workers` loader processes; 0 loads in a thread. Close it, or use it in a `with`.

    Iterating raises LoadError for pictures that cannot be read."""
    train = run.train
    plan = (
        mb
        for step in range(start_step, stop_step)
        for mb in owned(
            step_plan(run.seed, step, rows, train.batch_size, train.microbatch_size), rank, world
        )
    )
    return Batches(
        _TrainSource(dataset, run.augment, run.seed), plan, train.microbatch_size, workers
    )


def eval_batches(
    split: Split, rows: np.ndarray, size: int, crop: float, batch_size: int, workers: int
) -> Batches:
    """`rows` (int64[n]) of a split in their order, in batches of `batch_size` (the last may be smaller), as `EvalTransform` makes them."""
    plan = (
        Microbatch(
            step=0,
            epoch=0,
            index=index,
            rows=rows[start : start + batch_size],
            images_in_step=min(batch_size, len(rows) - start),
        )
        for index, start in enumerate(range(0, len(rows), batch_size))
    )
    return Batches(_EvalSource(split, size, crop), plan, batch_size, workers)


# --- sources: (a microbatch of the plan, memory) -> a Batch. Picklable; what they open, they open in the process that reads ---


class _TrainSource:
    def __init__(self, dataset: Dataset, augment: config.Augment, seed: int) -> None:
        self.dataset, self.transform, self.size = (
            dataset,
            TrainTransform(augment, seed),
            augment.size,
        )

    @cached_property
    def split(self) -> Split:
        return self.dataset.split("train")

    @cached_property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def load(self, mb: Microbatch, images: np.ndarray) -> Batch | _Failure:
        return _load(
            mb,
            self.split,
            self.labels,
            images,
            lambda jpeg, row, out: self.transform(jpeg, mb.epoch, row, out),
        )


class _EvalSource:
    def __init__(self, split: Split, size: int, crop: float) -> None:
        self.split, self.size, self.transform = split, size, EvalTransform(size, crop)

    @cached_property
    def labels(self) -> np.ndarray:
        return self.split.labels

    def load(self, mb: Microbatch, images: np.ndarray) -> Batch | _Failure:
        return _load(
            mb, self.split, self.labels, images, lambda jpeg, _, out: self.transform(jpeg, out)
        )


@dataclass(frozen=True)
class _Failure:
    """An error on its way from the reading process: as a value, since DataLoader would bury its message in a traceback."""

    message: str


def _load(
    mb: Microbatch, split: Split, labels: np.ndarray, images: np.ndarray, transform: Any
) -> Batch | _Failure:
    row = -1
    try:
        for out, row in zip(images, mb.rows.tolist()):
            transform(split.image(row), row, out)
    except DecodeError as error:
        return _Failure(
            f"{split.where(row)}: {error}. The stored data are damaged: check them with jobs/prepare.py --verify, and restore or prepare them again"
        )
    except (
        Exception
    ) as error:  # whatever it is, it must reach the training process and say which picture
        return _Failure(
            f"{split.where(row) if row >= 0 else 'the loader'}: {type(error).__name__}: {error}"
        )
    return _batch(mb, np.array(labels[mb.rows], np.int64), images)


def _batch(mb: Microbatch, labels: np.ndarray, images: np.ndarray) -> Batch:
    rows = torch.from_numpy(np.array(mb.rows, np.int64))
    return Batch(
        mb.step,
        mb.epoch,
        mb.index,
        mb.images_in_step,
        rows,
        torch.from_numpy(labels),
        torch.from_numpy(images),
    )


# --- between processes ----------------------------------------------------------------------------


class _Filler:
    """In a loader process: (microbatch, slot) -> what crosses to the training process, where it is a Batch or a _Failure again. Only the
    images lie in shared memory; the few labels travel in the message, without a handshake per tensor."""

    def __init__(self, source: _TrainSource | _EvalSource, ring: Any) -> None:
        self.source, self.ring, self.number = source, ring, ring.number

    def __getitem__(self, item: tuple[Microbatch, int | None]) -> Any:
        mb, slot = item
        shape = (len(mb.rows), self.source.size, self.source.size, 3)
        images = np.empty(shape, np.uint8) if slot is None else self.ring.view(slot, shape)
        found = self.source.load(mb, images)
        return (
            found
            if isinstance(found, _Failure)
            else _Message(
                mb, found.labels.numpy(), images if slot is None else (self.number, slot, shape)
            )
        )


@dataclass(frozen=True)
class _Message:
    mb: Microbatch
    labels: np.ndarray
    images: np.ndarray | tuple[int, int, tuple[int, ...]]
    """The pixels themselves, or the ring's number, the slot and the shape."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.mb, self.labels, self.images)


def _received(
    mb: Microbatch, labels: np.ndarray, images: np.ndarray | tuple[int, int, tuple[int, ...]]
) -> Batch:
    return _batch(mb, labels, lease(*images) if isinstance(images, tuple) else images)


def _with_slots(
    plan: Iterable[Microbatch], ring: SharedMemoryRing, bytes_per_image: int
) -> Iterator[tuple[Microbatch, int | None]]:
    for mb in plan:
        yield mb, ring.take(len(mb.rows) * bytes_per_image)


# --- the iterator ---------------------------------------------------------------------------------


class Batches(Iterator[Batch]):
    """Batches in the order of a plan; a context manager. `close()` ends its processes or thread, and is idempotent."""

    def __init__(
        self,
        source: _TrainSource | _EvalSource,
        plan: Iterable[Microbatch],
        largest: int,
        workers: int,
        pin_memory: bool | None = None,
    ) -> None:
        """`largest`: images in the plan's largest microbatch. `pin_memory`: page-lock the batches, for copies to a GPU that do not wait; None does where there is a GPU."""
        if workers < 0:
            raise ValueError(f"{workers} loader workers: needs 0 (a thread) or more processes")
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._items: _Thread | Iterator[Any] | None = (
            _Thread(source, plan, pin)
            if workers == 0
            else _processes(source, plan, largest, workers, pin)
        )

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
            died = not isinstance(error, RuntimeError) or (
                not isinstance(self._items, _Thread)
                and any(not w.is_alive() for w in self._items._workers)
            )
            self.close()
            if not died:
                raise
            raise LoadError(
                "a loader process died. Most often memory ran out: lower data.loader_workers, or give the machine or container more memory. "
                f"What it left: {type(error).__name__}: {error}"
            ) from None
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        self._thread = threading.Thread(
            target=_Thread._fill,
            args=(source, plan, pin, self._ready, self._stop),
            name="ftlib-loader",
            daemon=True,
        )
        self._thread.start()

    @staticmethod  # holds no reference to the iterator, so that dropping the iterator ends the thread
    def _fill(
        source: Any,
        plan: Iterable[Microbatch],
        pin: bool,
        ready: queue.Queue[Any],
        stop: threading.Event,
    ) -> None:
        try:
            for mb in plan:
                if stop.is_set():
                    return
                item = source.load(
                    mb, np.empty((len(mb.rows), source.size, source.size, 3), np.uint8)
                )
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


def _processes(
    source: Any, plan: Iterable[Microbatch], largest: int, workers: int, pin: bool
) -> Iterator[Any]:
    bytes_per_image = source.size * source.size * 3
    ring = SharedMemoryRing(AHEAD * workers + HELD, largest * bytes_per_image)
    loader: DataLoader[Any] = DataLoader(
        _Filler(source, ring),
        batch_size=None,
        sampler=_with_slots(plan, ring, bytes_per_image),
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        pin_memory=pin,
        multiprocessing_context=context(__name__),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )  # its own generator: torch's stays untouched
    return iter(loader)


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """In a new loader process: one thread each, and an end with the training process, however that ends."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_end_with, args=(parent.sentinel,), name="ftlib-watchdog", daemon=True
        ).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
