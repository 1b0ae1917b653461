"""Phase 3: the best model of Phase 2 on all of ImageNet at 224 px, with averaged weights (EMA).

    python jobs/phase3.py --recipe promoted.json            # a sweep's winner (jobs/promote.py)
    ray job submit --working-dir . -- python jobs/phase3.py # with Phase 2's own values

Dropout, mixing, RandAugment and the optimizer's values are Phase 2's until a sweep has found better
ones.
Expected: 78-80 % top-1, 92-94 % top-5.
Cost: 75 epochs (60-90 is the useful range) of 1,281,167 images at 224 px, about 100 hours of one
T4. This one is for a cluster: `--cluster.workers 4`, or `1:4` where nodes come and go.
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

PHASE3 = Run(
    stage="phase3",
    seed=42,
    data=Data(path="imagenet", subset=1.0),
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
    model=Model(arch="resnet50", dropout=0.02, init_from="phase2"),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=AdamW(lr=1e-4, weight_decay=1e-4),
    schedule=Cosine(min_lr=1e-6),
    train=Train(
        epochs=75,
        batch_size=128,
        microbatch_size=32,
        precision="auto",
        clip_norm=1.0,
        ema_decay=0.9999,
    ),
    gates=Gates(val_top1=78.0),
    measured=Measured(size=224, images=1_281_167, epochs=75),
)


def main() -> None:
    train_job(PHASE3, __doc__)


if __name__ == "__main__":
    job(main)
