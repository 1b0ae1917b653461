"""The settings of a run: `Run` is one frozen tree of typed values, and all settings are here.

A recipe such as jobs/phase2.py is a complete `Run(...)`; the command line and a sweep replace
leaves of it (`ftlib.settings`). The text below a field is what `--help` shows: its meaning and its
unit. Values out of bounds, and combinations that cannot work, raise ConfigError with the remedy
while the tree is built. This module imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Union

from ftlib.settings import Between, ConfigError, Settings

Fraction = Annotated[float, Between(0, 1)]
"""0 to 1."""
Positive = Annotated[float, Between(0, float("inf"), open_low=True)]
"""Above 0."""
NotNegative = Annotated[float, Between(0, float("inf"))]
"""0 or above."""
Count = Annotated[int, Between(0, 2**31)]
"""A whole number, 0 or above."""
AtLeastOne = Annotated[int, Between(1, 2**31)]
"""A whole number, 1 or above."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Data(Settings):
    """The prepared data set and how it is read."""

    section: ClassVar[str] = "data"

    path: str = ""
    """The prepared data set (jobs/prepare.py makes one): a name below $FTLIB_HOME/data, a folder,
    or an s3:// or gs:// address."""
    subset: Annotated[float, Between(0, 1, open_low=True)] = 1.0
    """Fraction of the training images to use, the same of each class. With one seed, a smaller
    subset is part of a larger one."""
    subset_seed: int = 42
    """Seed that chooses the subset."""
    tuning_fraction: Annotated[float, Between(0, 0.5)] = 0.0
    """Fraction of the training images (after `subset`, the same of each class) that is kept out of
    training and scored in place of the validation set. Sweeps set it, so that the validation set is
    never used to choose settings. 0: the validation set is scored."""
    tuning_source: Literal["subset", "reserve"] = "subset"
    """Where the tuning images come from. subset: `tuning_fraction` of the subset. reserve: the last
    `tuning_fraction` of all training images, in the order in which `subset` takes them. Runs on
    smaller subsets have not seen those. Sweeps use the reserve where they can."""
    loader_workers: Annotated[int, Between(-1, 256)] = -1
    """Loader processes per training worker. 0: a thread of the training process loads. -1: one
    process for each CPU of the worker but one; a thread where a run reads 2,000 pictures at most,
    those of all its epochs together."""
    cache_limit: NotNegative = 0.0
    """GB that copies of a remote set's shards may take on each node; 0 keeps all. With a limit the
    order goes through the shards in blocks of a third of it: fetched ahead, deleted behind. It is
    then part of what the run is, for sets that lie on a disk too."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean (red, green, blue; pixels scaled to 0..1) subtracted on the device."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation (pixels scaled to 0..1) divided by on the device."""

    def check(self) -> None:
        if min(self.std) <= 0:
            self.refuse("std", "every channel's standard deviation must be above 0")


@dataclass(frozen=True)
class Augment(Settings):
    """Random changes to each training image: crop, flip, color, RandAugment, erasing."""

    section: ClassVar[str] = "augment"

    size: Annotated[int, Between(8, 2048)] = 224
    """Side of the square training input, in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area that RandomResizedCrop cuts out."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of that crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    vflip: Fraction = 0.0
    """Probability of a vertical flip, for pictures without an up and a down (aerial, microscope).
    """
    rotate90: Fraction = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, all equally likely."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of the jitter of brightness, contrast, saturation (relative) and hue (turns)."""
    color_jitter_p: Fraction = 0.2
    """Probability that the color jitter acts on an image."""
    randaugment_n: Annotated[int, Between(0, 3)] = 0
    """How many of the three groups of ops (geometric, noise, color) an image may go through. 0: no
    RandAugment."""
    randaugment_m: Annotated[float, Between(0, 10)] = 0.0
    """Magnitude of every RandAugment op, 0 (identity) to 10 (strongest); fractions are allowed."""
    randaugment_p: Fraction = 0.3
    """Probability with which each chosen group acts on an image."""
    randaugment_ops: tuple[str, ...] = ()
    """Names of the ops to choose from (see docs/augmentation.md); empty means all of them."""
    trivialaugment: bool = False
    """One random op at one random strength per image (TrivialAugment, Mueller and Hutter 2021), in
    place of RandAugment."""
    pipeline: str = ""
    """Your own Albumentations pipeline, applied after all of the above and before RandomErasing: a
    YAML or JSON file that `albumentations.save` wrote. The run keeps its contents, so the file may
    go afterwards."""
    erasing_p: Fraction = 0.0
    """Probability of RandomErasing (Zhong et al. 2017) on an image."""
    erasing_scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest share of the area that RandomErasing erases."""

    def check(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            self.refuse("crop_scale", "needs 0 < smallest <= largest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            self.refuse("crop_ratio", "needs 0 < smallest <= largest")
        low, high = self.erasing_scale
        if not 0 < low <= high < 1:
            self.refuse("erasing_scale", "needs 0 < smallest <= largest < 1")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            self.refuse(
                "color_jitter", "strengths must not be negative, and hue is at most 0.5 turns"
            )
        if self.randaugment_n == 0 and self.randaugment_m > 0:
            self.refuse(
                "randaugment_m",
                "it would do nothing because augment.randaugment_n is 0. "
                "Set augment.randaugment_n to 1, 2 or 3, or the magnitude to 0",
            )
        if self.trivialaugment and self.randaugment_n > 0:
            self.refuse(
                "trivialaugment",
                "it takes the place of RandAugment. "
                "Set augment.randaugment_n and augment.randaugment_m to 0",
            )
        if self.randaugment_ops and self.randaugment_n == 0 and not self.trivialaugment:
            self.refuse(
                "randaugment_ops",
                "it would do nothing because augment.randaugment_n is 0. Set it to 1, 2 or 3",
            )
        if self.pipeline:
            object.__setattr__(self, "pipeline", pipeline_text(self.pipeline))

    @property
    def has_policy(self) -> bool:
        """Whether RandAugment or TrivialAugment acts."""
        return self.trivialaugment or self.randaugment_n > 0


MAX_PIPELINE_BYTES = 1 << 16
"""Largest file that `augment.pipeline` may name."""


def pipeline_text(pipeline: str) -> str:
    """The pipeline that `augment.pipeline` means, as JSON with sorted keys.

    `pipeline` is the name of a YAML or JSON file, or such JSON already. Whether Albumentations can
    build it is checked later (`ftlib.data.pipeline`); here it only has to be a serialized
    transform. Raises ConfigError.
    """
    name, text = "its JSON", pipeline
    if not pipeline.lstrip().startswith("{"):
        path = Path(pipeline).expanduser()
        name = f"the file {path}"
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_PIPELINE_BYTES + 1)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"augment.pipeline: {name} cannot be read ({error}). Name a YAML or JSON file that "
                "albumentations.save wrote, or give its text; a run keeps that in its run.json"
            ) from None
    if len(text) > MAX_PIPELINE_BYTES:
        raise ConfigError(f"augment.pipeline: {name} is longer than {MAX_PIPELINE_BYTES:,} bytes")
    import yaml

    try:
        try:
            found = json.loads(text)
        except ValueError:  # not YAML for both: it takes 1e-05 for a word
            found = yaml.safe_load(text)
        canonical = json.dumps(found, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"augment.pipeline: {name} is not valid YAML or JSON ({why})") from None
    transform = found.get("transform") if isinstance(found, dict) else None
    if not isinstance(transform, dict) or not isinstance(transform.get("__class_fullname__"), str):
        raise ConfigError(
            f"augment.pipeline: {name} holds no Albumentations transform. Write it with "
            "albumentations.save(transform, FILE, data_format='yaml')"
        )
    return canonical


@dataclass(frozen=True)
class Mix(Settings):
    """Mixup and CutMix: training images that are blends of two."""

    section: ClassVar[str] = "mix"

    mixup_alpha: Annotated[float, Between(0, 100)] = 0.0
    """Mixup (Zhang et al. 2018): lambda is drawn from Beta(alpha, alpha). 0: off."""
    cutmix_alpha: Annotated[float, Between(0, 100)] = 0.0
    """CutMix (Yun et al. 2019): lambda is drawn from Beta(alpha, alpha). 0: off."""
    cutmix_share: Fraction = 0.5
    """If both are on: the share of mixed microbatches that get CutMix; the others get Mixup."""
    p: Fraction = 1.0
    """Share of microbatches that are mixed at all."""
    off_epochs: Count = 0
    """The last epochs, this many of them, are trained without mixing."""


@dataclass(frozen=True)
class Model(Settings):
    """The network, its regularization and its starting weights."""

    section: ClassVar[str] = "model"

    arch: str = "resnet50"
    """A torchvision classifier by its torchvision name, such as resnet50, convnext_tiny or
    vit_b_16; or a timm classifier as timm/NAME, such as timm/convnext_atto. timm/NAME.TAG also
    says which of its published weights init_from = pretrained means."""
    dropout: Annotated[float, Between(0, 1, open_high=True)] = 0.0
    """Dropout probability. In ResNets it acts in the blocks (spatial: whole channels) and before
    the classifier; in other models where the library has built dropout in. A model in which it
    cannot act is refused."""
    dropout_in: Literal["both", "blocks", "head"] = "both"
    """Where `dropout` acts in a ResNet: in the residual blocks, before the classifier, or both."""
    drop_path: Annotated[float, Between(0, 1, open_high=True)] = 0.0
    """Stochastic depth (Huang et al. 2016): probability of skipping the last residual block;
    earlier ones proportionally less."""
    init_from: str = "scratch"
    """Where the weights come from. `scratch`: random. `pretrained`: the published weights of
    `arch`, from the cache or the network (`imagenet` means the same). `hf-hub:ORG/NAME[@REVISION]`:
    a repository of the Hugging Face Hub. `file:PATH`: a .safetensors, .pth, .pt, .bin, .pth.tar or
    .ckpt file, or a folder that ftlib wrote. `phase1` or another stage's name: its best finished
    run on the same data set. `run:NAME`, `mlflow:RUN_ID`, `models:/NAME@ALIAS`: that run's best
    model."""
    preprocessing: Literal["weights", "settings"] = "weights"
    """`weights`: data.mean and data.std, evaluate.crop and evaluate.interpolation come with the
    starting weights where they are left at their defaults. `settings`: they are as they are set."""
    reset_head: bool = False
    """Start with a new classifier. Needed if the starting weights are of an ftlib run on other
    classes; published weights and files get one by themselves where the number differs."""
    freeze_epochs: Annotated[int, Between(-1, 2**31)] = 0
    """Train only the classifier for this many epochs at first; the backbone (its BatchNorm too) is
    frozen. -1: for the whole run."""
    unfreeze_every: Count = 0
    """After freeze_epochs, thaw the backbone from its end: one stage more every this many epochs
    (Howard and Ruder 2018). 0: all of it at once."""
    freeze_norm: bool = False
    """Normalize with the statistics that BatchNorm came with, in training too. Those of a few
    hundred pictures, in small microbatches, are worse than ImageNet's."""

    def check(self) -> None:
        if self.reset_head and self.init_from == "scratch":
            self.refuse(
                "reset_head",
                "it would do nothing because model.init_from is scratch. "
                "Leave it out, or name the weights to start from",
            )
        if self.unfreeze_every and self.freeze_epochs == -1:
            self.refuse(
                "unfreeze_every",
                "it would do nothing because model.freeze_epochs is -1, which freezes the backbone "
                "for the whole run. Set model.freeze_epochs to 0 or more",
            )
        if self.freeze_norm and self.init_from == "scratch":
            self.refuse(
                "freeze_norm",
                "BatchNorm has no statistics yet because model.init_from is scratch. "
                "Leave it out, or name the weights to start from",
            )
        if self.dropout_in != "both" and self.dropout == 0:
            self.refuse(
                "dropout_in",
                "it would do nothing because model.dropout is 0. Set model.dropout above 0",
            )


@dataclass(frozen=True)
class LossSettings(Settings):
    """What all losses have in common."""

    section: ClassVar[str] = "loss"

    label_smoothing: Annotated[float, Between(0, 1, open_high=True)] = 0.0
    """Share of the target that is spread evenly over all classes (Szegedy et al. 2016)."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights each class by the inverse of its share of the training images; the mean
    weight is 1."""


@dataclass(frozen=True)
class CrossEntropy(LossSettings):
    """Cross-entropy of softmax(logits) against soft targets."""

    label_smoothing: Annotated[float, Between(0, 1, open_high=True)] = 0.1


@dataclass(frozen=True)
class NLL(LossSettings):
    """Negative log-likelihood of log_softmax(logits): cross-entropy in the form of torch's NLLLoss,
    on soft targets."""


@dataclass(frozen=True)
class BCE(LossSettings):
    """Binary cross-entropy with logits, one class against all others, summed over the classes
    (Wightman et al. 2021, ResNet strikes back)."""

    label_smoothing: Annotated[float, Between(0, 1, open_high=True)] = 0.1


@dataclass(frozen=True)
class Focal(LossSettings):
    """Focal loss (Lin et al. 2017, eq. 5) of softmax(logits), on soft targets."""

    gamma: NotNegative = 2.0
    """Focusing exponent; 0 is cross-entropy."""
    alpha: Positive = 1.0
    """Constant factor of the loss: the paper's alpha, the same for every class. For one per class,
    see class_weights."""


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """What all optimizers have in common."""

    section: ClassVar[str] = "optimizer"
    state_copies: ClassVar[int]
    """Copies of the weights in a checkpoint: the weights, and what the optimizer keeps for each."""

    lr: Positive = 1e-3
    """Base learning rate; the schedule multiplies it."""
    weight_decay: NotNegative = 0.0
    """L2 penalty, added to the gradient."""
    decay_norm_and_bias: bool = False
    """Decay biases and the weights of normalization layers too."""
    layer_decay: Annotated[float, Between(0, 1, open_low=True)] = 1.0
    """Factor of the learning rate from each block to the one before it, so that early layers of
    pretrained weights change less (Bao et al. 2022). 1: the same rate everywhere."""
    head_lr: Positive = 1.0
    """Factor of the classifier's learning rate."""


@dataclass(frozen=True)
class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    state_copies: ClassVar[int] = 3

    lr: Positive = 1e-4
    weight_decay: NotNegative = 1e-4
    """Decoupled weight decay: it is multiplied by the learning rate, not added to the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""


@dataclass(frozen=True)
class Adam(OptimizerSettings):
    """Adam (Kingma and Ba 2015)."""

    state_copies: ClassVar[int] = 3

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""


@dataclass(frozen=True)
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum."""

    state_copies: ClassVar[int] = 2

    lr: Positive = 0.1
    weight_decay: NotNegative = 5e-5
    momentum: Annotated[float, Between(0, 1, open_high=True)] = 0.9
    """Momentum."""
    nesterov: bool = True
    """Nesterov's form of momentum."""

    def check(self) -> None:
        if self.nesterov and self.momentum == 0:
            self.refuse(
                "nesterov",
                "it needs momentum. Set optimizer.momentum above 0, or nesterov to false",
            )


@dataclass(frozen=True)
class RMSprop(OptimizerSettings):
    """RMSprop (Hinton 2012), as in torch."""

    state_copies: ClassVar[int] = 3

    weight_decay: NotNegative = 1e-5
    alpha: Fraction = 0.9
    """Decay rate of the running average of the squared gradient."""
    momentum: Annotated[float, Between(0, 1, open_high=True)] = 0.9
    """Momentum."""
    eps: Positive = 1e-8
    """Added to the denominator."""


@dataclass(frozen=True)
class Cosine(Settings):
    """Half a cosine from the base rate down to `min_lr` (Loshchilov and Hutter 2017), after an
    optional linear warm-up."""

    section: ClassVar[str] = "schedule"
    min_lr: NotNegative = 1e-6
    """Learning rate at the end."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up from 0."""


@dataclass(frozen=True)
class OneCycle(Settings):
    """One cycle (Smith and Topin 2018), cosine-shaped as in torch: lr*peak/div up to lr*peak, then
    down to lr*peak/div/final_div."""

    section: ClassVar[str] = "schedule"
    peak: Positive = 3.0
    """Highest learning rate, as a multiple of optimizer.lr."""
    up: Annotated[float, Between(0, 1, open_low=True, open_high=True)] = 0.3
    """Share of the steps spent going up."""
    div: Positive = 5.0
    """The peak divided by the first learning rate."""
    final_div: Positive = 1000.0
    """The first learning rate divided by the last."""


@dataclass(frozen=True)
class Step(Settings):
    """The rate is multiplied by `gamma` every `every_epochs` epochs."""

    section: ClassVar[str] = "schedule"
    every_epochs: AtLeastOne = 30
    """Epochs between two drops."""
    gamma: Positive = 0.1
    """Factor of each drop."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up from 0."""


@dataclass(frozen=True)
class Plateau(Settings):
    """The rate is multiplied by `factor` when the monitored score has not risen for `patience`
    epochs."""

    section: ClassVar[str] = "schedule"
    factor: Annotated[float, Between(0, 1, open_low=True, open_high=True)] = 0.1
    """Factor of each drop."""
    patience: Count = 5
    """Epochs without a rise before a drop."""
    min_lr: NotNegative = 1e-6
    """The rate never falls below this."""


@dataclass(frozen=True)
class Constant(Settings):
    """The base rate throughout."""

    section: ClassVar[str] = "schedule"
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up from 0."""


Loss = Union[CrossEntropy, NLL, BCE, Focal]
Optimizer = Union[AdamW, Adam, SGD, RMSprop]
Schedule = Union[Cosine, OneCycle, Step, Plateau, Constant]


@dataclass(frozen=True)
class Train(Settings):
    """The training loop: length, batch, precision, early stopping."""

    section: ClassVar[str] = "train"

    epochs: AtLeastOne = 50
    """Passes over the training images."""
    batch_size: AtLeastOne = 128
    """Images per optimizer step, over all workers: the global batch."""
    microbatch_size: AtLeastOne = 32
    """Images that go through the model at once, and over which BatchNorm takes its statistics.
    batch_size must be a multiple of it. The workers share the microbatches of a step and accumulate
    their gradients, so the result does not depend on the number of workers."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type of the forward pass. `auto`: bf16 on a GPU that has it and on CPUs with bf16
    matrix units from 128 px on, else fp32."""
    clip_norm: NotNegative = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    channels_last: bool = True
    """Keep images and weights in channels-last memory order."""
    compile: bool = False
    """torch.compile the model: minutes of warm-up, faster steps on a GPU."""
    ema_decay: Annotated[float, Between(0, 1, open_high=True)] = 0.0
    """Decay per step of the exponential moving average of the weights, which is then what is
    evaluated and kept as best. 0: off."""
    early_stopping: Count = 0
    """Stop after this many epochs without a new best score. 0: never."""
    max_nonfinite: Count = 10
    """Steps with a NaN or infinite loss or gradient that are skipped before the run is stopped."""
    log_every: AtLeastOne = 50
    """Optimizer steps between two progress reports. Only there does the loop wait for the device.
    """

    def check(self) -> None:
        if self.batch_size % self.microbatch_size:
            near = max(
                self.microbatch_size,
                round(self.batch_size / self.microbatch_size) * self.microbatch_size,
            )
            self.refuse(
                "batch_size",
                f"it is not a multiple of train.microbatch_size ({self.microbatch_size}). "
                f"Set it to {near}, or set train.microbatch_size to a divisor",
            )

    @property
    def microbatches(self) -> int:
        """Microbatches in a full global batch."""
        return self.batch_size // self.microbatch_size


@dataclass(frozen=True)
class Evaluate(Settings):
    """How images are prepared and batched when the model is scored."""

    section: ClassVar[str] = "evaluate"

    size: Annotated[int, Between(0, 2048)] = 0
    """Side of the square input at evaluation, in pixels. 0: augment.size."""
    crop: Annotated[float, Between(0, 1, open_low=True)] = 0.875
    """The shorter side is resized to size / crop, then the center is cut out; the aspect ratio
    stays."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of that resize, antialiased."""
    batch_size: AtLeastOne = 128
    """Images per forward pass at evaluation, per worker."""
    every_epochs: AtLeastOne = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""


@dataclass(frozen=True)
class Checkpoint(Settings):
    """Where and how often the state of a run is saved."""

    section: ClassVar[str] = "checkpoint"

    storage: str = ""
    """Where runs are kept: a folder or an s3:// or gs:// address that every node reaches. Empty:
    $FTLIB_HOME/runs."""
    every_steps: Count = 0
    """Optimizer steps between two checkpoints within an epoch. 0: no limit in steps. Each epoch
    ends with a checkpoint anyway."""
    every_seconds: NotNegative = 60.0
    """Seconds between two checkpoints within an epoch. 0: no limit in seconds."""
    keep_last: Annotated[int, Between(2, 2**31)] = 2
    """Newest checkpoints that are kept for resuming: at least two, in case one is damaged."""
    keep_best: AtLeastOne = 1
    """Best-scoring models that are kept (weights only)."""


@dataclass(frozen=True)
class Cluster(Settings):
    """Workers and what each of them gets."""

    section: ClassVar[str] = "cluster"

    workers: str = "1"
    """Training workers: a number, or LOW:HIGH for as many as the cluster can place right now."""
    gpus_per_worker: Annotated[float, Between(-1, 1024)] = -1
    """GPUs per worker. 0: train on CPUs. -1: one if the cluster has GPUs, else none."""
    cpus_per_worker: Annotated[int, Between(0, 1024)] = 0
    """CPUs per worker, its loader processes included. 0: an even share of the node's CPUs."""
    max_failures: Count = 3
    """Restarts from the newest checkpoint after a worker has crashed or was lost, before the run
    fails."""
    strict_elastic: bool = False
    """Sum gradients in a fixed order, so that the weights are the same bit for bit with any number
    of workers. It costs more network traffic."""
    local: Literal["auto", "true", "false"] = "auto"
    """Train in the job's own process, without a Ray cluster. auto: for one worker where RAY_ADDRESS
    is not set. The weights are the same."""
    allow_open: bool = False
    """Use a cluster that others on the network can reach even if Ray's token authentication is off.
    """

    def check(self) -> None:
        if not re.fullmatch(r"[1-9]\d{0,4}(:[1-9]\d{0,4})?", self.workers):
            self.refuse("workers", "needs a number such as 4, or a range such as 1:4")
        if self.low > self.high:
            self.refuse("workers", f"the range is upside down. Write {self.high}:{self.low}")
        if self.local == "true" and self.workers != "1":
            self.refuse("local", f"workers = {self.workers} need a cluster. Leave local at auto")

    @property
    def low(self) -> int:
        """Fewest workers."""
        return int(self.workers.split(":")[0])

    @property
    def high(self) -> int:
        """Most workers."""
        return int(self.workers.split(":")[-1])


@dataclass(frozen=True)
class Track(Settings):
    """What goes to MLflow, and where MLflow is."""

    section: ClassVar[str] = "track"

    uri: str = ""
    """MLflow tracking URI. Empty: $MLFLOW_TRACKING_URI, or else a SQLite database below
    $FTLIB_HOME."""
    experiment: str = ""
    """MLflow experiment. Empty: the data set's name."""
    offline: bool = False
    """Start even if the tracking server cannot be reached: everything goes to a journal and is
    delivered later."""
    system_metrics: bool = True
    """Record CPU, memory, disk and GPU use every 10 seconds."""
    log_model: bool = True
    """Log the best model as an MLflow model that predicts from JPEG bytes, the report of its
    mistakes, and the worst mistakes of each epoch."""


@dataclass(frozen=True)
class Gates(Settings):
    """What the run must reach. The next phase refuses a model that has failed its gates."""

    section: ClassVar[str] = "gates"

    val_top1: Annotated[float, Between(0, 100)] = 0.0
    """Lowest validation top-1 of the best model that passes, in percent."""
    max_gap: Annotated[float, Between(0, 100)] = 100.0
    """Largest difference of training and validation top-1 at the end that passes, in points."""
    gain: Annotated[float, Between(-100, 100)] = -100.0
    """Lowest gain in validation top-1 over the run that the starting weights come from, in points.
    """
    force: str = ""
    """Start from a model even if it has failed its gates, or has been trained on the images that
    score this run. The text is the reason, and is recorded."""


@dataclass(frozen=True)
class Measured(Settings):
    """What the recipe was measured on. A run far from it is told so before it starts; nothing else
    depends on these. 0: not known."""

    section: ClassVar[str] = "measured"

    size: Count = 0
    """Side of the training input, in pixels."""
    images: Count = 0
    """Training images."""
    epochs: Count = 0
    """Epochs."""


@dataclass(frozen=True)
class Run(Settings):
    """Everything that defines a training run."""

    section: ClassVar[str] = ""

    name: str = ""
    """Name of the run. The same name with the same settings resumes it. Empty:
    STAGE-DATASET-FINGERPRINT, so that other settings make another run."""
    stage: str = "run"
    """Pipeline stage, such as phase1. A later run finds its starting weights by this name."""
    seed: Annotated[int, Between(0, 2**63 - 1)] = 42
    """Seed of all that is random: order, augmentation, mixing, dropout, initial weights."""
    promoted_from: str = ""
    """The sweep that this recipe was promoted from. jobs/promote.py writes it."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=CrossEntropy)
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)
    track: Track = field(default_factory=Track)
    gates: Gates = field(default_factory=Gates)
    measured: Measured = field(default_factory=Measured)

    def check(self) -> None:
        self._check_names()
        self._check_lengths()
        if self.cluster.high > self.train.microbatches:
            raise ConfigError(
                f"cluster.workers = {self.cluster.workers}: more workers than microbatches. "
                f"A global batch of {self.train.batch_size} in microbatches of "
                f"{self.train.microbatch_size} keeps at most {self.train.microbatches} workers "
                "busy. Lower cluster.workers or train.microbatch_size, or raise train.batch_size"
            )
        floor = getattr(self.schedule, "min_lr", 0)
        if floor > self.optimizer.lr:
            raise ConfigError(
                f"schedule.min_lr = {floor:g}: it is above optimizer.lr ({self.optimizer.lr:g}). "
                "Lower it, or set it to 0"
            )

    def _check_names(self) -> None:
        rule = "use letters, digits, '.', '_' and '-', at most 128, the first a letter or digit"
        for field_, empty_is_fine in (("name", True), ("stage", False)):
            value = getattr(self, field_)
            if not NAME.fullmatch(value) and not (empty_is_fine and not value):
                self.refuse(field_, rule)

    def _check_lengths(self) -> None:
        epochs, off = self.train.epochs, self.mix.off_epochs
        if off > epochs:
            raise ConfigError(
                f"mix.off_epochs = {off}: the run has only {epochs} epochs (train.epochs)"
            )
        if off and not (self.mix.mixup_alpha or self.mix.cutmix_alpha):
            raise ConfigError(
                f"mix.off_epochs = {off}: it would do nothing because mixing is off. "
                "Set mix.mixup_alpha or mix.cutmix_alpha above 0"
            )
        warmup = getattr(self.schedule, "warmup_epochs", 0)
        if warmup and warmup >= epochs:
            raise ConfigError(
                f"schedule.warmup_epochs = {warmup:g}: the run has {epochs} epochs (train.epochs). "
                "Set it lower; 0 starts at the full rate"
            )

    @property
    def eval_size(self) -> int:
        """Side of the square evaluation input, in pixels."""
        return self.evaluate.size or self.augment.size


NOT_IN_FINGERPRINT = (
    "name",
    "cluster",
    "track",
    "checkpoint",
    "gates",
    "measured",
    "data.path",
    "data.loader_workers",
    "model.preprocessing",
    "train.log_every",
    "train.compile",
)
"""Settings that change how a run is carried out but not what it computes; a resumed run may change
them. The data set enters the fingerprint by its digest; `cluster.strict_elastic` is recorded apart.
"""
NOT_IN_FINGERPRINT_AT_DEFAULT = (
    "augment.vflip",
    "augment.rotate90",
    "augment.pipeline",
    "model.unfreeze_every",
    "model.freeze_norm",
    "optimizer.layer_decay",
    "optimizer.head_lr",
    "evaluate.interpolation",
    "data.tuning_source",
    "data.cache_limit",
)
"""Settings added after runs had been made: at their default they stay out of the fingerprint, so
that those runs keep theirs."""
