"""From scratch on a few thousand small pictures, in a few epochs.

    python jobs/prepare.py --source FOLDER --out NAME
    python jobs/from_scratch_short.py --data.path NAME

Measured on 4,000 pictures of CIFAR-10 at 32 px with a ResNet-18-D over 8 epochs, about a minute of
one CPU core: docs/results.md has its scores there and on Fashion-MNIST beside timm's train.py and
torchvision's reference, and what was tried and did not win. For longer runs, larger pictures or
published weights there are jobs/phase1.py and jobs/finetune.py.
"""

from ftlib.cli import job
from ftlib.config import Adam, Augment, CrossEntropy, Measured, Model, OneCycle, Run, Train
from ftlib.launch.train_job import train_job

FROM_SCRATCH_SHORT = Run(
    stage="from_scratch_short",
    seed=42,
    augment=Augment(size=32, crop_scale=(0.5, 1.0), flip=0.5, color_jitter_p=0.2),
    model=Model(arch="timm/resnet18d"),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=Adam(lr=1e-3),
    schedule=OneCycle(peak=3.0, up=0.15, div=5.0, final_div=1000.0),
    train=Train(epochs=8, batch_size=128, microbatch_size=128),
    measured=Measured(size=32, images=4000, epochs=8),
)


def main() -> None:
    train_job(FROM_SCRATCH_SHORT, __doc__)


if __name__ == "__main__":
    job(main)
