"""Which validation images a finished run got right: read from its folder, or worked out once from its best model and kept there."""

from __future__ import annotations

import contextlib
import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftlib.storage import DamagedError, folders, join, read_file, read_json, write_file


class ComparisonError(ValueError):
    """Runs that cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class StoredPredictions:
    """Answers of a run's best model on the validation images, in the order of their rows."""

    rows: np.ndarray
    """int64[n]: rows of the validation split."""
    labels: np.ndarray
    """int64[n]: right answers."""
    correct: np.ndarray
    """bool[n]: whether the first answer was right."""

    @property
    def top1(self) -> float:
        return 100 * float(self.correct.mean())


def answers(run_dir: str) -> StoredPredictions:
    """The run's answers on the whole validation split. Raises ComparisonError when there is no finished run with a model there."""
    if (stored := stored_answers(run_dir)) is not None:
        return stored
    if (read_json(join(run_dir, "result.json")) or {}).get("status") != "completed":
        raise ComparisonError(
            f"{run_dir}: there is no finished run. Let it finish (the same command goes on with it), or name another one"
        )
    found = _predict(run_dir)
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        rows=found.rows,
        labels=found.labels,
        correct=found.correct,
        logits=found.logits.astype(np.float16),
        split="val",
    )
    write_file(join(run_dir, "predictions.npz"), packed.getvalue())
    return _sorted(found.rows, found.labels, found.correct)


def stored_answers(run_dir: str) -> StoredPredictions | None:
    """What an earlier evaluation left, or None. Answers on other images than the validation split's (a tuning split's) do not count."""
    run = (read_json(join(run_dir, "run.json")) or {}).get("run", {})
    own_split = "tuning" if run.get("data", {}).get("tuning_fraction") else "val"
    best = sorted(folders(join(run_dir, "best")), reverse=True)
    for uri in (
        join(run_dir, "predictions.npz"),
        *(join(run_dir, "best", b, "predictions.npz") for b in best[:1]),
    ):
        data = read_file(uri)
        if data is None:
            continue
        with (
            contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile),
            np.load(io.BytesIO(data), allow_pickle=False) as file,
        ):
            correct = (
                file["correct"]
                if "correct" in file
                else file["top1"]
                if "top1" in file
                else file["logits"].argmax(1) == file["labels"]
            )
            if (str(file["split"]) if "split" in file else own_split) == "val":
                return _sorted(file["rows"], file["labels"], correct)
    return None


def _sorted(rows: np.ndarray, labels: np.ndarray, correct: np.ndarray) -> StoredPredictions:
    order = np.argsort(rows, kind="stable")
    return StoredPredictions(
        rows[order].astype(np.int64), labels[order].astype(np.int64), correct[order].astype(bool)
    )


def _predict(run_dir: str) -> Any:
    import torch

    from ftlib.config import Run
    from ftlib.data.loader import eval_batches
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
    with contextlib.closing(
        eval_batches(
            split,
            rows,
            run.eval_size,
            run.evaluate.crop,
            run.evaluate.batch_size,
            max(run.data.loader_workers, 0),
        )
    ) as batches:
        return predict(loaded.model.to(device), batches, device, run.data.mean, run.data.std)
