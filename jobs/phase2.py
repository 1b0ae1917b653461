"""Phase 2: fine-tune the best model of Phase 1 at 224 px, with Mixup, CutMix and RandAugment.

    python jobs/phase2.py                                   # on this machine
    ray job submit --working-dir . -- python jobs/phase2.py # on a cluster
    python jobs/phase2.py --mix.mixup-alpha 0.4             # another value makes another run

It finds the Phase 1 model on the same data set by itself. The same command resumes an interrupted
run.
Expected: 65-70 % top-1, 85-90 % top-5, train and validation less than 5 points apart. Training and
validation top-1 by epoch: 10: 35/30, 20: 52/48, 30: 61/57, 40: 66/63, 50: 68/67.
Cost: 50 epochs of 256,190 images at 224 px, 15 hours of one T4 at the 280 images/s that its 4 CPU
cores feed.
"""

from ftlib.cli import job
from ftlib.config import (
    AdamW,
    Augment,
    Cosine,
    CrossEntropy,
    Data,
    Gates,
    Measured,
    Mix,
    Model,
    Run,
    Train,
)
from ftlib.launch.train_job import train_job

PHASE2 = Run(
    stage="phase2",
    seed=42,
    data=Data(path="imagenet", subset=0.2, subset_seed=42),  # the same fifth as Phase 1
    augment=Augment(
        size=224,
        crop_scale=(0.08, 1.0),
        flip=0.5,
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_p=0.2,
        randaugment_n=2,
        randaugment_m=9,
        randaugment_p=0.3,
    ),
    mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_share=0.5),
    model=Model(arch="resnet50", dropout=0.02, init_from="phase1"),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=AdamW(lr=1e-4, weight_decay=1e-4),
    schedule=Cosine(min_lr=1e-6),
    train=Train(epochs=50, batch_size=128, microbatch_size=32, precision="auto", clip_norm=1.0),
    gates=Gates(val_top1=65.0, max_gap=10.0, gain=10.0),
    measured=Measured(size=224, images=256_190, epochs=50),
)


def main() -> None:
    train_job(PHASE2, __doc__)


if __name__ == "__main__":
    job(main)
