"""Phase 1: a ResNet-50 from scratch on a fifth of ImageNet at 128 px, to learn features cheaply.

    python jobs/prepare.py --source /data/imagenet --out imagenet
    python jobs/phase1.py                                   # on this machine
    ray job submit --working-dir . -- python jobs/phase1.py # on a cluster

For your own pictures: `--data.path NAME --data.subset 0.9`, whose other tenth scores sweeps, and
`--gates.val-top1` for the accuracy that you expect of them.
Expected: 50-60 % top-1, 75-85 % top-5.
Cost: 30 epochs of 256,190 images, at most 9 hours of one T4 (at the 280 images/s that its 4 CPU
cores feed at 224 px).
"""

from ftlib.cli import job
from ftlib.config import (
    Adam,
    Augment,
    CrossEntropy,
    Data,
    Gates,
    Measured,
    Mix,
    Model,
    OneCycle,
    Run,
    Train,
)
from ftlib.launch.train_job import train_job

PHASE1 = Run(
    stage="phase1",
    seed=42,
    data=Data(path="imagenet", subset=0.2, subset_seed=42),
    augment=Augment(
        size=128,
        crop_scale=(0.08, 1.0),
        flip=0.5,
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_p=0.2,
        randaugment_n=0,
    ),
    mix=Mix(mixup_alpha=0.0, cutmix_alpha=0.0),
    model=Model(arch="resnet50", dropout=0.0, init_from="scratch"),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=Adam(lr=1e-3),
    schedule=OneCycle(peak=3.0, up=0.3, div=5.0, final_div=1000.0),  # highest rate 3e-3
    train=Train(epochs=30, batch_size=128, microbatch_size=32, precision="auto", clip_norm=1.0),
    gates=Gates(val_top1=50.0),
    measured=Measured(size=128, images=256_190, epochs=30),
)


def main() -> None:
    train_job(PHASE1, __doc__)


if __name__ == "__main__":
    job(main)
