"""What a library of image classifiers must offer: the protocol, and the values it speaks in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ftlib import config


@dataclass(frozen=True)
class Preprocessing:
    """How weights expect their images."""

    mean: tuple[float, float, float] = config.IMAGENET_MEAN
    """Per channel (red, green, blue), of pixels scaled to 0..1."""
    std: tuple[float, float, float] = config.IMAGENET_STD
    crop: float = 0.875
    """Share of the resized shorter side that the center crop keeps at evaluation."""
    interpolation: str = "bilinear"
    """Of the resize at evaluation: bilinear, bicubic or nearest."""
    size: int = 224
    """Side of the square images that the weights were trained on, in pixels."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def preprocessing_of(cfg: Mapping[str, Any]) -> Preprocessing:
    """From a `pretrained_cfg`, of timm's registry or of a config.json on the Hub."""
    default = Preprocessing()
    interpolation = str(cfg.get("interpolation", ""))
    known = interpolation in ("bilinear", "bicubic", "nearest")
    return Preprocessing(
        _three(cfg.get("mean"), default.mean),
        _three(cfg.get("std"), default.std),
        crop=float(cfg.get("crop_pct") or default.crop),
        interpolation=interpolation if known else default.interpolation,
        size=int((cfg.get("input_size") or (3, default.size))[1]),
    )


def _three(
    values: Sequence[float] | None, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return default
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True)
class PretrainedWeights:
    """Published weights of an architecture, and where they are. One of `url` and `repo` is set."""

    name: str
    """Such as resnet18.IMAGENET1K_V1 or tf_efficientnet_lite0.in1k."""
    classes: int
    """Rows of their classifier; 0 where they come without one."""
    preprocessing: Preprocessing
    url: str = ""
    """Of the file; its name ends in the first digits of its sha256."""
    repo: str = ""
    """Hugging Face Hub repository."""
    filename: str = ""
    """File in `repo`; empty for the usual names."""


@dataclass(frozen=True)
class TokenLayer:
    """A layer whose output Grad-CAM can weigh, although it is not a map [b, C, h, w]."""

    layer: nn.Module
    to_maps: Callable[[Tensor], Tensor]
    """The layer's output as maps [b, C, h, w]."""


class ModelSource(Protocol):
    """A library of image classifiers.

    `arch` is the name without the library's prefix. Every method that takes a config.Model raises
    ConfigError with the remedy for settings that cannot work.
    """

    name: str
    """The library's name, as messages say it."""

    def architectures(self) -> list[str]:
        """All names that `build` takes."""
        ...

    def check(self, cfg: config.Model, train_size: int, eval_size: int | None) -> None:
        """Refuse what `build` refuses, and sizes in pixels that the model cannot take. Quick."""
        ...

    def build(self, cfg: config.Model, num_classes: int, image_size: int) -> nn.Module:
        """The model on the CPU in float32, with random weights from torch's global generator."""
        ...

    def pretrained(self, arch: str) -> PretrainedWeights:
        """The architecture's own published weights; ConfigError where there are none."""
        ...

    def convert(
        self, cfg: config.Model, image_size: int, state: Mapping[str, Tensor], classes: int
    ) -> dict[str, Tensor]:
        """Published weights with the keys and shapes of the model that `build` makes for
        `image_size` and their own number of classes (0: without a classifier).

        Older keys are renamed and position embeddings interpolated. ValueError where they do not
        fit.
        """
        ...

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        """Dotted names of the layers that map features to classes."""
        ...

    def depths(self, model: nn.Module, coarse: bool = False) -> dict[str, int]:
        """Parameter name -> depth, from 0 (the stem) to the classifier, which is the largest.

        A depth is a block, or with `coarse` a stage of several blocks.
        """
        ...

    def undecayed(self, model: nn.Module) -> Collection[str] | None:
        """Names of parameters without weight decay; None for ftlib's own rule."""
        ...

    def is_batch_independent(self, model: nn.Module) -> bool:
        """Whether a training step computes each image by itself."""
        ...

    def token_layer(self, model: nn.Module) -> TokenLayer | None:
        """For Grad-CAM in models without maps; None where any layer with maps will do."""
        ...
