"""The linear probe: how far a model's features go before any of it is trained.

Features are computed once per picture and kept. Logistic regression over a range of penalties is
scored on a tuning split of the training images, fitted again on all of them, and becomes the
model's classifier. It is the first number to know about a new data set, and the classifier that
fine-tuning starts with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftlib import storage
from ftlib.config import Run
from ftlib.data import rng, sampler
from ftlib.data.loader import scored_batches
from ftlib.data.shards import Split
from ftlib.paths import runs_root
from ftlib.settings import ConfigError
from ftlib.training import checkpoint, initial_weights, models, scoring, seen_rows
from ftlib.training.checkpoint import CheckpointWriter
from ftlib.training.evaluate import autocast, normalize
from ftlib.training.worker_context import WorkerContext

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C, the inverse strength of the L2 penalty, on standardized features."""
TUNING_FRACTION = 0.2
"""Part of the training images that chooses the penalty."""
MOST_IMAGES = 50_000
"""Images that the regression is fitted on at most, the same share of each class."""
LARGEST_BATCH = 64
"""Images per forward pass; features need no gradients, so memory is not the limit."""


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier on raw features: logits = features @ weight.T + bias."""

    weight: Floats
    """float32[classes, F]"""
    bias: Floats
    """float32[classes]"""

    def logits(self, features: Floats) -> Floats:
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Trial:
    """One penalty and its scores on the tuning split."""

    c: float
    """Inverse strength of the penalty."""
    top1: float
    """Percent."""
    loss: float
    """Mean negative log-likelihood, in nats."""


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found."""

    head: LinearHead
    trials: list[Trial] = field(default_factory=list)
    c: float = 1.0
    """The chosen inverse strength."""


# --- features -------------------------------------------------------------------------------------


@contextlib.contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Floats]]:
    """Collects the input of the model's classifier, float32[b, F], at each forward pass."""
    kept: list[Floats] = []

    def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features = inputs[0]
        if features.ndim == 4 and features.shape[2:] != (1, 1):
            raise ConfigError(
                f"a {type(model).__name__} classifies maps, not features, so it has no linear "
                "probe. Set model.arch to another architecture, or fine-tune with --no-probe"
            )
        kept.append(features.flatten(1).float().cpu().numpy())

    hook = models.head(model).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


@torch.no_grad()
def compute_features(
    model: nn.Module,
    run: Run,
    split: Split,
    rows: Ints,
    *,
    device: torch.device,
    loader_workers: int = 0,
    tick: Callable[[int], None] = lambda images: None,
) -> Floats:
    """float32[n, F]: the classifier's input for the pictures `rows`, as evaluation sees them.

    tick: called with the number of images of each batch.
    """
    batch_size = min(run.evaluate.batch_size, LARGEST_BATCH)
    batches = scored_batches(run, split, rows, workers=loader_workers, batch_size=batch_size)
    model = model.to(device).eval()
    with head_inputs(model) as kept, batches as pictures:
        for batch in pictures:
            images = normalize(batch.images.to(device), run.data.mean, run.data.std)
            with autocast(torch.float32, device):
                model(images)
            tick(len(batch.rows))
    return np.concatenate(kept)


def cache_key(run: Run, weights_sha256: str, data_digest: str, split: str, rows: Ints) -> str:
    """What features depend on: weights, architecture, pictures, size and normalization."""
    about = {
        "weights": weights_sha256,
        "arch": run.model.arch,
        "data": data_digest,
        "split": split,
        "rows": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(),
        "size": run.eval_size,
        "crop": run.evaluate.crop,
        "interpolation": run.evaluate.interpolation,
        "mean": run.data.mean,
        "std": run.data.std,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def cached(folder: Path, key: str, compute: Callable[[], Floats], rows: int) -> Floats:
    """Features from `folder`, or computed and kept there. A damaged file is computed anew."""
    from safetensors.numpy import load, save

    file = folder / f"{key}.safetensors"
    with contextlib.suppress(Exception):
        found: Floats = load(file.read_bytes())["features"]
        if len(found) == rows:
            return found
    features = compute()
    storage.write_file(str(file), save({"features": np.ascontiguousarray(features)}))
    return features


# --- the classifier -------------------------------------------------------------------------------


def fit(
    features: Floats, labels: Ints, classes: int, seed: int, seen: NDArray[np.bool_] | None = None
) -> ProbeResult:
    """Choose the penalty on a tuning split, and fit on all images.

    Of equal scores the stronger penalty wins.

    Args:
        features: float32[n, F]
        labels: int64[n]
        classes: of the data set; a class without images keeps a constant low logit.
        seed: of the tuning split.
        seen: bool[n]; images that the model was trained on, which choose nothing.
    """
    everything = np.arange(len(labels))
    if len(labels) > MOST_IMAGES:
        everything = sampler.subset(labels, MOST_IMAGES / len(labels), seed)
    unseen = everything if seen is None else everything[~seen[everything]]
    _, tuning = sampler.tuning_split(labels, unseen, TUNING_FRACTION, seed)
    kept = np.setdiff1d(everything, tuning, assume_unique=True)
    trials = []
    if len(tuning) and len(np.unique(labels[kept])) > 1:
        for c in PENALTIES:
            head = fit_head(features[kept], labels[kept], classes, c)
            logits = head.logits(features[tuning])
            top1 = accuracy(logits, labels[tuning])
            loss = float(image_losses(logits, labels[tuning]).mean())
            trials.append(Trial(c, top1, loss))
    best = min(trials, key=lambda t: (round(t.loss, 6), t.c), default=Trial(0.01, 0.0, 0.0))
    head = fit_head(features[everything], labels[everything], classes, best.c)
    return ProbeResult(head, trials, best.c)


def fit_head(features: Floats, labels: Ints, classes: int, c: float) -> LinearHead:
    """Multinomial logistic regression with an L2 penalty, on standardized features."""
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0).astype(np.float32)
    model = LogisticRegression(C=c, max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stopped early still is a fit
        model.fit((features - mean) / std, labels)
    weight = np.asarray(model.coef_, np.float32)
    bias = np.asarray(model.intercept_, np.float32)
    if len(model.classes_) == 2:  # one row for two classes; half of it each way is the same model
        weight = np.concatenate([-weight, weight]) * np.float32(0.5)
        bias = np.concatenate([-bias, bias]) * np.float32(0.5)
    weight = (weight / std).astype(np.float32)
    bias = (bias - weight @ mean).astype(np.float32)
    whole = LinearHead(
        np.zeros((classes, features.shape[1]), np.float32),
        np.full(classes, bias.min() - 10, np.float32),
    )
    whole.weight[model.classes_], whole.bias[model.classes_] = weight, bias
    return whole


def accuracy(logits: Floats, labels: Ints, k: int = 1) -> float:
    """Top-k accuracy in percent, as `evaluate.count` counts it."""
    answers = torch.from_numpy(logits).topk(k).indices.numpy()
    return float((answers == labels[:, None]).any(axis=1).mean() * 100)


def image_losses(logits: Floats, labels: Ints) -> Floats:
    """Cross-entropy of each image in nats, float32[n]."""
    losses = nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), reduction="none"
    )
    return np.asarray(losses)


def put_head(model: nn.Module, head: LinearHead) -> None:
    """Make `head` the classifier of `model`."""
    layer = models.head(model)
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
        raise ConfigError("the probe needs a model whose classifier has a weight and a bias")
    with torch.no_grad():
        weight.copy_(torch.from_numpy(head.weight).reshape(weight.shape))
        bias.copy_(torch.from_numpy(head.bias))


# --- the run --------------------------------------------------------------------------------------


def probe(
    context: WorkerContext,
    features_of: Callable[[nn.Module, str, Ints], Floats],
) -> tuple[dict[str, float], dict[str, float], ProbeResult]:
    """Fit the probe of a run and keep the model with its classifier as the run's best.

    Args:
        features_of: (model, split's name, rows) -> float32[n, F].

    Returns:
        (best/* and final/* metrics, the history's one row, the result).
    """
    run, dataset = context.run, context.dataset
    classes = len(dataset.classes)
    model = first_model(context)
    rows, scored, split = context.rows
    labels = dataset.split("train").labels[rows]
    scored_labels = dataset.split("val" if split == "val" else "train").labels[scored]
    seen = _seen(context, rows)
    train = features_of(model, "train", rows)
    result = fit(train, labels, classes, run.seed, seen)
    logits = result.head.logits(train)
    scored_logits = result.head.logits(features_of(model, split, scored))
    losses = image_losses(scored_logits, scored_labels)
    scores = {
        f"{split}/top1": round(accuracy(scored_logits, scored_labels), 4),
        f"{split}/loss": round(float(losses.mean()), 6),
    }
    if classes > 5:  # of fewer it is always 100
        scores[f"{split}/top5"] = round(accuracy(scored_logits, scored_labels, 5), 4)
    top1 = round(accuracy(logits, labels), 4)
    row = {
        "epoch": 1.0,
        "train/top1": top1,
        "train/loss": round(float(image_losses(logits, labels).mean()), 6),
        "train/gap": round(top1 - scores[f"{split}/top1"], 4),
        **scores,
    }
    put_head(model, result.head)
    kept = scoring.sample(np.arange(len(scored)))
    write_best(context, model, scores, scoring.as_json(scored[kept], losses[kept]))
    # By pictures now: the scores are of features, which may come from a cache.
    stored = checkpoint.verify_best(context.run_dir, 0, 1)
    scoring.verify(stored, context, model, torch.float32)
    metrics = {f"best/{name.replace('/', '_')}": value for name, value in scores.items()} | {
        "best/epoch": 1.0,
        "best/gap": row["train/gap"],
        "final/train_top1": top1,
        "final/gap": row["train/gap"],
        "final/epoch": 1.0,
    }
    return metrics, row, result


def _seen(context: WorkerContext, rows: Ints) -> NDArray[np.bool_]:
    """bool[n]: which of the training images `rows` the starting weights have seen.

    Raises ConfigError where they have seen all, so that none is left to choose the penalty.
    """
    run, dataset = context.run, context.dataset
    known = seen_rows.of_weights(context.source, run.model.init_from, runs_root(run), dataset)
    seen = known.in_split(dataset, "train")[0][rows]
    if seen.all():
        raise ConfigError(
            f"model.init_from = {run.model.init_from}: {' and before it '.join(known.runs)} had "
            f"trained on all {len(rows):,} training images, so none can choose the probe's "
            "penalty. Probe with a larger data.subset, or weights that left some images aside"
        )
    return seen


def first_model(context: WorkerContext) -> nn.Module:
    """The model with the run's starting weights, in eval mode."""
    run = context.run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(rng.INIT, run.seed) % 2**63)
        model = initial_weights.start(run, context.dataset.classes, context.source)
    return model.eval()


def write_best(
    context: WorkerContext, model: nn.Module, scores: dict[str, float], sample: dict[str, Any]
) -> None:
    """Write best/step-00000000, as training writes it. Raises StorageError."""
    from ftlib.training.run_log import describe_model

    run = context.run
    about = describe_model(context, epoch=1, step=0, scores=scores, ema=False)
    writer = CheckpointWriter(
        context.run_dir,
        run.checkpoint.keep_last,
        run.checkpoint.keep_best,
        fence=context.fence,
        owner=context.owner,
    )
    with contextlib.closing(writer):
        writer.save_best(0, model.state_dict(), about, sample)
        writer.wait()
