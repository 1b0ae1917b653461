"""Which validation images a finished run classified correctly: read from its folder, or computed
once from its best model and kept there."""

from __future__ import annotations

import contextlib
import io
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftlib.storage import DamagedError, folders, join, read_file, read_json, write_file

if TYPE_CHECKING:
    from ftlib.training.evaluate import Predictions

FILE = "predictions.npz"
TOLERANCE = 1.0
"""Points of top-1 by which predictions may differ from the score in result.json: training scores
in the run's precision, predictions are made in float32."""


class ComparisonError(ValueError):
    """Runs that cannot be compared. The message says why and what to do."""


@dataclass(frozen=True)
class StoredPredictions:
    """Predictions of a run's best model on the validation images, ordered by row."""

    rows: np.ndarray
    """int64[n]: rows of the validation split."""
    labels: np.ndarray
    """int64[n]: true classes."""
    correct: np.ndarray
    """bool[n]: whether the class with the highest score was the true one."""

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * float(self.correct.mean())


def predictions(run_dir: str) -> StoredPredictions:
    """The run's predictions on the whole validation split, computed and kept if need be.

    Raises ComparisonError when `run_dir` holds no finished run with a model, and when its best
    model does not have the score that the run reports.
    """
    if (stored := stored_predictions(run_dir)) is not None:
        return stored
    if (read_json(join(run_dir, "result.json")) or {}).get("status") != "completed":
        raise ComparisonError(
            f"{run_dir}: there is no finished run. Let it finish (the same command goes on with "
            "it), or name another one"
        )
    found = _predict(run_dir)
    reported, top1 = _reported_top1(run_dir), 100 * float(found.correct.mean())
    if not _agrees(top1, reported):
        raise ComparisonError(
            f"{run_dir}: the run reports {reported:.2f} % validation top-1, but its best model has "
            f"{top1:.2f} %: these weights are not those that were scored. Train the run again"
        )
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        rows=found.rows,
        labels=found.labels,
        correct=found.correct,
        logits=found.logits.astype(np.float16),
        split="val",
        weights=_best_weights(run_dir),
    )
    write_file(join(run_dir, FILE), packed.getvalue())
    return _by_row(found.rows, found.labels, found.correct)


def stored_predictions(run_dir: str) -> StoredPredictions | None:
    """Validation predictions that an earlier evaluation left, or None.

    A damaged file, predictions of a tuning split, and those of other weights than the present best
    model's do not count.
    """
    run = (read_json(join(run_dir, "run.json")) or {}).get("run", {})
    own_split = "tuning" if run.get("data", {}).get("tuning_fraction") else "val"
    best = sorted(folders(join(run_dir, "best")), reverse=True)
    weights = _best_weights(run_dir)
    for uri in (join(run_dir, FILE), *(join(run_dir, "best", b, FILE) for b in best[:1])):
        data = read_file(uri)
        if data is None:
            continue
        with (
            contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile),
            np.load(io.BytesIO(data), allow_pickle=False) as file,
        ):
            split = str(file["split"]) if "split" in file else own_split
            known = str(file["weights"]) if "weights" in file else weights
            found = _by_row(file["rows"], file["labels"], _correct(file))
            reported = _reported_top1(run_dir)
            if split == "val" and known == weights and _agrees(found.top1, reported):
                return found
    return None


def _best_weights(run_dir: str) -> str:
    """sha256 of the best model's weights; empty where it is not known."""
    for name in sorted(folders(join(run_dir, "best")), reverse=True)[:1]:
        with contextlib.suppress(DamagedError, KeyError, TypeError):
            manifest = read_json(join(run_dir, "best", name, "manifest.json")) or {}
            return str(manifest["files"]["model.safetensors"]["sha256"])
    return ""


def _reported_top1(run_dir: str) -> float | None:
    """Validation top-1 of the best epoch in result.json, percent; None for other splits."""
    result = read_json(join(run_dir, "result.json")) or {}
    return result.get("metrics", {}).get("best/val_top1")


def _agrees(top1: float, reported: float | None) -> bool:
    return reported is None or abs(top1 - reported) <= TOLERANCE


def _correct(file: np.lib.npyio.NpzFile) -> np.ndarray:
    for name in ("correct", "top1"):
        if name in file:
            return file[name]
    return file["logits"].argmax(1) == file["labels"]


def _by_row(rows: np.ndarray, labels: np.ndarray, correct: np.ndarray) -> StoredPredictions:
    order = np.argsort(rows, kind="stable")
    return StoredPredictions(
        rows[order].astype(np.int64), labels[order].astype(np.int64), correct[order].astype(bool)
    )


def _predict(run_dir: str) -> Predictions:
    import torch

    from ftlib.config import Run
    from ftlib.data.loader import scored_batches
    from ftlib.data.shards import Dataset
    from ftlib.settings import from_dict
    from ftlib.training.evaluate import predict
    from ftlib.training.initial_weights import load_run_model

    try:
        about = read_json(join(run_dir, "run.json")) or {}
    except DamagedError as error:
        raise ComparisonError(str(error)) from None
    loaded = load_run_model(run_dir)
    run = from_dict(Run, about["run"])
    split = Dataset.open(about["data"]["path"]).split("val")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = np.arange(len(split), dtype=np.int64)
    with scored_batches(run, split, rows, workers=max(run.data.loader_workers, 0)) as batches:
        return predict(loaded.model.to(device), batches, device, run.data.mean, run.data.std)
