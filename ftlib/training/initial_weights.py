"""Where a run's first weights come from, and how a finished run's best model is read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from torch import Tensor, nn

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.settings import ConfigError
from ftlib.storage import DamagedError, join
from ftlib.training import checkpoint, models


@dataclass(frozen=True)
class InitialWeights:
    """The model a run starts from, found and named before anything expensive starts."""

    uri: str
    """A folder with model.safetensors and model.json, or a single .safetensors file."""
    sha256: str
    """Of the weights' bytes: part of the run's fingerprint."""
    about: dict[str, Any] = field(default_factory=dict)
    """model.json: arch, classes, scores, run, stage ...; empty for a bare file."""
    result: dict[str, Any] = field(default_factory=dict)
    """The finished run's result.json, its gates among it; empty where there is none."""

    @property
    def run_name(self) -> str:
        return str(self.about.get("run", ""))

    @property
    def top1(self) -> float | None:
        """Its validation top-1 in percent, where known."""
        scores = self.about.get("scores", {})
        return scores.get("val/top1", scores.get("tuning/top1"))

    def to_dict(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.sha256, "about": self.about, "result": self.result}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InitialWeights:
        return cls(**values)


def resolve_init(
    run: Run,
    data: str,
    digest: str,
    classes: tuple[str, ...],
    runs_root: str,
    fetch: Callable[[str], str] | None = None,
) -> InitialWeights | None:
    """Find what `run.model.init_from` names; None for scratch and imagenet. Raises ConfigError with the remedy.

    data, digest: name and digest of the data set, to find an earlier stage's run on it. fetch: brings `mlflow:` and `models:/`
    addresses to a folder and returns it (the tracking package supplies it).
    """
    wanted = run.model.init_from
    if wanted in ("scratch", "imagenet"):
        return None
    if wanted.startswith("file:"):
        source = _read_source(wanted.removeprefix("file:"), wanted)
    elif wanted.startswith("run:"):
        source = _of_run(join(runs_root, wanted.removeprefix("run:")), wanted)
    elif wanted.startswith(("mlflow:", "models:/")):
        if fetch is None:
            raise ConfigError(
                f"model.init_from = {wanted}: there is no tracking server to ask here. Use run:NAME or file:PATH"
            )
        source = _read_source(fetch(wanted), wanted)
    elif ":" in wanted or "/" in wanted:
        raise ConfigError(
            f"model.init_from = {wanted}: use scratch, imagenet, a stage such as phase1, run:NAME, mlflow:RUN_ID, models:/NAME@ALIAS or file:PATH"
        )
    else:
        source = _of_run(_best_of_stage(wanted, data, digest, runs_root), wanted)
    _fits(run, source, classes)
    return source


def _best_of_stage(stage: str, data: str, digest: str, runs_root: str) -> str:
    """The folder of the best finished run of `stage` on this data set."""
    best: tuple[float, str] | None = None
    other: list[str] = []
    for name in storage.folders(runs_root):
        try:
            about, result = (
                storage.read_json(join(runs_root, name, "run.json")),
                storage.read_json(join(runs_root, name, "result.json")),
            )
        except DamagedError:
            continue
        if (
            not about
            or not result
            or about.get("run", {}).get("stage") != stage
            or result.get("status") != "completed"
        ):
            continue
        if about.get("data", {}).get("digest") != digest:
            other.append(f"{name} (on {about.get('data', {}).get('name')})")
            continue
        score = float(result.get("metrics", {}).get("best/val_top1", float("-inf")))
        best = max(best or (score, name), (score, name))
    if best is None:
        known = (
            f" Finished {stage} runs on other data: {', '.join(sorted(other))}; name one as run:NAME with --model.reset-head."
            if other
            else ""
        )
        raise ConfigError(
            f"model.init_from = {stage}: there is no finished {stage} run on the data set {data!r} below {runs_root}. "
            f"Make one with: python jobs/{stage}.py --data.path {data}{known}"
        )
    return join(runs_root, best[1])


def _of_run(run_dir: str, wanted: str) -> InitialWeights:
    steps = checkpoint.steps(join(run_dir, "best"))
    if not steps:
        raise ConfigError(
            f"model.init_from = {wanted}: {run_dir} holds no best model. Has that run been evaluated once?"
        )
    source = _read_source(join(run_dir, "best", checkpoint.step_name(steps[0])), wanted)
    return InitialWeights(
        source.uri,
        source.sha256,
        source.about,
        storage.read_json(join(run_dir, "result.json")) or {},
    )


def _read_source(uri: str, wanted: str) -> InitialWeights:
    if uri.endswith(".safetensors"):
        data = storage.read_file(uri)
        if data is None:
            raise ConfigError(f"model.init_from = {wanted}: there is no file {uri}")
        return InitialWeights(uri, hashlib.sha256(data).hexdigest())
    try:
        files, _ = storage.read_folder(uri)
        return InitialWeights(
            uri,
            hashlib.sha256(files["model.safetensors"]).hexdigest(),
            json.loads(files["model.json"]),
        )
    except (DamagedError, KeyError) as error:
        raise ConfigError(
            f"model.init_from = {wanted}: {error}. It must be a folder that ftlib wrote (best/step-...), or a .safetensors file"
        ) from None


def _fits(run: Run, source: InitialWeights, classes: tuple[str, ...]) -> None:
    about = source.about
    if about.get("arch", run.model.arch) != run.model.arch:
        raise ConfigError(
            f"model.arch = {run.model.arch}: the starting weights ({source.uri}) are of a {about['arch']}. Set model.arch to {about['arch']}, or start from other weights"
        )
    theirs = about.get("classes")
    if theirs is None or tuple(theirs) == classes:
        return
    if run.model.reset_head:
        return
    first = next(
        (
            f"class {i} is {a!r} there and {b!r} here"
            for i, (a, b) in enumerate(zip(theirs, classes))
            if a != b
        ),
        f"there are {len(theirs)} classes there and {len(classes)} here",
    )
    raise ConfigError(
        f"model.init_from = {run.model.init_from}: its classes differ from the data set's ({first}). Add --model.reset-head to start with a new classifier"
    )


def start(run: Run, classes: tuple[str, ...], source: InitialWeights | None) -> nn.Module:
    """The model with its first weights, on the CPU. Call with torch's generator seeded: new layers draw from it."""
    model = models.build(
        run.model,
        len(classes),
        imagenet_weights=run.model.init_from == "imagenet",
        image_size=run.augment.size,
    )
    if source is None:
        return model
    state = models.fit_state(
        model, _weights(source.uri, source.sha256), new_head=run.model.reset_head
    )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
        odd = [key for key in (*missing, *unexpected) if not key.endswith("num_batches_tracked")]
    except RuntimeError as error:  # shapes that differ
        odd = [str(error).splitlines()[-1].strip()]
    if odd:
        raise ConfigError(
            f"model.init_from = {run.model.init_from}: the weights in {source.uri} do not fit a {run.model.arch} with {len(classes)} classes "
            f"({odd[0]}). If only the classifier differs, add --model.reset-head"
        )
    return model


def _weights(uri: str, sha256: str) -> dict[str, Tensor]:
    data = storage.read_file(
        uri if uri.endswith(".safetensors") else join(uri, "model.safetensors")
    )
    if data is None:
        raise ConfigError(f"{uri}: the starting weights are gone")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ConfigError(f"{uri}: the starting weights have changed since the run began")
    try:
        return safetensors_load(data)
    except SafetensorError as error:
        raise ConfigError(f"{uri}: not a safetensors file ({error})") from None


@dataclass(frozen=True)
class LoadedModel:
    """A finished run's best model, in eval mode on the CPU."""

    model: nn.Module
    run: Run
    classes: tuple[str, ...]
    about: dict[str, Any]
    """model.json: arch, size, crop, mean, std, epoch, step, scores, data, run, stage, ema."""
    folder: str


def load_run_model(run_dir: str) -> LoadedModel:
    """The best model of the run kept in `run_dir`, every byte checked. Raises ValueError naming what is missing or damaged."""
    about = storage.read_json(join(run_dir, "run.json"))
    if about is None:
        raise ValueError(
            f"{run_dir} is not a run: it has no run.json. Name one of the folders below the runs' storage"
        )
    run = settings.from_dict(Run, about["run"])
    for step in checkpoint.steps(join(run_dir, "best")):
        folder = join(run_dir, "best", checkpoint.step_name(step))
        files, _ = storage.read_folder(folder)
        info = json.loads(files["model.json"])
        with torch.random.fork_rng(devices=[]):
            model = models.build(run.model, len(info["classes"]), image_size=run.augment.size)
        model.load_state_dict(safetensors_load(files["model.safetensors"]))
        return LoadedModel(model.eval(), run, tuple(info["classes"]), info, folder)
    raise ValueError(f"{run_dir} holds no best model yet: the run has not been evaluated once")
