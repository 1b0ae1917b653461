"""timm's classifiers, by timm's own functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.layers import DropBlock2d, DropPath
from timm.models import group_parameters
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.optim import auto_group_layers
from torch import Tensor, nn

from ftlib import config
from ftlib.settings import ConfigError, nearest
from ftlib.training import one_by_one_conv
from ftlib.training.models.source import PretrainedWeights, TokenLayer, preprocessing_of

PREFIX = "timm/"
PROBE = 0.25
"""A probability that no model has by default, to see where an argument arrives."""
STEPS = (7, 8, 14, 16, 28, 32, 56, 64, 112, 224)
"""Sizes that work are looked for among the multiples of these, in pixels."""
LOADING_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What timm's conversions raise for weights of another model."""


class TimmSource:
    """timm's registry of models."""

    name = "timm"

    def architectures(self) -> list[str]:
        return [PREFIX + name for name in timm.list_models()]

    def check(self, cfg: config.Model, train_size: int, eval_size: int | None) -> None:
        name = _known_name(cfg.arch)
        acting = _acting_arguments(name)
        if cfg.dropout_in != "both" and not _has_resnet_blocks(name):
            raise ConfigError(
                f"model.dropout_in = {cfg.dropout_in}: only ResNets have the choice, and "
                f"model.arch is {cfg.arch}. Leave it at both"
            )
        if cfg.dropout > 0 and "drop_rate" not in acting:
            raise ConfigError(
                f"model.dropout = {cfg.dropout:g}: it cannot act, because {cfg.arch} has no "
                "dropout. Set it to 0"
            )
        if cfg.drop_path > 0 and "drop_path_rate" not in acting:
            raise ConfigError(
                f"model.drop_path = {cfg.drop_path:g}: it cannot act, because {cfg.arch} has no "
                "stochastic depth. Set it to 0, or choose a ResNet, ConvNeXt or ViT"
            )
        problem = _size_problem(name, train_size, train_size)
        if problem:
            works = _sizes_that_work(name, train_size)
            raise ConfigError(
                f"augment.size = {train_size}: {cfg.arch} cannot take it ({problem}). "
                f"Set it to {works}"
            )
        if eval_size is None or eval_size == train_size:
            return
        problem = _size_problem(name, train_size, eval_size)
        if problem:
            raise ConfigError(
                f"evaluate.size = {eval_size}: {cfg.arch} trained at {train_size} cannot take it "
                f"({problem}). Set evaluate.size to 0"
            )

    def build(self, cfg: config.Model, num_classes: int, image_size: int) -> nn.Module:
        self.check(cfg, image_size, None)
        name = _known_name(cfg.arch)
        acting = _acting_arguments(name)
        in_blocks = cfg.dropout if cfg.dropout_in != "head" else 0.0
        before_head = cfg.dropout if cfg.dropout_in != "blocks" else 0.0
        arguments = {"drop_rate": before_head, "drop_path_rate": cfg.drop_path}
        model = _create(
            name, num_classes, image_size, {k: v for k, v in arguments.items() if k in acting}
        )
        if in_blocks > 0 and isinstance(model, ResNet):
            _add_block_dropout(model, in_blocks)
        one_by_one_conv.shorten(model)
        return model

    def pretrained(self, arch: str) -> PretrainedWeights:
        cfg = _weights_config(_known_name(arch))
        name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
        preprocessing = preprocessing_of(cfg.to_dict())
        if cfg.input_size[0] != 3:
            raise ConfigError(
                f"model.arch = {arch}: its pretrained weights take {cfg.input_size[0]} channels, "
                "and pictures here have 3. Choose another architecture or tag"
            )
        if cfg.hf_hub_id:
            return PretrainedWeights(
                name,
                cfg.num_classes,
                preprocessing,
                repo=cfg.hf_hub_id,
                filename=cfg.hf_hub_filename or "",
            )
        if cfg.url and not cfg.custom_load:
            return PretrainedWeights(name, cfg.num_classes, preprocessing, url=cfg.url)
        known = [n for n in timm.list_models(f"{cfg.architecture}*", pretrained=True)][:5]
        others = f" There are weights for {', '.join(PREFIX + n for n in known)}." if known else ""
        raise ConfigError(
            f"model.arch = {arch}: timm has no pretrained weights for it.{others} "
            "Or set model.init_from to scratch, file:PATH or hf-hub:ORG/NAME"
        )

    def convert(
        self, cfg: config.Model, image_size: int, state: Mapping[str, Tensor], classes: int
    ) -> dict[str, Tensor]:
        """By the loader that timm uses for its own weights, with the model's own filter."""
        name = _known_name(cfg.arch)
        overlay = {"state_dict": dict(state), "num_classes": classes, "custom_load": False}
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            donor = _create(name, classes, image_size, arguments)
        except LOADING_ERRORS as error:
            raise ValueError(_last_line(error)) from error
        return dict(donor.state_dict())

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        named = (named,) if isinstance(named, str) else tuple(named)
        modules = dict(model.named_modules())
        names = tuple(n for n in named if isinstance(modules.get(n), nn.Linear | nn.Conv2d))
        if names:
            return names
        classifier = model.get_classifier()  # type: ignore[operator]
        for name, module in modules.items():
            if module is classifier and isinstance(module, nn.Linear | nn.Conv2d):
                return (name,)
        raise ValueError(f"{type(model).__name__} has no classifier layer that ftlib knows")

    def depths(self, model: nn.Module, coarse: bool = False) -> dict[str, int]:
        if hasattr(model, "group_matcher"):
            matcher = model.group_matcher(coarse=coarse)  # type: ignore[operator]
            found = group_parameters(model, matcher, reverse=True)
        else:
            found = auto_group_layers(model)
        last = max(found.values())
        return {name: found.get(name, last) for name, _ in model.named_parameters()}

    def undecayed(self, model: nn.Module) -> Collection[str] | None:
        """Everything with one dimension, and what the model asks for (position embeddings)."""
        asked = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
        flat = {name for name, p in model.named_parameters() if p.ndim <= 1}
        return flat | set(asked)

    def is_batch_independent(self, model: nn.Module) -> bool:
        return not any(_mixes_images(m) for m in model.modules())

    def token_layer(self, model: nn.Module) -> TokenLayer | None:
        """The last attention's input where there are tokens; the last stage where maps are stored
        with their channels last."""
        blocks = getattr(model, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(model, "patch_embed"):
            norm = getattr(blocks[-1], "norm1", None)
            if isinstance(norm, nn.Module):
                return TokenLayer(norm, _TokenGrid(model))
        layers = getattr(model, "layers", None)
        if getattr(model, "output_fmt", "") == "NHWC" and isinstance(layers, nn.Sequential):
            return TokenLayer(layers[-1], lambda maps: maps.permute(0, 3, 1, 2))
        return None


SOURCE = TimmSource()


# --- names ----------------------------------------------------------------------------------------


def _known_name(arch: str) -> str:
    """timm's name, NAME or NAME.TAG. ConfigError for one that timm does not have."""
    name = arch.removeprefix(PREFIX)
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = nearest(arch, SOURCE.architectures())
        raise ConfigError(f"model.arch = {arch}: timm has no such classifier.{hint}")
    if tag and _config_of(name) is None:
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
        there = f"There are {', '.join(tags)}" if tags else f"Use {PREFIX}{base}"
        raise ConfigError(f"model.arch = {arch}: {base} has no weights of that name. {there}")
    return name


def _config_of(name: str) -> Any:
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        return None


def _weights_config(name: str) -> Any:
    cfg = _config_of(name)
    if cfg is None:
        raise ConfigError(f"model.arch = {PREFIX}{name}: timm has no pretrained weights for it")
    return cfg


# --- building -------------------------------------------------------------------------------------


def _create(
    name: str, num_classes: int, image_size: int, arguments: Mapping[str, Any]
) -> nn.Module:
    cfg = _config_of(name)
    more = dict(arguments)
    if cfg is not None and cfg.fixed_input_size:
        more["img_size"] = image_size
    return timm.create_model(name, num_classes=num_classes, **more)


def _on_meta(name: str, image_size: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Modules and shapes without weights, where the model can do without reading any."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _create(name, 2, image_size, arguments)
        except NotImplementedError:
            return _create(name, 2, image_size, arguments)
        except RuntimeError as error:
            if "meta" not in str(error).lower():
                raise
            return _create(name, 2, image_size, arguments)


@lru_cache(maxsize=64)
def _trained_size(name: str) -> int:
    cfg = _config_of(name)
    return 224 if cfg is None else int(cfg.input_size[1])


@lru_cache(maxsize=64)
def _acting_arguments(name: str) -> frozenset[str]:
    """Which of drop_rate and drop_path_rate the model takes and uses."""
    size, found = _trained_size(name), set()
    for argument in ("drop_rate", "drop_path_rate"):
        try:
            model = _on_meta(name, size, {argument: PROBE})
        except TypeError:  # it has no such argument
            continue
        for m in model.modules():
            dropout = isinstance(m, nn.modules.dropout._DropoutNd) and m.p == PROBE
            if argument == "drop_rate" and (dropout or getattr(m, "drop_rate", 0.0) == PROBE):
                found.add(argument)
            if argument == "drop_path_rate" and getattr(m, "drop_prob", False):
                found.add(argument)
    return frozenset(found)


@lru_cache(maxsize=64)
def _has_resnet_blocks(name: str) -> bool:
    return bool(_resnet_blocks(_on_meta(name, _trained_size(name), {})))


def _resnet_blocks(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, ResNet):
        return []
    return [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]


def _add_block_dropout(model: nn.Module, dropout: float) -> None:
    """Drop whole channels at the end of each residual branch, beside timm's stochastic depth.

    As in torchvision's ResNets here: after the last norm, right before the addition.
    """
    for block in _resnet_blocks(model):
        layers: list[nn.Module] = [nn.Dropout2d(dropout)]
        if isinstance(block.drop_path, nn.Module):
            layers.append(block.drop_path)
        block.drop_path = nn.Sequential(*layers)


# --- sizes ----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _size_problem(name: str, train_size: int, size: int) -> str:
    """Why a model built for `train_size` cannot take pictures of `size`; '' where it can."""
    try:
        model = _on_meta(name, train_size, {}).eval()
        patch = _patch(model)
        if patch and size % patch:
            return f"it cuts pictures into patches of {patch} pixels"
        device = next(model.parameters()).device
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=device))
    except NotImplementedError:
        return ""  # it looks at values on the way, which a model without weights does not have
    except LOADING_ERRORS as error:
        return _last_line(error) or type(error).__name__
    return ""


def _patch(model: nn.Module) -> int:
    """Side of a vision transformer's patches in pixels; 0 for models that pad their pictures."""
    embed = getattr(model, "patch_embed", None)
    if not hasattr(model, "blocks") or getattr(embed, "dynamic_img_pad", True):
        return 0
    return int(getattr(embed, "patch_size", (0,))[0])


def _sizes_that_work(name: str, size: int) -> str:
    """The nearest sizes below and above, for a message."""
    below = sorted({size // step * step for step in STEPS} - {0}, reverse=True)
    above = sorted({(size // step + 1) * step for step in STEPS})
    found = []
    for candidates in (below, above):
        works = (s for s in candidates if not _size_problem(name, s, s))
        found += [str(s) for s in works][:1]
    return " or ".join(found) or f"{_trained_size(name)}, the size it was trained at"


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


# --- modules --------------------------------------------------------------------------------------


def _mixes_images(m: nn.Module) -> bool:
    """Statistics over the batch, or numbers drawn for all its images together."""
    if isinstance(m, nn.modules.batchnorm._BatchNorm) or "running_var" in m._buffers:
        return True
    if isinstance(m, DropPath | DropBlock2d):
        return bool(m.drop_prob)
    if isinstance(m, nn.modules.dropout._DropoutNd):
        return m.p > 0
    if isinstance(m, nn.MultiheadAttention):
        return m.dropout > 0
    # Dropout by a function in forward: the probability is kept under these names.
    return any(_positive(getattr(m, name, 0)) for name in ("drop_rate", "drop_prob", "prob"))


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


class _TokenGrid:
    """[b, prefix + h * w, C] -> [b, C, h, w]: class and register tokens left out."""

    def __init__(self, model: nn.Module) -> None:
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        grid = getattr(model.patch_embed, "grid_size", None)
        self.grid = tuple(grid) if isinstance(grid, tuple | list) else None

    def __call__(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, self.prefix :]
        batch, number, channels = tokens.shape
        side = round(number**0.5)
        height, width = self.grid or (side, side)
        return tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
