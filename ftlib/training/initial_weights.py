"""Where a run's first weights come from, and how a finished run's best model is read back.

source = resolve_init(run, ...)         on the driver: found, read, checked against the model
run = with_preprocessing(run, source)   mean, std and crop come with the weights
source = materialize(source, run_dir)   copied once into <run>/init, as safetensors
model = start(run, classes, source)     on every worker, from that copy
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from ftlib import settings, storage
from ftlib.config import IMAGENET_MEAN, IMAGENET_STD, Evaluate, Run
from ftlib.runs import best_of_stage
from ftlib.settings import ConfigError
from ftlib.storage import DamagedError, StorageError, join
from ftlib.training import checkpoint, hub, models, weight_files
from ftlib.training.weight_files import WeightFileError

FORMS = (
    "scratch, pretrained, a stage such as phase1, run:NAME, mlflow:RUN_ID, models:/NAME@ALIAS, "
    "hf-hub:ORG/NAME or file:PATH"
)
"""What model.init_from takes, for messages."""
FOREIGN_KEYS = {
    "timm": ("conv_stem.", "patch_embed.", "blocks.0.", "stages.0.", "stem.0.", "layers.0.blocks."),
    "torchvision": ("features.0.", "encoder.layers.encoder_layer_0.", "conv_proj."),
}
"""Beginnings of keys that only one library uses."""


@dataclass(frozen=True)
class InitialWeights:
    """The model a run starts from, found and named before anything expensive starts."""

    uri: str
    """A folder with model.safetensors and model.json, or a single file of weights."""
    sha256: str
    """Of the bytes of the weights where they were found: part of the run's fingerprint."""
    about: dict[str, Any] = field(default_factory=dict)
    """model.json of an ftlib run: arch, classes, scores, run, stage ...; empty for others."""
    result: dict[str, Any] = field(default_factory=dict)
    """The finished run's result.json, its gates among it; empty where there is none."""
    kind: str = "run"
    """run: an ftlib model. pretrained: published weights. file: a bare file."""
    name: str = ""
    """What published weights are called, or where the file lay."""
    classes: int | None = None
    """Rows of the classifier of published weights and bare files, where known; 0 for none."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How published weights expect their images: mean, std, crop, interpolation, size."""
    new_head: bool = False
    """The classifier starts anew by itself, because it is of another size."""
    notes: tuple[str, ...] = ()
    """What people should know about these weights."""

    @property
    def run_name(self) -> str:
        return str(self.about.get("run", ""))

    @property
    def label(self) -> str:
        """For people: the run's name, the published name, or the address."""
        return self.run_name or self.name or self.uri

    @property
    def top1(self) -> float | None:
        """Its validation top-1 in percent, where known."""
        scores = self.about.get("scores", {})
        return scores.get("val/top1", scores.get("tuning/top1"))

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitialWeights:
        """From `to_dict`, of this version or an earlier one."""
        return cls(**{**values, "notes": tuple(values.get("notes", ()))})


# --- finding --------------------------------------------------------------------------------------


def resolve_init(
    run: Run,
    data: str,
    digest: str,
    classes: tuple[str, ...],
    runs_root: str,
    fetch: Callable[[str], str] | None = None,
) -> InitialWeights | None:
    """Find what `run.model.init_from` names and check that it fits; None for scratch.

    Published weights and bare files are read and fitted to the model here, on the driver.

    data, digest: name and digest of the data set, to find an earlier stage's run on it.
    fetch: brings `mlflow:` and `models:/` addresses to a folder and returns it.

    Raises ConfigError with the remedy.
    """
    wanted = run.model.init_from
    if wanted == "scratch":
        return None
    try:
        source = _find(run, data, digest, runs_root, fetch)
        if source.kind == "run":
            _check_run(run, source, classes)
            return source
        return _checked(run, source, classes)
    except WeightFileError as error:
        raise ConfigError(f"model.init_from = {wanted}: {error}") from None


def _find(
    run: Run, data: str, digest: str, runs_root: str, fetch: Callable[[str], str] | None
) -> InitialWeights:
    wanted = run.model.init_from
    scheme, _, rest = wanted.partition(":")
    if wanted in ("pretrained", "imagenet"):
        return _published(run.model.arch)
    if scheme == "hf-hub":
        return _from_hub(run.model.arch, rest)
    if scheme == "file":
        return _read_source(os.path.expanduser(rest), wanted)
    if scheme == "run":
        return _of_run(join(runs_root, rest), wanted)
    if wanted.startswith(("mlflow:", "models:/")):
        if fetch is None:
            raise ConfigError(
                f"model.init_from = {wanted}: there is no tracking server to ask here. "
                "Use run:NAME or file:PATH"
            )
        return _read_source(fetch(wanted), wanted)
    if ":" in wanted or "/" in wanted:
        raise ConfigError(f"model.init_from = {wanted}: use {FORMS}")
    return _of_run(best_of_stage(wanted, data, digest, runs_root), wanted)


def _published(arch: str) -> InitialWeights:
    """The architecture's own published weights."""
    known = models.pretrained(arch)
    if known.url:
        path = hub.url_file(known.url)
    else:
        path = hub.hub_weights(known.repo, filename=known.filename)
    return InitialWeights(
        str(path),
        _sha256(str(path)),
        kind="pretrained",
        name=known.name,
        classes=known.classes,
        preprocessing=known.preprocessing.to_dict(),
    )


def _from_hub(arch: str, wanted: str) -> InitialWeights:
    """A repository ORG/NAME[@REVISION] of the Hugging Face Hub, with timm's config.json."""
    repo, _, revision = wanted.partition("@")
    path = hub.hub_weights(repo, revision)
    about = hub.hub_config(repo, revision)
    cfg = about.get("pretrained_cfg", about)
    theirs = str(about.get("architecture", ""))
    if theirs and models.TIMM + theirs != models.without_tag(arch):
        raise ConfigError(
            f"model.arch = {arch}: the weights of hf-hub:{wanted} are of a {theirs}. "
            f"Set model.arch to {models.TIMM}{theirs}"
        )
    classes = about.get("num_classes", cfg.get("num_classes"))
    preprocessing = models.preprocessing_of(cfg).to_dict() if "mean" in cfg else {}
    return InitialWeights(
        str(path),
        _sha256(str(path)),
        kind="pretrained",
        name=f"hf-hub:{wanted}",
        classes=int(classes) if isinstance(classes, int) else None,
        preprocessing=preprocessing,
    )


def _of_run(run_dir: str, wanted: str) -> InitialWeights:
    steps = checkpoint.steps(join(run_dir, "best"))
    if not steps:
        raise ConfigError(
            f"model.init_from = {wanted}: {run_dir} holds no best model. "
            "Has that run been evaluated once?"
        )
    source = _read_source(join(run_dir, "best", checkpoint.step_name(steps[0])), wanted)
    result = storage.read_json(join(run_dir, "result.json")) or {}
    scored = result.get("metrics", {}).get("best/epoch")
    held = source.about.get("epoch", scored)
    if scored is not None and held != scored:
        raise ConfigError(
            f"model.init_from = {wanted}: {source.uri} holds the weights of epoch {held:g}, and "
            f"the run's scores are of epoch {scored:g}. Train that run again under another name"
        )
    return dataclasses.replace(source, result=result)


def _read_source(uri: str, wanted: str) -> InitialWeights:
    """A folder that ftlib wrote, or a bare file."""
    if uri.endswith(weight_files.SUFFIXES):
        return InitialWeights(uri, _sha256(uri), kind="file", name=uri)
    try:
        files, _ = storage.read_folder(uri)
        about = json.loads(files["model.json"])
        digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    except (DamagedError, KeyError, StorageError) as error:
        raise ConfigError(
            f"model.init_from = {wanted}: {error}. It must be a folder that ftlib wrote "
            f"(best/step-...), or a file that ends in {', '.join(weight_files.SUFFIXES)}"
        ) from None
    initial = about.get("initial")
    if initial is not None:  # a copy that `materialize` made
        return InitialWeights.from_dict({**initial, "uri": uri})
    return InitialWeights(uri, digest, about)


def _sha256(uri: str) -> str:
    data = storage.read_file(uri)
    if data is None:
        raise WeightFileError(f"there is no file {uri}")
    return hashlib.sha256(data).hexdigest()


# --- checking -------------------------------------------------------------------------------------


def _check_run(run: Run, source: InitialWeights, classes: tuple[str, ...]) -> None:
    """ConfigError where an ftlib model is of another architecture or other classes."""
    about = source.about
    arch = about.get("arch", run.model.arch)
    if models.without_tag(arch) != models.without_tag(run.model.arch):
        raise ConfigError(
            f"model.arch = {run.model.arch}: the starting weights ({source.uri}) are of a "
            f"{arch}. Set model.arch to {arch}, or start from other weights"
        )
    theirs = about.get("classes")
    if run.model.reset_head or theirs is None or tuple(theirs) == classes:
        return
    difference = f"there are {len(theirs)} classes there and {len(classes)} here"
    for i, (a, b) in enumerate(zip(theirs, classes)):
        if a != b:
            difference = f"class {i} is {a!r} there and {b!r} here"
            break
    raise ConfigError(
        f"model.init_from = {run.model.init_from}: its classes differ from the data set's "
        f"({difference}). Add --model.reset-head to start with a new classifier"
    )


def _checked(run: Run, source: InitialWeights, classes: tuple[str, ...]) -> InitialWeights:
    """Published weights or a bare file, read and fitted to the model once, so that what does not
    fit is known now; with what became of the classifier."""
    file = _read(source)
    notes = list(file.notes)
    with torch.random.fork_rng(devices=[]):
        model = models.build(run.model, len(classes), run.augment.size)
    rows = source.classes
    if rows is None:
        rows = models.head_rows(model, file.state)
    if rows is None and source.kind == "file":
        rows = models.published_classes(run.model.arch)
    # A classifier of another size cannot be kept; one of the same size may be of other classes,
    # which a bare file cannot tell.
    new_head = not run.model.reset_head and rows != len(classes)
    if new_head:
        theirs = "other" if rows is None else f"{rows:,}"
        notes.append(
            f"its classifier is for {theirs} classes, the data set has {len(classes):,}: the "
            "classifier starts anew"
        )
    preprocessing = source.preprocessing
    if not preprocessing:
        # Of a bare file only the architecture is known: its weights usually share mean and std.
        usual = models.usual_preprocessing(run.model.arch)
        preprocessing = {k: v for k, v in usual.to_dict().items() if k in ("mean", "std")}
    found = dataclasses.replace(
        source,
        classes=rows,
        new_head=new_head,
        preprocessing=preprocessing,
        notes=tuple(dict.fromkeys((*source.notes, *notes))),
    )
    _fitted(run, model, found, file.state)
    return found


def _fitted(
    run: Run, model: nn.Module, source: InitialWeights, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with the names and shapes of `model`. ConfigError where it does not fit."""
    try:
        return models.fit_state(
            model,
            run.model,
            run.augment.size,
            state,
            classes=source.classes,
            new_head=run.model.reset_head or source.new_head,
        )
    except ValueError as error:
        hint = _other_library(run.model.arch, state)
        if not hint and source.kind == "run" and not run.model.reset_head:
            hint = " If only the classifier differs, add --model.reset-head"
        if not hint:
            hint = (
                " Set model.arch to the architecture that they were trained as, or rename the "
                "file's keys to the model's"
            )
        raise ConfigError(
            f"model.init_from = {run.model.init_from}: the weights in {source.uri} do not fit a "
            f"{run.model.arch} with {model_classes(model)} classes: {error}.{hint}"
        ) from None


def model_classes(model: nn.Module) -> int:
    """Classes of the model's classifier."""
    return len(next(models.head(model).parameters()))


def _other_library(arch: str, state: Mapping[str, Tensor]) -> str:
    """A hint where the keys are those of the library that `arch` is not from."""
    ours, theirs = (
        ("timm", "torchvision")
        if arch.startswith(models.TIMM)
        else (
            "torchvision",
            "timm",
        )
    )

    def has(library: str) -> bool:
        return any(key.startswith(FOREIGN_KEYS[library]) for key in state)

    if not has(theirs) or has(ours):
        return ""
    example = "timm/NAME" if theirs == "timm" else "torchvision's name, without timm/"
    return f" Its keys are {theirs}'s: set model.arch to {example}"


def keeps_classifier(run: Run, source: InitialWeights | None) -> bool:
    """Whether the starting weights can classify these classes already, so that their score is
    worth knowing."""
    return source is not None and not run.model.reset_head and not source.new_head


# --- preprocessing --------------------------------------------------------------------------------


def with_preprocessing(run: Run, source: InitialWeights | None) -> Run:
    """The run with the mean, standard deviation, evaluation crop and interpolation that its
    starting weights were trained with, each where the run has it at its default.

    `model.preprocessing = settings` leaves the run as it is. A model of an ftlib run hands on mean
    and standard deviation only: its crop was a choice for evaluation.
    """
    if source is None or run.model.preprocessing == "settings":
        return run
    given: Mapping[str, Any] = source.preprocessing
    if source.kind == "run":
        given = {k: source.about[k] for k in ("mean", "std") if k in source.about}
    changes: dict[str, Any] = {}
    plain = (run.data.mean, run.data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    if plain and "mean" in given and "std" in given:
        changes |= {"data.mean": tuple(given["mean"]), "data.std": tuple(given["std"])}
    if run.evaluate.crop == Evaluate().crop and "crop" in given:
        changes["evaluate.crop"] = given["crop"]
    plain_resize = run.evaluate.interpolation == Evaluate().interpolation
    if plain_resize and given.get("interpolation") in ("bilinear", "bicubic"):
        changes["evaluate.interpolation"] = given["interpolation"]
    return settings.override(run, changes)


# --- the copy that workers read -------------------------------------------------------------------


def copied(source: InitialWeights, run_dir: str) -> InitialWeights:
    """`source` as it will be after `materialize`."""
    if not source.uri.endswith(weight_files.SUFFIXES):
        return source
    return dataclasses.replace(source, uri=join(run_dir, "init"))


def materialize(source: InitialWeights | None, run_dir: str) -> InitialWeights | None:
    """Copy published weights and bare files into `<run_dir>/init` as safetensors, once.

    Folders that ftlib wrote lie where every worker reads already, and stay there. Raises
    StorageError where the copy cannot be written.
    """
    if source is None:
        return None
    copy = copied(source, run_dir)
    uri = copy.uri
    if uri == source.uri:
        return source
    try:
        files, _ = storage.read_folder(uri)
        if json.loads(files["model.json"])["initial"]["sha256"] == source.sha256:
            return copy
    except (DamagedError, KeyError, StorageError):
        pass  # not there yet, or cut off while it was written
    about = {"initial": copy.to_dict()}
    contents = {
        "model.safetensors": safetensors_save(_read(source).state),
        "model.json": json.dumps(about, indent=2).encode(),
    }
    storage.write_folder(uri, contents, {})
    return copy


def _read(source: InitialWeights) -> weight_files.WeightFile:
    """The tensors, every byte checked against what was found first."""
    if source.uri.endswith(weight_files.SUFFIXES):
        try:
            return weight_files.read(source.uri, source.sha256)
        except WeightFileError as error:
            raise ConfigError(str(error)) from None
    try:
        files, _ = storage.read_folder(source.uri)
        data = files["model.safetensors"]
    except (DamagedError, KeyError) as error:
        raise ConfigError(
            f"{source.uri}: the starting weights are gone or damaged ({error})"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if source.kind == "run" and digest != source.sha256:
        raise ConfigError(f"{source.uri}: the starting weights have changed since the run began")
    return weight_files.WeightFile(safetensors_load(data), digest)


# --- starting -------------------------------------------------------------------------------------


def start(run: Run, classes: tuple[str, ...], source: InitialWeights | None) -> nn.Module:
    """The model with its first weights, on the CPU.

    Call with torch's generator seeded: new layers draw from it.
    """
    model = models.build(run.model, len(classes), run.augment.size)
    if source is None:
        return model
    if source.kind != "run":
        models.zero_head(model)  # what stays of it where the classifier starts anew
    models.load_state(model, _fitted(run, model, source, _read(source).state))
    return model


# --- finished runs --------------------------------------------------------------------------------


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
    """The best model of the run kept in `run_dir`, every byte checked: what reports, packages,
    comparisons and promotions are made of.

    Raises ValueError naming what is missing or damaged, and where a finished run says that its
    scores are of another model.
    """
    about = storage.read_json(join(run_dir, "run.json"))
    if about is None:
        raise ValueError(
            f"{run_dir} is not a run: it has no run.json. "
            "Name one of the folders below the runs' storage"
        )
    run = settings.from_dict(Run, about["run"])
    for step in checkpoint.steps(join(run_dir, "best")):
        folder = join(run_dir, "best", checkpoint.step_name(step))
        files, _ = storage.read_folder(folder)
        info = json.loads(files["model.json"])
        _require_agreement(run_dir, folder, info)
        with torch.random.fork_rng(devices=[]):
            model = models.build(run.model, len(info["classes"]), run.augment.size)
        models.load_state(model, safetensors_load(files["model.safetensors"]))
        return LoadedModel(model.eval(), run, tuple(info["classes"]), info, folder)
    raise ValueError(f"{run_dir} holds no best model yet: the run has not been evaluated once")


def _require_agreement(run_dir: str, folder: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless epoch and scores in result.json are those of the model in `folder`,
    whose model.json is `info`. An unfinished run has no result.json."""
    says = (storage.read_json(join(run_dir, "result.json")) or {}).get("metrics", {})
    holds = {"best/epoch": info.get("epoch")}
    for name, value in info.get("scores", {}).items():
        holds[f"best/{name.replace('/', '_')}"] = value
    differing = [
        f"{name} is {says[name]:g} there and {value:g} here"
        for name, value in holds.items()
        if value is not None and name in says and says[name] != value
    ]
    if differing:
        raise ValueError(
            f"{join(run_dir, 'result.json')} has the scores of another model than {folder} holds: "
            f"{', '.join(differing)}. Was one of them copied or put back? Restore both from one "
            "backup, or train the run again under another name"
        )
