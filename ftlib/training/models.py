"""torchvision's classifiers by name, for any number of classes, with dropout and stochastic depth where they can act.

A model's state dict has torchvision's keys, whatever dropout is set, so weights load both ways. Initial weights come from torch's
global generator: call torch.manual_seed first. dropout and drop_path are exactly the probabilities that act: 0 switches off what
torchvision has on by default too (0.5 dropout in VGG, 0.1 stochastic depth in ConvNeXt ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model, get_model_builder, get_model_weights
from torchvision.models.resnet import ResNet
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from ftlib import config
from ftlib.settings import ConfigError, nearest
from ftlib.training import one_by_one_conv

DROPOUT_ARGUMENT = {"densenet": "drop_rate", "maxvit": "mlp_dropout"}
"""What a family calls its dropout, where it is not `dropout`."""
NO_DROPOUT = ("convnext", "regnet", "shufflenet")
"""Families that torchvision built without dropout."""
DROP_PATH = ("convnext", "efficientnet", "maxvit", "swin")
"""Families that torchvision built with stochastic depth; ResNets get theirs here."""
LEAST_SIZE = {
    "alexnet": 63,
    "convnext": 32,
    "densenet": 29,
    "googlenet": 15,
    "inception": 75,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
    "vgg": 32,
}
"""Smallest picture side in pixels that leaves something behind the last pooling; others take whatever augment.size can be."""
FIXED_SIZE = ("vit_", "maxvit")
"""Families that work at one picture size only, which is fixed when the model is made."""


def architectures() -> list[str]:
    """Names that `model.arch` takes: all of torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def build(
    cfg: config.Model, num_classes: int, imagenet_weights: bool = False, image_size: int = 224
) -> nn.Module:
    """The model, on the CPU in float32, for pictures of `image_size` (only ViT and MaxViT depend on it): float[b, 3, S, S] -> logits [b, C].

    `imagenet_weights` fetches torchvision's default weights; their classifier is kept when num_classes is 1000 and cfg.reset_head is
    false, otherwise it starts anew. GoogLeNet and Inception come without their auxiliary classifiers and, like torchvision's own
    pretrained ones, expect ImageNet normalisation, which they undo themselves.

    ConfigError: unknown architecture, dropout or drop_path that cannot act, a size the model cannot take, weights that cannot be had.
    """
    check(cfg, image_size)
    model = get_model(
        cfg.arch, weights=None, num_classes=num_classes, **_arguments(cfg, image_size)
    )
    if isinstance(model, ResNet):
        _regularize_resnet(model, cfg)
    else:
        _set_drop_path(model, cfg)
    if imagenet_weights:
        _load_imagenet(model, cfg, num_classes)
    one_by_one_conv.shorten(model)
    return model


def build_on_meta(cfg: config.Model, num_classes: int, image_size: int = 224) -> nn.Module:
    """What `build` makes, for looking at its modules and shapes: without weights where torchvision can, since drawing them takes seconds for a large model."""
    try:
        with torch.device("meta"):
            return build(cfg, num_classes, image_size=image_size)
    except NotImplementedError:  # torch's own: a RegNet looks at values to find its widths
        return build(cfg, num_classes, image_size=image_size)


def check(cfg: config.Model, train_size: int, eval_size: int | None = None) -> None:
    """ConfigError for everything that `build` refuses about these settings, and for an evaluation size that the model cannot take.
    Makes no model, so it is quick."""
    arch = cfg.arch
    if arch not in architectures():
        raise ConfigError(
            f"model.arch = {arch}: torchvision has no such classifier.{nearest(arch, architectures())}"
        )
    resnet = _is_resnet(arch)
    if cfg.dropout_in != "both" and not resnet:
        raise ConfigError(
            f"model.dropout_in = {cfg.dropout_in}: only ResNets have the choice, and model.arch is {arch}. Leave it at both"
        )
    if cfg.dropout > 0 and arch.startswith(NO_DROPOUT):
        raise ConfigError(
            f"model.dropout = {cfg.dropout:g}: it cannot act, because torchvision's {arch} has no dropout. Set it to 0, or choose a ResNet"
        )
    if cfg.drop_path > 0 and not resnet and not arch.startswith(DROP_PATH):
        raise ConfigError(
            f"model.drop_path = {cfg.drop_path:g}: it cannot act, because torchvision's {arch} has no stochastic depth. "
            "Set it to 0, or choose a ResNet, ConvNeXt, EfficientNet, Swin or MaxViT"
        )
    _check_size(arch, train_size, "augment.size")
    if eval_size is not None:
        if eval_size != train_size and arch.startswith(FIXED_SIZE):
            raise ConfigError(
                f"evaluate.size = {eval_size}: {arch} works at its training size only, {train_size}. Set evaluate.size to 0"
            )
        _check_size(arch, eval_size, "evaluate.size")


def is_batch_independent(model: nn.Module) -> bool:
    """Whether a training step sees each image by itself: no BatchNorm, and nothing drawn at random for the images together. Such a batch may be
    cut into parts without changing what is computed."""
    drawing = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, StochasticDepth)
    return not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm)
        or (isinstance(m, drawing) and getattr(m, "p", getattr(m, "dropout", 0)) > 0)
        for m in model.modules()
    )


def _arguments(cfg: config.Model, image_size: int) -> dict[str, Any]:
    """Keyword arguments of torchvision's builder."""
    arch = cfg.arch
    out: dict[str, Any] = {}
    if not _is_resnet(arch) and not arch.startswith(NO_DROPOUT):
        out[
            next(
                (a for family, a in DROPOUT_ARGUMENT.items() if arch.startswith(family)), "dropout"
            )
        ] = cfg.dropout
    if arch.startswith("vit_"):
        out["image_size"] = image_size
    elif arch.startswith("maxvit"):
        out["input_size"] = (image_size, image_size)
    elif arch in ("googlenet", "inception_v3"):
        # The auxiliary classifiers exist to train without BatchNorm (Szegedy et al. 2015); with it they only change the output's type.
        out |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    return out


def _is_resnet(arch: str) -> bool:
    return inspect.getmodule(get_model_builder(arch)) is torchvision.models.resnet


def _check_size(arch: str, size: int, setting: str) -> None:
    if arch.startswith("vit_"):
        patch = int(arch.rpartition("_")[2])
        if size % patch:
            raise ConfigError(
                f"{setting} = {size}: {arch} cuts pictures into patches of {patch} pixels. Set it to {max(1, round(size / patch)) * patch}"
            )
        return
    if arch.startswith("maxvit"):  # windows of 7 x 7 at strides 4, 8, 16 and 32
        if size % 224:
            raise ConfigError(
                f"{setting} = {size}: {arch} needs a multiple of 224 pixels. Set it to {max(1, round(size / 224)) * 224}"
            )
        return
    least = next((n for family, n in LEAST_SIZE.items() if arch.startswith(family)), 1)
    if size < least:
        raise ConfigError(
            f"{setting} = {size}: {arch} needs at least {least} pixels. Set it to {least} or more, or choose a ResNet"
        )


# --- dropout and stochastic depth -------------------------------------------------------------------------------------------------


class RegularizedBlock(nn.Module):
    """A ResNet's BasicBlock or Bottleneck with spatial dropout and stochastic depth at the end of its residual branch.

    Both act after the branch's last norm, right before the addition. Whole channels are dropped (Tompson et al. 2015), since
    neighbouring pixels of a channel tell the same. After the last norm, because dropout in front of a BatchNorm changes the variance
    which that norm then sees in training but not in evaluation (Li et al. 2019, "disharmony"); behind it the shift reaches the next
    block only beside the undropped shortcut. It is also one place that Bottleneck and BasicBlock both have.
    It takes over the block's layers under their names, so parameters and state-dict keys stay torchvision's.
    """

    def __init__(self, block: nn.Module, dropout: float, drop_path: float) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.downsample = getattr(block, "downsample", None)
        self.bottleneck = hasattr(block, "conv3")
        self.dropout = nn.Dropout2d(dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        out = self.drop_path(self.dropout(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


def _regularize_resnet(model: ResNet, cfg: config.Model) -> None:
    in_blocks = cfg.dropout if cfg.dropout_in != "head" else 0.0
    before_head = cfg.dropout if cfg.dropout_in != "blocks" else 0.0
    if in_blocks > 0 or cfg.drop_path > 0:
        places = [
            (stage, i)
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
            for i in range(len(stage))
        ]
        for depth, (stage, i) in enumerate(places, 1):  # l / L of Huang et al. 2016, section 3
            stage[i] = RegularizedBlock(stage[i], in_blocks, cfg.drop_path * depth / len(places))
    if (
        before_head > 0
    ):  # beside the pooling, which has no weights, so that the classifier's keys stay fc.weight and fc.bias
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(before_head))  # type: ignore[assignment]


def _set_drop_path(model: nn.Module, cfg: config.Model) -> None:
    """Scale the built-in stochastic depth so that the last block which has a shortcut is skipped with cfg.drop_path."""
    unused = {
        id(m.stochastic_depth)
        for m in model.modules()
        if not getattr(m, "use_res_connect", True) and hasattr(m, "stochastic_depth")
    }
    found = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    top = max((m.p for m in found if id(m) not in unused), default=1.0)
    for m in found:
        m.p = 0.0 if id(m) in unused else cfg.drop_path * m.p / top


# --- classifier and backbone ------------------------------------------------------------------------------------------------------


def head_name(model: nn.Module) -> str:
    """Dotted name of the layer that maps features to classes, such as fc or classifier.6; its keys in the state dict start with it."""
    for part in ("fc", "classifier", "heads", "head"):
        if isinstance(getattr(model, part, None), nn.Module):
            layers = [
                name
                for name, m in getattr(model, part).named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d))
            ]
            if layers:
                return f"{part}.{layers[-1]}".rstrip(".")
    raise ValueError(f"{type(model).__name__} has no classifier layer that ftlib knows")


def head(model: nn.Module) -> nn.Module:
    """The layer that maps features to classes: nn.Linear, in SqueezeNet a 1 x 1 nn.Conv2d. All the rest is the backbone."""
    return model.get_submodule(head_name(model))


def backbone_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are not the classifier's."""
    prefix = head_name(model) + "."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """No gradients for the backbone, and its BatchNorm in eval mode, so that nothing of it changes; or both undone.
    Call it after model.train(), which would set BatchNorm back. Dropout goes on as it is set."""
    backbone = backbone_parameters(model)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name in backbone))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.train(model.training and not frozen)


def fit_state(
    model: nn.Module, state: Mapping[str, Tensor], new_head: bool = False
) -> dict[str, Tensor]:
    """`state` made to fit `model`, ready for a strict load: the classifier is the model's own where `new_head`, and a ViT's position
    embeddings are interpolated to the model's image size (Dosovitskiy et al. 2021, section 3.2)."""
    out = dict(state)
    own = model.state_dict()
    if new_head:
        prefix = head_name(model) + "."
        out = {k: v for k, v in out.items() if not k.startswith(prefix)} | {
            k: v for k, v in own.items() if k.startswith(prefix)
        }
    position = "encoder.pos_embedding"
    if (
        isinstance(model, VisionTransformer)
        and position in out
        and out[position].shape != own[position].shape
    ):
        out = dict(interpolate_embeddings(model.image_size, model.patch_size, out))  # type: ignore[arg-type]
    return out


# --- torchvision's weights --------------------------------------------------------------------------------------------------------


def _load_imagenet(model: nn.Module, cfg: config.Model, num_classes: int) -> None:
    weights = get_model_weights(cfg.arch).DEFAULT  # type: ignore[attr-defined]
    address = weights.url
    place = f"{torch.hub.get_dir()}/checkpoints/{address.rpartition('/')[2]}"
    try:
        # Through torchvision's own builder, which also renames the keys of older files.
        donor = get_model(cfg.arch, weights=weights, progress=False)
    except OSError as error:  # urllib's errors are OSErrors
        raise ConfigError(
            f"model.init_from = imagenet: {address} could not be fetched ({error}). Start once where there is a network, or put "
            f"that file at {place} on every node, or set model.init_from to scratch or file:PATH"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ConfigError(
            f"model.init_from = imagenet: the file {place} is damaged ({error}). Delete it, so that it is fetched again"
        ) from error
    model.load_state_dict(
        fit_state(model, donor.state_dict(), new_head=cfg.reset_head or num_classes != 1000)
    )
