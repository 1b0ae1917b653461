"""Which layers learn how fast from published weights, and how much stochastic depth they stand.

For `finetune`, which sweeps from the published weights with a new classifier: the probe has seen
the pictures that score the trials.
"""

from ray import tune

SPACE = {
    "optimizer.layer_decay": tune.quniform(0.5, 1, 0.05),
    "optimizer.head_lr": tune.loguniform(0.5, 20),
    "model.drop_path": tune.quniform(0, 0.3, 0.05),
}

POINTS = [
    {"optimizer.layer_decay": 1.0, "optimizer.head_lr": 1.0, "model.drop_path": 0.0},  # none of it
    {"optimizer.layer_decay": 0.75, "optimizer.head_lr": 10.0, "model.drop_path": 0.0},
]
