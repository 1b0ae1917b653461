"""Fine-tune a pretrained model on your own pictures: a few hundred to a few tens of thousands.

    python jobs/prepare.py --source FOLDER --out pets
    python jobs/finetune.py --data.path pets
    python jobs/finetune.py --data.path pets --model.arch timm/convnext_atto --augment.size 288

It starts from published ImageNet weights with the classifier of a linear probe (jobs/probe.py,
which it runs first where that is missing), and trains all layers: the earlier a layer, the lower
its learning rate. BatchNorm keeps the statistics that it came with. The length is a number of
optimizer steps (--steps), so that small sets get more epochs than large ones.
The same command resumes a run that was interrupted. docs/finetuning.md says why each value is so.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ftlib.checks import check_cluster, check_recipe
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import AdamW, Augment, Cosine, Count, CrossEntropy, Model, Run, Train
from ftlib.gc_pause import lasting_imports
from ftlib.paths import job_command, run_words

FINETUNE = Run(
    stage="finetune",
    seed=42,
    augment=Augment(size=224, crop_scale=(0.35, 1.0), flip=0.5, color_jitter_p=0.2),
    model=Model(arch="timm/tf_efficientnet_lite0", init_from="pretrained", freeze_norm=True),
    loss=CrossEntropy(label_smoothing=0.1),
    optimizer=AdamW(lr=3e-4, weight_decay=0.05, layer_decay=0.75),
    schedule=Cosine(min_lr=1e-6, warmup_epochs=1.0),
    train=Train(epochs=12, batch_size=32, microbatch_size=32, ema_decay=0.98),
)


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    steps: Count = 300
    """Optimizer steps that the number of epochs is chosen for, from 3 to 20 epochs.
    --train.epochs says the number itself."""
    no_probe: bool = False
    """Start with a new classifier. Without this, the linear probe's is taken, and the probe is run
    first where it is missing."""


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    asked, run = options_and_recipe(Options, __doc__, lambda _: FINETUNE, words, shown=FINETUNE)
    check_recipe(run)
    check_cluster(run)
    chosen = any(word.partition("=")[0] == "--train.epochs" for word in words)
    with lasting_imports():
        from ftlib.launch.fine_tune import fine_tune  # imports torch

    with reporting(asked) as result:
        outcome = fine_tune(
            run, steps=0 if chosen else asked.steps, probe=not asked.no_probe, quiet=asked.quiet
        )
        result.update(vars(outcome))
        named = run_words(outcome.run_dir)
        print(f"\nNext: {job_command('evaluate', named)}")
        package = f"{named} --out model --formats mlflow"
        print(f"      {job_command('export', package)}")


if __name__ == "__main__":
    job(main)
