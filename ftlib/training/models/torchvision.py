"""torchvision's classifiers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model, get_model_builder, get_model_weights
from torchvision.models.resnet import ResNet
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.ops import StochasticDepth

from ftlib import config
from ftlib.settings import ConfigError, nearest
from ftlib.training import one_by_one_conv
from ftlib.training.models.source import Preprocessing, PretrainedWeights, TokenLayer

DROPOUT_ARGUMENT = {"densenet": "drop_rate", "maxvit": "mlp_dropout"}
"""What a family calls its dropout, where it is not `dropout`."""
NO_DROPOUT = ("convnext", "regnet", "shufflenet")
"""Families that torchvision built without dropout."""
DROP_PATH = ("convnext", "efficientnet", "maxvit", "swin")
"""Families that torchvision built with stochastic depth; ResNets get theirs here."""
SMALLEST_SIZE = {
    "alexnet": 63,
    "convnext": 32,
    "densenet": 29,
    "googlenet": 15,
    "inception": 75,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
    "vgg": 32,
}
"""Smallest picture side in pixels that leaves something behind the last pooling; others take
whatever augment.size can be."""
FIXED_SIZE = ("vit_", "maxvit")
"""Families that work at one picture size only, which is fixed when the model is made."""
BLOCKS = (
    r"(layer\d+\.\d+)\.",  # ResNet
    r"(trunk_output\.block\d+\.block\d+-\d+)\.",  # RegNet
    r"(encoder\.layers\.encoder_layer_\d+)\.",  # ViT
    r"(features\.(?:denseblock\d+\.denselayer\d+|transition\d+))\.",  # DenseNet
    r"(features\.\d+\.\d+)\.(?!(?:weight|bias)$)",  # ConvNeXt, EfficientNet, Swin
    r"(features\.\d+)\.",  # VGG, AlexNet, MobileNet, SqueezeNet
    r"(stage\d+\.\d+)\.",  # ShuffleNet
    r"(blocks\.\d+\.layers\.\d+)\.",  # MaxViT
    r"(layers\.\d+(?:\.\d+)?)\.",  # MNASNet
    r"(inception\d\w)\.",  # GoogLeNet
    r"(Mixed_\d\w)\.",  # Inception
)
"""Names of blocks, by family."""
STAGES = (
    r"(layer\d+)\.",
    r"(trunk_output\.block\d+)\.",
    r"(encoder\.layers\.encoder_layer_\d+)\.",
    r"(features\.(?:denseblock|transition)\d+)\.",
    r"(features\.\d+)\.",
    r"(stage\d+)\.",
    r"(blocks\.\d+)\.",
    r"(layers\.\d+)\.",
    r"(inception\d)\w\.",
    r"(Mixed_\d)\w\.",
)
"""Names of stages of several blocks."""


class TorchvisionSource:
    """torchvision.models, all classifiers of it."""

    name = "torchvision"

    def architectures(self) -> list[str]:
        return torchvision.models.list_models(module=torchvision.models)

    def check(self, cfg: config.Model, train_size: int, eval_size: int | None) -> None:
        arch = cfg.arch
        if arch not in self.architectures():
            hint = nearest(arch, self.architectures())
            raise ConfigError(
                f"model.arch = {arch}: torchvision has no such classifier.{hint} "
                "timm's are named timm/NAME"
            )
        resnet = _is_resnet(arch)
        if cfg.dropout_in != "both" and not resnet:
            raise ConfigError(
                f"model.dropout_in = {cfg.dropout_in}: only ResNets have the choice, and "
                f"model.arch is {arch}. Leave it at both"
            )
        if cfg.dropout > 0 and arch.startswith(NO_DROPOUT):
            raise ConfigError(
                f"model.dropout = {cfg.dropout:g}: it cannot act, because torchvision's {arch} has "
                "no dropout. Set it to 0, or choose a ResNet"
            )
        if cfg.drop_path > 0 and not resnet and not arch.startswith(DROP_PATH):
            raise ConfigError(
                f"model.drop_path = {cfg.drop_path:g}: it cannot act, because torchvision's {arch} "
                "has no stochastic depth. "
                "Set it to 0, or choose a ResNet, ConvNeXt, EfficientNet, Swin or MaxViT"
            )
        _check_size(arch, train_size, "augment.size")
        if eval_size is not None:
            if eval_size != train_size and arch.startswith(FIXED_SIZE):
                raise ConfigError(
                    f"evaluate.size = {eval_size}: {arch} works at its training size only, "
                    f"{train_size}. Set evaluate.size to 0"
                )
            _check_size(arch, eval_size, "evaluate.size")

    def build(self, cfg: config.Model, num_classes: int, image_size: int) -> nn.Module:
        """GoogLeNet and Inception come without their auxiliary classifiers and, like torchvision's
        pretrained ones, expect ImageNet normalization, which they undo themselves."""
        self.check(cfg, image_size, None)
        arguments = _arguments(cfg, image_size)
        model = get_model(cfg.arch, weights=None, num_classes=num_classes, **arguments)
        if isinstance(model, ResNet):
            _regularize_resnet(model, cfg)
        else:
            _set_drop_path(model, cfg)
        one_by_one_conv.shorten(model)
        return model

    def pretrained(self, arch: str) -> PretrainedWeights:
        weights = get_model_weights(arch).DEFAULT  # type: ignore[attr-defined]
        preset = weights.transforms()
        size, resized = preset.crop_size[0], preset.resize_size[0]
        preprocessing = Preprocessing(
            tuple(preset.mean),
            tuple(preset.std),
            crop=round(size / resized, 4),
            interpolation=preset.interpolation.value,
            size=size,
        )
        classes = len(weights.meta["categories"])
        return PretrainedWeights(f"{arch}.{weights.name}", classes, preprocessing, url=weights.url)

    def convert(
        self, cfg: config.Model, image_size: int, state: Mapping[str, Tensor], classes: int
    ) -> dict[str, Tensor]:
        out = {_present_name(cfg.arch, k): v for k, v in state.items() if not _is_auxiliary(k)}
        position = "encoder.pos_embedding"
        if cfg.arch.startswith("vit_") and position in out:
            out = dict(interpolate_embeddings(image_size, _patch(cfg.arch), out))  # type: ignore[arg-type]
        return out

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        for part in ("fc", "classifier", "heads", "head"):
            module = getattr(model, part, None)
            if not isinstance(module, nn.Module):
                continue
            layers = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
            if layers:
                return (f"{part}.{layers[-1]}".rstrip("."),)
        raise ValueError(f"{type(model).__name__} has no classifier layer that ftlib knows")

    def depths(self, model: nn.Module, coarse: bool = False) -> dict[str, int]:
        """The stem is all that comes before the first block; the classifier's depth holds all that
        comes after the last, such as a final norm."""
        patterns = STAGES if coarse else BLOCKS
        names = [name for name, _ in model.named_parameters()]
        heads = tuple(f"{head}." for head in self.head_names(model))
        blocks = [None if n.startswith(heads) else _first_match(patterns, n) for n in names]
        order = list(dict.fromkeys(b for b in blocks if b is not None))
        number = {block: i + 1 for i, block in enumerate(order)}
        out: dict[str, int] = {}
        seen = 0
        for name, block in zip(names, blocks):
            if block is not None:
                seen = max(seen, number[block])
                out[name] = number[block]
            else:
                out[name] = 0 if seen == 0 and not name.startswith(heads) else len(order) + 1
        lowest = min(out.values())
        return {name: depth - lowest for name, depth in out.items()}

    def undecayed(self, model: nn.Module) -> Collection[str] | None:
        return None

    def is_batch_independent(self, model: nn.Module) -> bool:
        drawing = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, StochasticDepth)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                return False
            if isinstance(m, drawing) and getattr(m, "p", getattr(m, "dropout", 0)) > 0:
                return False
        return True

    def token_layer(self, model: nn.Module) -> TokenLayer | None:
        """In a ViT the last attention's input: after it only the class token is used (Gildenblat,
        grad-cam's documentation)."""
        if not isinstance(model, VisionTransformer):
            return None
        return TokenLayer(model.encoder.layers[-1].ln_1, _grid)


SOURCE = TorchvisionSource()


def _arguments(cfg: config.Model, image_size: int) -> dict[str, Any]:
    """Keyword arguments of torchvision's builder."""
    arch = cfg.arch
    out: dict[str, Any] = {}
    if not _is_resnet(arch) and not arch.startswith(NO_DROPOUT):
        names = [name for family, name in DROPOUT_ARGUMENT.items() if arch.startswith(family)]
        out[names[0] if names else "dropout"] = cfg.dropout
    if arch.startswith("vit_"):
        out["image_size"] = image_size
    elif arch.startswith("maxvit"):
        out["input_size"] = (image_size, image_size)
    elif arch in ("googlenet", "inception_v3"):
        # The auxiliary classifiers exist to train without BatchNorm (Szegedy et al. 2015); with it
        # they only change the output's type.
        out |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    return out


def _is_resnet(arch: str) -> bool:
    return inspect.getmodule(get_model_builder(arch)) is torchvision.models.resnet


def _patch(arch: str) -> int:
    """Side of a ViT's patches in pixels."""
    return int(arch.rpartition("_")[2])


def _check_size(arch: str, size: int, setting: str) -> None:
    if arch.startswith("vit_"):
        patch = _patch(arch)
        if size % patch:
            raise ConfigError(
                f"{setting} = {size}: {arch} cuts pictures into patches of {patch} pixels. "
                f"Set it to {max(1, round(size / patch)) * patch}"
            )
        return
    if arch.startswith("maxvit"):  # windows of 7 x 7 at strides 4, 8, 16 and 32
        if size % 224:
            raise ConfigError(
                f"{setting} = {size}: {arch} needs a multiple of 224 pixels. "
                f"Set it to {max(1, round(size / 224)) * 224}"
            )
        return
    smallest = next((n for family, n in SMALLEST_SIZE.items() if arch.startswith(family)), 1)
    if size < smallest:
        raise ConfigError(
            f"{setting} = {size}: {arch} needs at least {smallest} pixels. "
            f"Set it to {smallest} or more, or choose a ResNet"
        )


def _first_match(patterns: tuple[str, ...], name: str) -> str | None:
    for pattern in patterns:
        found = re.match(pattern, name)
        if found:
            return found[1]
    return None


def _grid(tokens: Tensor) -> Tensor:
    """[b, 1 + h * h, C] -> [b, C, h, h]: the class token left out."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].reshape(tokens.shape[0], side, side, -1).permute(0, 3, 1, 2)


def _present_name(arch: str, key: str) -> str:
    """A key of torchvision's older files as the model has it now: DenseNet's norm.1 is norm1."""
    if not arch.startswith("densenet"):
        return key
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)


def _is_auxiliary(key: str) -> bool:
    """Of GoogLeNet's and Inception's auxiliary classifiers, which are not built."""
    return key.startswith(("AuxLogits.", "aux1.", "aux2."))


# --- dropout and stochastic depth -----------------------------------------------------------------


class RegularizedBlock(nn.Module):
    """A ResNet's BasicBlock or Bottleneck with spatial dropout and stochastic depth at the end
    of its residual branch.

    Both act after the branch's last norm, right before the addition. Whole channels are dropped
    (Tompson et al. 2015), since neighboring pixels of a channel tell the same. After the last
    norm, because dropout in front of a BatchNorm changes the variance which that norm then sees in
    training but not in evaluation (Li et al. 2019, "disharmony"); behind it the shift reaches the
    next block only beside the undropped shortcut. It is also one place that Bottleneck and
    BasicBlock both have. It takes over the block's layers under their names, so parameters and
    state-dict keys stay torchvision's.
    """

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    relu: nn.Module

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
    if before_head > 0:
        # Beside the pooling, which has no weights, so that the classifier's keys stay fc.weight
        # and fc.bias.
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(before_head))  # type: ignore[assignment]


def _set_drop_path(model: nn.Module, cfg: config.Model) -> None:
    """Scale the built-in stochastic depth so that the last block which has a shortcut is skipped
    with cfg.drop_path."""
    unused = {
        id(m.stochastic_depth)
        for m in model.modules()
        if not getattr(m, "use_res_connect", True) and hasattr(m, "stochastic_depth")
    }
    found = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    top = max((m.p for m in found if id(m) not in unused), default=1.0)
    for m in found:
        m.p = 0.0 if id(m) in unused else cfg.drop_path * m.p / top
