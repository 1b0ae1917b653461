"""From scratch on a few thousand small pictures, in many epochs.

    python jobs/prepare.py --source FOLDER --out NAME
    python jobs/from_scratch_long.py --data.path NAME

jobs/from_scratch_short.py with Mixup and CutMix, which keep 48 epochs from learning the pictures by
heart. Measured on 3,200 pictures of CIFAR-10 at 32 px with a ResNet-18-D, about five minutes of one
CPU core: docs/results.md has its scores beside the short recipe's at the same length. Other lengths
keep a sixth of the epochs without mixing: --train.epochs 24 --mix.off-epochs 4.
"""

from ftlib.cli import job
from ftlib.config import Adam, Augment, CrossEntropy, Measured, Mix, Model, OneCycle, Run, Train
from ftlib.launch.train_job import train_job

FROM_SCRATCH_LONG = Run(
    stage="from_scratch_long",
    seed=42,
    augment=Augment(size=32, crop_scale=(0.5, 1.0), flip=0.5, color_jitter_p=0.2),
    mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0, off_epochs=8),
    model=Model(arch="timm/resnet18d"),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=Adam(lr=1e-3),
    schedule=OneCycle(peak=3.0, up=0.15, div=5.0, final_div=1000.0),
    train=Train(epochs=48, batch_size=128, microbatch_size=128),
    measured=Measured(size=32, images=3200, epochs=48),
)


def main() -> None:
    train_job(FROM_SCRATCH_LONG, __doc__)


if __name__ == "__main__":
    job(main)
