"""How strongly to regularise: dropout, Mixup, CutMix and RandAugment's magnitude.

0 switches a part off, so the search can also find that a part does not help. For recipes with
RandAugment (N of 1 or more), such as phase2. 24 to 48 trials are worth running; the four settings
trade off against each other, so look at the contour in MLflow too.
"""

from ray import tune

SPACE = {
    "model.dropout": tune.quniform(0, 0.1, 0.005),
    "mix.mixup_alpha": tune.quniform(0, 1, 0.1),
    "mix.cutmix_alpha": tune.quniform(0, 2, 0.2),
    "augment.randaugment_m": tune.quniform(0, 10, 0.5),
}

POINTS = [
    # everything off: what the regularisation as a whole is worth
    {
        "model.dropout": 0.0,
        "mix.mixup_alpha": 0.0,
        "mix.cutmix_alpha": 0.0,
        "augment.randaugment_m": 0.0,
    },
    # Wightman et al. 2021 (ResNet strikes back), A3
    {"mix.mixup_alpha": 0.1, "mix.cutmix_alpha": 1.0, "augment.randaugment_m": 6.0},
]
