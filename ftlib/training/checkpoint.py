"""Checkpoints of a run: written beside training, verified before they are read, ordered by step.

    <run>/checkpoints/step-00001234/   state.pt, manifest.json      for resuming
    <run>/best/step-00001234/          model.safetensors, model.json, manifest.json    for use

The training thread only copies the tensors (`snapshot`); serialising, hashing and writing happen in
one background thread.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import save as safetensors_save

from ftlib import storage
from ftlib.storage import DamagedError, StorageError, join

log = logging.getLogger(__name__)

MAX_FAILED_WRITES = 3
"""Checkpoints in a row that may fail before the run is stopped."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(uri: str) -> list[int]:
    """Steps of the folders below `uri`, newest first."""
    return sorted(
        (int(n[5:]) for n in storage.folders(uri) if n.startswith("step-") and n[5:].isdigit()),
        reverse=True,
    )


def snapshot(tree: Any) -> Any:
    """A copy of a nest of dicts, lists and tensors that later training does not change; tensors
    on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {k: snapshot(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(snapshot(v) for v in tree)
    return tree


def latest(uri: str, only: int | None = None) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint below `uri` that verifies, or None.

    Damaged ones are passed over with a warning. With `only`, no other step than that one is tried.
    """
    for step in steps(uri) if only is None else [only]:
        folder = join(uri, step_name(step))
        try:
            files, _ = storage.read_folder(folder)
            # weights_only: a checkpoint is data; nothing in it is ever run.
            return step, torch.load(
                io.BytesIO(files["state.pt"]), map_location="cpu", weights_only=True
            )
        except (
            DamagedError,
            KeyError,
            RuntimeError,
            EOFError,
            OSError,
            pickle.UnpicklingError,
        ) as error:
            log.warning(
                "checkpoint %s cannot be used (%s); going back to the one before it",
                folder,
                str(error).splitlines()[0],
            )
    return None


class CheckpointWriter:
    """Writes one run's checkpoints in a background thread; used by rank 0 only.

    A write that fails is tried again once; after MAX_FAILED_WRITES checkpoints in a row that
    failed, `check` raises StorageError. Training goes on meanwhile, and older checkpoints stay as
    they are.

    Before each write and each deletion `fence` is called, which raises when another launch has
    taken the run over. `owner` names this launch in the manifests.
    """

    def __init__(
        self,
        run_dir: str,
        keep_last: int,
        keep_best: int,
        *,
        fence: Callable[[], None] = lambda: None,
        owner: str = "",
    ) -> None:
        self.fence, self.owner = fence, owner
        self.checkpoints, self.best = join(run_dir, "checkpoints"), join(run_dir, "best")
        self.keep_last, self.keep_best = keep_last, keep_best
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._failed: list[StorageError] = []
        self._lock = threading.Lock()
        for uri in (self.checkpoints, self.best):
            storage.delete_temporary(uri)

    def save(
        self, step: int, state: dict[str, Any], done: Callable[[], None] | None = None
    ) -> None:
        """Write the training state of `step`; `done` is called in the writing thread once it is
        safe on disk."""
        copy = snapshot(state)

        def write() -> None:
            buffer = io.BytesIO()
            torch.save(copy, buffer)
            storage.write_folder(
                join(self.checkpoints, step_name(step)),
                {"state.pt": buffer.getvalue()},
                {"step": step, "owner": self.owner},
            )
            self.fence()
            for old in steps(self.checkpoints)[self.keep_last :]:
                storage.delete_folder(join(self.checkpoints, step_name(old)))

        self._submit(write, done)

    def save_best(self, step: int, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Write `weights` as the best model so far, and keep the `keep_best` newest of these."""
        copy = {k: v.contiguous() for k, v in snapshot(weights).items()}

        def write() -> None:
            files = {
                "model.safetensors": safetensors_save(copy),
                "model.json": json.dumps(about, indent=2).encode(),
            }
            storage.write_folder(
                join(self.best, step_name(step)), files, {"step": step, "owner": self.owner}
            )
            self.fence()
            for old in steps(self.best)[self.keep_best :]:
                storage.delete_folder(join(self.best, step_name(old)))

        self._submit(write, None)

    def _submit(self, write: Callable[[], None], done: Callable[[], None] | None) -> None:
        self.check()

        def guarded() -> None:
            for attempt in (1, 2):
                try:
                    self.fence()
                    write()
                except StorageError as error:
                    log.warning("%s (try %d of 2)", error, attempt)
                    if attempt == 2:
                        with self._lock:
                            self._failed.append(error)
                    else:
                        time.sleep(1)
                else:
                    with self._lock:
                        self._failed.clear()
                    if done is not None:
                        done()
                    return

        while (
            len(self._pending) > 1
        ):  # at most two copies of the weights wait in memory: a best model and the state after it
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(guarded))

    def check(self) -> None:
        """Raise when the storage has failed for too long."""
        with self._lock:
            if len(self._failed) >= MAX_FAILED_WRITES:
                raise StorageError(
                    f"{len(self._failed)} checkpoints in a row could not be written: "
                    f"{self._failed[-1]}"
                )
        for future in [f for f in self._pending if f.done()]:
            self._pending.remove(future)
            future.result()

    def wait(self) -> None:
        """Until everything handed over is on disk.

        Raises StorageError if the newest checkpoint is not.
        """
        while self._pending:
            self._pending.pop(0).result()
        with self._lock:
            if self._failed:
                raise self._failed[-1]

    def close(self) -> None:
        self._pool.shutdown(wait=True)
