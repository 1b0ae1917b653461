"""Image classifiers by name, for any number of classes.

`model.arch` is a torchvision name (resnet50) or `timm/NAME` or `timm/NAME.TAG`. Each library is one
module here behind the `ModelSource` protocol, and nothing outside asks which one a model is from. A
model's state dict has its library's keys whatever dropout is set, so weights load both ways.

dropout and drop_path are the probabilities that act: 0 switches off what the library has on by
default too (0.5 dropout in VGG, 0.1 stochastic depth in ConvNeXt). Initial weights come from
torch's global generator: call torch.manual_seed first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ftlib import config
from ftlib.settings import ConfigError
from ftlib.training.models import torchvision
from ftlib.training.models.source import (
    ModelSource,
    Preprocessing,
    PretrainedWeights,
    TokenLayer,
    preprocessing_of,
)

__all__ = [
    "ModelSource",
    "Preprocessing",
    "PretrainedWeights",
    "TokenLayer",
    "architectures",
    "backbone_parameters",
    "build",
    "build_on_meta",
    "check",
    "depths",
    "fit_state",
    "freeze",
    "freeze_backbone",
    "head",
    "head_name",
    "head_rows",
    "is_batch_independent",
    "load_state",
    "preprocessing_of",
    "pretrained",
    "published_classes",
    "source_of_arch",
    "token_layer",
    "trained_parameters",
    "undecayed",
    "usual_preprocessing",
    "without_tag",
    "zero_head",
]

TIMM = "timm/"
"""Prefix of timm's architectures."""
COUNTER = ".num_batches_tracked"
"""BatchNorm's counter of steps, which some files leave out and nothing here needs."""


def source_of_arch(arch: str) -> ModelSource:
    """The library that `model.arch` names."""
    if not arch.startswith(TIMM):
        return torchvision.SOURCE
    # Imported late: timm takes seconds, and runs of torchvision's models do without.
    from ftlib.training.models import timm

    return timm.SOURCE


def without_tag(arch: str) -> str:
    """timm/NAME of timm/NAME.TAG: the tag names weights, not another architecture."""
    return arch.partition(".")[0] if arch.startswith(TIMM) else arch


def _source_of(model: nn.Module) -> ModelSource:
    if not type(model).__module__.startswith("timm."):
        return torchvision.SOURCE
    from ftlib.training.models import timm

    return timm.SOURCE


# --- building -------------------------------------------------------------------------------------


def architectures() -> list[str]:
    """Every name that `model.arch` takes."""
    from ftlib.training.models import timm

    return torchvision.SOURCE.architectures() + timm.SOURCE.architectures()


def check(cfg: config.Model, train_size: int, eval_size: int | None = None) -> None:
    """ConfigError for all that `build` refuses about these settings, and for sizes in pixels that
    the model cannot take. Draws no weights, so it is quick."""
    source_of_arch(cfg.arch).check(cfg, train_size, eval_size)


def build(cfg: config.Model, num_classes: int, image_size: int = 224) -> nn.Module:
    """The model with random weights, on the CPU in float32.

    float[b, 3, S, S] -> logits float[b, num_classes]. Only models that work at one size, such as
    vision transformers, depend on `image_size` (S).

    Raises ConfigError: an unknown architecture, dropout or drop_path that cannot act, a size the
    model cannot take.
    """
    return source_of_arch(cfg.arch).build(cfg, num_classes, image_size)


def build_on_meta(cfg: config.Model, num_classes: int, image_size: int = 224) -> nn.Module:
    """What `build` makes, to look at its modules and shapes.

    Without weights where the library can do that, because drawing them takes seconds for a large
    model.
    """
    try:
        with torch.device("meta"):
            return build(cfg, num_classes, image_size)
    except (NotImplementedError, RuntimeError):
        # Some models read values to find their widths, which meta tensors do not have.
        return build(cfg, num_classes, image_size)


def pretrained(arch: str) -> PretrainedWeights:
    """The architecture's own published weights; ConfigError where there are none."""
    return source_of_arch(arch).pretrained(arch)


def published_classes(arch: str) -> int | None:
    """Classes of the architecture's own published weights; None where there are none."""
    try:
        return pretrained(arch).classes
    except ConfigError:
        return None


def usual_preprocessing(arch: str) -> Preprocessing:
    """How the architecture's own published weights expect their images; ImageNet's mean and
    standard deviation where there are none."""
    try:
        return pretrained(arch).preprocessing
    except ConfigError:
        return Preprocessing()


# --- what a model is made of ----------------------------------------------------------------------


def head_name(model: nn.Module) -> str:
    """Dotted name of the layer that maps features to classes, such as fc or classifier.6; its keys
    in the state dict start with it."""
    return _source_of(model).head_names(model)[0]


def head(model: nn.Module) -> nn.Module:
    """The layer that maps features to classes: nn.Linear, in a few models a 1 x 1 nn.Conv2d.

    All the rest is the backbone.
    """
    return model.get_submodule(head_name(model))


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name in _source_of(model).head_names(model))


def head_rows(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Classes of the classifier among the weights in `state`; None where it is not there under the
    model's own name."""
    weight = state.get(f"{head_name(model)}.weight")
    return None if weight is None else len(weight)


def zero_head(model: nn.Module) -> None:
    """Let the classifier start at zero: every class equally likely, a loss of log C.

    Libraries draw it for training from scratch. timm's EfficientNets take +-0.7 for two classes,
    which on pretrained features makes confident nonsense that the backbone is then bent to
    (zeros as in Kolesnikov et al. 2020, Big Transfer).
    """
    for name in _source_of(model).head_names(model):
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)


def backbone_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are not the classifier's."""
    prefixes = _head_prefixes(model)
    return {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}


def depths(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Parameter name -> depth, from 0 (the stem) to the classifier, which is the largest.

    A depth is a block, or with `coarse` a stage of several blocks.
    """
    return _source_of(model).depths(model, coarse)


def undecayed(model: nn.Module) -> Collection[str] | None:
    """Names of parameters without weight decay; None for ftlib's own rule (biases and norms)."""
    return _source_of(model).undecayed(model)


def is_batch_independent(model: nn.Module) -> bool:
    """Whether a training step computes each image by itself.

    That is: no BatchNorm, and nothing drawn at random for the images together. Such a batch may be
    split into parts without changing what is computed.
    """
    return _source_of(model).is_batch_independent(model)


def token_layer(model: nn.Module) -> TokenLayer | None:
    """For Grad-CAM in models without maps; None where any layer with maps will do."""
    return _source_of(model).token_layer(model)


# --- freezing -------------------------------------------------------------------------------------


def freeze(
    model: nn.Module, trained: Collection[str] | None, *, norm_statistics: bool = False
) -> None:
    """Let only the parameters named in `trained` change; None: all of them.

    The others get no gradient, and a BatchNorm whose parameters are all frozen is in eval mode, so
    that its statistics stay too; with `norm_statistics` every BatchNorm is. Call it after
    model.train(), which would set BatchNorm back. Dropout goes on as it is set.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(trained is None or name in trained)
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            own = [f"{name}.{part}" for part, _ in m.named_parameters(recurse=False)]
            frozen = trained is not None and not any(n in trained for n in own)
            m.train(model.training and not frozen and not norm_statistics)


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """`freeze` all but the classifier, or nothing."""
    freeze(model, _classifier_parameters(model) if frozen else None)


def trained_parameters(model: nn.Module, cfg: config.Model, epoch: int) -> frozenset[str] | None:
    """Names of the parameters that train in `epoch` (from 0); None: all of them.

    First the classifier alone, for cfg.freeze_epochs; then the backbone too, at once or a stage
    more every cfg.unfreeze_every epochs.
    """
    if cfg.freeze_epochs == -1 or epoch < cfg.freeze_epochs:
        return frozenset(_classifier_parameters(model))
    if not cfg.unfreeze_every:
        return None
    stages = 1 + (epoch - cfg.freeze_epochs) // cfg.unfreeze_every
    found = depths(model, coarse=True)
    first = max(found.values()) - stages
    if first <= 0:
        return None
    return frozenset(name for name, depth in found.items() if depth >= first)


def _classifier_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()} - backbone_parameters(model)


# --- weights --------------------------------------------------------------------------------------


def fit_state(
    model: nn.Module,
    cfg: config.Model,
    image_size: int,
    state: Mapping[str, Tensor],
    *,
    classes: int | None = None,
    new_head: bool = False,
) -> dict[str, Tensor]:
    """Weights made to fit `model`, ready for a strict load.

    model: what `build(cfg, ..., image_size)` made.
    state: weights with the library's present or older keys, of any image size.
    classes: rows of their classifier, where it is known; 0 for none.
    new_head: keep the model's own classifier.

    Raises ValueError saying what does not fit.
    """
    own, prefixes = model.state_dict(), _head_prefixes(model)
    found, cause = dict(state), ""
    if _shapes(found, prefixes) != _shapes(own, prefixes):
        if classes is None:
            classes = head_rows(model, state)
        if classes is None:
            classes = published_classes(cfg.arch) or 1000
        try:
            with torch.random.fork_rng(devices=[]):
                found = source_of_arch(cfg.arch).convert(cfg, image_size, state, classes)
        except ValueError as error:
            cause = str(error)
    left_out = prefixes if new_head else ()
    found = _without(found, left_out)
    problem = misfit(_without(own, left_out), found) or cause
    if problem:
        raise ValueError(problem)
    counters = {k: v for k, v in own.items() if k.endswith(COUNTER)}
    return counters | found | {k: v for k, v in own.items() if k.startswith(left_out)}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A strict load. Some models (MNASNet) ask a state dict for its version, which safetensors does
    not keep: it is the model's own."""
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned)


def misfit(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How many of the tensors found have a name and shape of the model's, and up to three on
    either side that do not; '' where all fit and none is missing but BatchNorm's counters."""
    missing = [name for name in own if name not in found and not name.endswith(COUNTER)]
    wrong = sorted(name for name in found if name not in own)
    wrong += [
        f"{name} of {list(found[name].shape)}, where the model's is {list(value.shape)}"
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    ]
    if not missing and not wrong:
        return ""
    text = f"{len(found) - len(wrong)} of its {len(found)} tensors fit by name and shape"
    if wrong:
        text += f"; {len(wrong)} do not, such as {', '.join(wrong[:3])}"
    if missing:
        text += f"; the model lacks {len(missing)}, such as {', '.join(missing[:3])}"
    return text


def _without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(prefixes)}


def _shapes(state: Mapping[str, Tensor], heads: tuple[str, ...]) -> dict[str, torch.Size]:
    return {
        name: value.shape
        for name, value in _without(state, heads).items()
        if not name.endswith(COUNTER)
    }
