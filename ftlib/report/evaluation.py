"""Score a finished run's model: its weights, the pictures, the size, and the calibration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ftlib.config import Run
from ftlib.data import sampler
from ftlib.data.loader import loaders_for, scored_batches
from ftlib.data.shards import Dataset, Split
from ftlib.report.calibration import Calibration, cross_fitted, held_out
from ftlib.report.metrics import Floats, IntervalEstimate, Ints, TestSplit, scores
from ftlib.storage import join
from ftlib.training import checkpoint, seen_rows
from ftlib.training.evaluate import predict
from ftlib.training.initial_weights import LoadedModel, load_run_model
from ftlib.training.loop import precision
from ftlib.training.probe import compute_features

Weights = Literal["best", "last", "raw"]


class EvaluationError(ValueError):
    """A run, data set or size that cannot be evaluated; the message says what to do."""


@dataclass(frozen=True)
class Scored:
    """A model's predictions on some pictures and their scores."""

    split: Split
    rows: Ints
    """int64[n]: rows of `split`."""
    labels: Ints
    """int64[n]"""
    logits: Floats
    """float32[n, C], as the model gave them."""
    size: int
    flip: bool
    calibration: Calibration
    before: dict[str, IntervalEstimate]
    """What `metrics.scores` gives of the logits as they are."""
    after: dict[str, IntervalEstimate]
    """The same after temperature scaling; the temperature was fitted on other images."""

    chose: bool = False
    """Whether the epoch of the model was chosen by its score on these pictures."""

    @property
    def cells(self) -> dict[str, str]:
        """Head -> text of a table's row."""
        top5 = {"top-5 %": self.before["top5"].show()} if "top5" in self.before else {}
        return {
            "top-1 %": self.before["top1"].show(),
            **top5,
            "NLL": self.before["nll"].show(3),
            "ECE": self.before["ece"].show(3),
            "NLL calibrated": self.after["nll"].show(3),
            "ECE calibrated": self.after["ece"].show(3),
            "temperature": f"{self.calibration.temperature:.3f}",
        }

    @property
    def plain(self) -> dict[str, float]:
        """Metric name -> value: top1, top5, nll, ece, nll_calibrated, ece_calibrated,
        temperature."""
        values = {name: round(e.value, 4) for name, e in self.before.items()}
        for name in ("nll", "ece"):
            values[f"{name}_calibrated"] = round(self.after[name].value, 4)
        return {**values, "temperature": round(self.calibration.temperature, 4)}


def load(run_dir: str, weights: Weights = "best") -> LoadedModel:
    """The run's model.

    Args:
        weights: `best`: the best-scoring weights, averaged where the run keeps an average;
            `last`: the newest checkpoint's, averaged likewise; `raw`: the newest checkpoint's
            without averaging.

    Raises EvaluationError where there is no such run, or no checkpoint left.
    """
    try:
        loaded = load_run_model(run_dir)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    if weights == "best":
        return loaded
    found = checkpoint.latest(join(run_dir, "checkpoints"))
    if found is None:
        raise EvaluationError(
            f"{run_dir} has no checkpoint left, so only its best weights can be scored. "
            f"Leave out --weights {weights}"
        )
    step, state = found
    averaged = weights == "last" and state["ema"] is not None
    loaded.model.load_state_dict(state["ema"]["module"] if averaged else state["model"])
    about = {**loaded.about, "step": step, "ema": averaged}
    return dataclasses.replace(
        loaded,
        model=loaded.model.eval(),
        about=about,
        folder=join(run_dir, "checkpoints", checkpoint.step_name(step)),
    )


def rows_of(run: Run, dataset: Dataset, name: str) -> tuple[Split, Ints]:
    """The pictures that a split's name means for this run: (split, int64[n] rows).

    Names are `val`, `test`, `tuning` and `train`. Raises DataError where the set has no `test`.
    """
    train = dataset.split("train")
    if name in ("val", "test"):
        return dataset.split(name), np.arange(len(dataset.split(name)), dtype=np.int64)
    kept, tuning = sampler.run_rows(train.labels, run.data)
    if name == "train":
        return train, kept
    if name != "tuning":
        raise EvaluationError(f"--split {name}: needs to be val, test, tuning or train")
    if not len(tuning):
        raise EvaluationError(
            "--split tuning: this run kept no tuning split (its data.tuning_fraction is 0). "
            "Use --split val"
        )
    return train, tuning


def same_classes(loaded: LoadedModel, dataset: Dataset) -> None:
    """Raise EvaluationError, naming the first difference, unless the data have the model's
    classes."""
    if dataset.classes == loaded.classes:
        return
    missing = sorted(set(loaded.classes) - set(dataset.classes))
    extra = sorted(set(dataset.classes) - set(loaded.classes))
    if missing:
        what = f"the data have no {missing[0]!r}"
    elif extra:
        what = f"the model does not know {extra[0]!r}"
    else:
        what = "they are in another order"
    raise EvaluationError(
        f"{dataset.name} has {len(dataset.classes)} classes and the model {len(loaded.classes)}, "
        f"and they differ: {what}. Evaluate on data with the model's classes"
    )


def thinned(rows: Ints, limit: int) -> Ints:
    """At most `limit` of the rows, evenly spread; 0 keeps all.

    Rows lie in class order, so every class keeps its share.
    """
    if not limit or not len(rows):
        return rows
    places = np.linspace(0, len(rows) - 1, min(len(rows), limit))
    return rows[np.unique(places.round().astype(np.int64))]


def score(
    loaded: LoadedModel,
    dataset: Dataset,
    split: str = "val",
    *,
    size: int = 0,
    flip: bool = False,
    limit: int = 0,
    workers: int = -1,
    device: torch.device | None = None,
    calibration_data: Dataset | None = None,
) -> Scored:
    """Predict and score.

    Args:
        size: side of the input in pixels; 0 for the run's own.
        flip: average the logits with those of the mirrored pictures.
        limit: score at most so many pictures, evenly spread.
        workers: loader processes; 0 loads in a thread, -1 as `loaders_for` says.
        calibration_data: where the run's tuning split lies, if `dataset` is another one.

    The temperature comes from the tuning split where the run has one (and that is not itself what
    is scored), for `test` else from `val`; where the weights have seen some of those pictures, or
    there are none, from the other half of the scored ones.
    """
    same_classes(loaded, dataset)
    predictor = _Predictor(
        loaded,
        size=size or loaded.run.eval_size,
        flip=flip,
        workers=workers,
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    chosen, rows = rows_of(loaded.run, dataset, split)
    rows = thinned(rows, limit)
    if not len(rows):
        raise EvaluationError(
            f"{dataset.name} has no picture in its {split} split. Choose another with --split"
        )
    labels, logits = predictor(chosen, rows)
    home = calibration_data or dataset
    held = _unseen_split(loaded, home, but=split)
    if held:
        tuning_split, tuning_rows = rows_of(loaded.run, home, held)
        tuning_labels, tuning_logits = predictor(tuning_split, thinned(tuning_rows, limit))
        calibration = held_out(logits, labels, tuning_logits, tuning_labels, held)
    else:
        calibration = cross_fitted(logits, labels)
    return Scored(
        split=chosen,
        rows=rows,
        labels=labels,
        logits=logits,
        size=predictor.size,
        flip=flip,
        calibration=calibration,
        before=scores(logits, labels),
        after=scores(calibration.scaled, labels),
        chose=_chose_the_epoch(loaded, dataset, split),
    )


def _chose_the_epoch(loaded: LoadedModel, dataset: Dataset, split: str) -> bool:
    """Whether the weights are the best of several epochs by their score on this split."""
    run = loaded.run
    best_of_several = "/best/" in loaded.folder and run.stage != "probe" and run.train.epochs > 1
    monitored = "tuning" if run.data.tuning_fraction else "val"
    own_data = (loaded.about.get("data") or {}).get("digest") == dataset.digest
    return best_of_several and split == monitored and own_data


CHOSEN_HERE = (
    "The epoch was chosen by its score on these pictures, so new ones may score a little lower."
)


def score_test(
    loaded: LoadedModel, dataset: Dataset, *, device: torch.device | None = None
) -> TestSplit:
    """Scores on all of `test` at the run's own size, in one pass: nothing is fitted or chosen."""
    predictor = _Predictor(
        loaded,
        size=loaded.run.eval_size,
        flip=False,
        workers=-1,
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    labels, logits = predictor(*rows_of(loaded.run, dataset, "test"))
    return TestSplit(len(labels), scores(logits, labels))


@dataclass(frozen=True)
class _Predictor:
    """Predicts pictures of a split as the run's evaluation would, at a size of its own."""

    loaded: LoadedModel
    size: int
    flip: bool
    workers: int
    device: torch.device

    def __call__(self, split: Split, rows: Ints) -> tuple[Ints, Floats]:
        """(labels int64[n], logits float32[n, C]) of the rows."""
        run = self.loaded.run
        workers = loaders_for(len(rows)) if self.workers < 0 else self.workers
        with scored_batches(run, split, rows, workers=workers, size=self.size) as batches:
            try:
                found = predict(
                    self.loaded.model.to(self.device),
                    batches,
                    self.device,
                    mean=run.data.mean,
                    std=run.data.std,
                    dtype=precision(run, self.device),
                    flip=self.flip,
                )
            except (RuntimeError, AssertionError) as error:
                if self.size == run.eval_size:
                    raise
                raise EvaluationError(
                    f"--sizes {self.size}: a {run.model.arch} trained at {run.eval_size} px does "
                    f"not take it ({str(error).splitlines()[0]}). Choose another size"
                ) from None
        return found.labels, found.logits


def _unseen_split(loaded: LoadedModel, dataset: Dataset, but: str) -> str:
    """The split that fits the temperature for the scores of `but`: the run's tuning split, for
    `test` else val; empty where there is none of which the weights have seen nothing."""
    run_dir = loaded.folder.rstrip("/").rsplit("/", 2)[0]
    seen = seen_rows.of_run(run_dir, run_dir.rsplit("/", 1)[0], dataset) or seen_rows.SeenRows()
    if loaded.run.data.tuning_fraction and but != "tuning":
        _, rows = rows_of(loaded.run, dataset, "tuning")
        if not seen.in_split(dataset, "train")[0][rows].any():
            return "tuning"
    if but == "test" and len(dataset.split("val")) and not seen.in_split(dataset, "val")[0].any():
        return "val"
    return ""


@torch.no_grad()
def features_of(
    loaded: LoadedModel, dataset: Dataset, workers: int = 0, device: torch.device | None = None
) -> Floats:
    """float32[n, F]: the input of the model's classifier for every picture, train first, then val.

    The data may have other classes than the model.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return np.concatenate(
        [
            compute_features(
                loaded.model,
                loaded.run,
                split,
                np.arange(len(split)),
                device=device,
                loader_workers=workers,
            )
            for split in (dataset.split("train"), dataset.split("val"))
        ]
    )
