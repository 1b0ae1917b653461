"""Checkpoints of a run: written beside training, verified before they are read, ordered by step.

    <run>/checkpoints/step-00001234/   state.pt, manifest.json      for resuming
    <run>/best/step-00001234/          model.safetensors, model.json, manifest.json    for use;
                                       sample.json: some scored rows and their losses

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
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as safetensors_save

from ftlib import storage
from ftlib.storage import DamagedError, StorageError, join

log = logging.getLogger(__name__)

SAMPLE = "sample.json"
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


@dataclass(frozen=True)
class StoredModel:
    """A best model on disk, every byte of its folder checked."""

    folder: str
    about: dict[str, Any]
    """Contents of model.json."""
    files: dict[str, bytes]


def read_best(run_dir: str, step: int) -> StoredModel | None:
    """The best model of `step`; None where it is not there or damaged."""
    folder = join(run_dir, "best", step_name(step))
    try:
        files, _ = storage.read_folder(folder)
        return StoredModel(folder, json.loads(files["model.json"]), files)
    except (DamagedError, StorageError, KeyError, ValueError):
        return None


def verify_best(run_dir: str, step: int, epoch: int) -> StoredModel:
    """The best model, which is the one of this step and epoch.

    Raises StorageError where another model, a damaged one or none is there: its scores would be
    those of weights that it does not hold.
    """
    found = read_best(run_dir, step)
    if found is None or (found.about.get("step"), found.about.get("epoch")) != (step, epoch):
        held = "nothing that verifies"
        if found is not None:
            held = f"the model of epoch {found.about.get('epoch')}"
        raise StorageError(
            f"{join(run_dir, 'best', step_name(step))} should hold the best model, of epoch "
            f"{epoch}, and holds {held}. Give the same command again: the run goes on from its "
            "newest checkpoint and writes its best model anew"
        )
    return found


@dataclass(frozen=True)
class _BestModel:
    step: int
    weights: dict[str, torch.Tensor]
    about: dict[str, Any]
    sample: dict[str, Any] | None


class CheckpointWriter:
    """Writes one run's checkpoints in a background thread; used by rank 0 only.

    Checkpoints and best models are counted apart. A write that fails is tried again once. A best
    model that could not be written is kept in memory and tried again before every later write.
    After MAX_FAILED_WRITES failures in a row of one kind `check` raises StorageError. Training goes
    on meanwhile, and older files stay as they are: an earlier best model is deleted only once a
    checkpoint that names the new one is on disk.

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
        self._failed_checkpoints: list[StorageError] = []
        self._failed_bests: list[StorageError] = []
        self._unsaved_best: _BestModel | None = None  # of the writing thread
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
            self._delete_old(step)

        def job() -> None:
            self._retry_best()
            if self._twice(write, self._failed_checkpoints) and done is not None:
                done()

        self._submit(job)

    def save_best(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        about: dict[str, Any],
        sample: dict[str, Any] | None = None,
    ) -> None:
        """Write `weights` as the best model so far. The next `save` deletes all but the
        `keep_best` newest. sample: rows and losses of some scored images (see `scoring`)."""
        copy = {k: v.contiguous() for k, v in snapshot(weights).items()}
        best = _BestModel(step, copy, about, sample)
        self._submit(lambda: self._write_best(best))

    def _write_best(self, best: _BestModel) -> None:
        def write() -> None:
            files = {
                "model.safetensors": safetensors_save(best.weights),
                "model.json": json.dumps(best.about, indent=2).encode(),
            }
            if best.sample is not None:
                files[SAMPLE] = json.dumps(best.sample).encode()
            storage.write_folder(
                join(self.best, step_name(best.step)),
                files,
                {"step": best.step, "owner": self.owner},
            )

        self._unsaved_best = None if self._twice(write, self._failed_bests) else best

    def _retry_best(self) -> None:
        """Write the newest best model, if that has failed before."""
        if self._unsaved_best is not None:
            self._write_best(self._unsaved_best)

    def _delete_old(self, step: int) -> None:
        """Once the checkpoint of `step` is safe. Best models of later steps are left over from
        before a start at the beginning: they are written again in their turn."""
        self.fence()
        for old in steps(self.checkpoints)[self.keep_last :]:
            storage.delete_folder(join(self.checkpoints, step_name(old)))
        bests = steps(self.best)
        kept = [s for s in bests if s <= step][: self.keep_best]
        for old in set(bests) - set(kept):
            storage.delete_folder(join(self.best, step_name(old)))

    def forget_after(self, step: int) -> None:
        """Delete best models of later steps: those of an earlier life of the run, which goes on
        at `step`. They are written again in their turn, or others are."""
        self.fence()
        for later in [s for s in steps(self.best) if s > step]:
            storage.delete_folder(join(self.best, step_name(later)))

    def _twice(self, write: Callable[[], None], failed: list[StorageError]) -> bool:
        """Whether `write` succeeded at the first or second try; failures in a row are counted."""
        for attempt in (1, 2):
            try:
                self.fence()
                write()
            except StorageError as error:
                if attempt == 1:
                    time.sleep(1)
                    continue
                log.warning("%s (tried twice)", error)
                with self._lock:
                    failed.append(error)
            else:
                with self._lock:
                    failed.clear()
                return True
        return False

    def _submit(self, job: Callable[[], None]) -> None:
        self.check()
        # At most two copies of the weights wait in memory: a best model and the state after it.
        while len(self._pending) > 1:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(job))

    def check(self) -> None:
        """Raise StorageError when the storage has failed for too long."""
        kinds = (("checkpoints", self._failed_checkpoints), ("best models", self._failed_bests))
        with self._lock:
            for kind, failed in kinds:
                if len(failed) >= MAX_FAILED_WRITES:
                    raise StorageError(
                        f"{len(failed)} {kind} in a row could not be written: {failed[-1]}"
                    )
        for future in [f for f in self._pending if f.done()]:
            self._pending.remove(future)
            future.result()

    def wait(self) -> None:
        """Until everything handed over is on disk.

        Raises StorageError if the newest checkpoint or the best model is not.
        """
        self._pending.append(self._pool.submit(self._retry_best))
        while self._pending:
            self._pending.pop(0).result()
        with self._lock:
            for failed in (self._failed_checkpoints, self._failed_bests):
                if failed:
                    raise failed[-1]

    def close(self) -> None:
        self._pool.shutdown(wait=True)
