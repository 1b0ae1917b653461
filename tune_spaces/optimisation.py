"""How the weights are found: learning rate, weight decay, batch size and schedule.

Warm-up is only searched under the cosine schedule (one cycle has its own). The learning rate's best
value moves with the batch size, which is why the two are searched together. Batch sizes are
multiples of 32: set train.microbatch_size to 32, 16 or 8.
"""

from ray import tune

from ftlib.tune.spaces import When

SPACE = {
    "optimizer.lr": tune.loguniform(1e-5, 1e-2),
    "optimizer.weight_decay": tune.loguniform(1e-5, 0.3),
    "train.batch_size": tune.choice([64, 128, 256]),
    "schedule": tune.choice(["Cosine", "OneCycle"]),
    "schedule.warmup_epochs": When(
        tune.choice([0.0, 0.5, 1.0]), given=lambda v: v["schedule"] == "Cosine"
    ),
}

POINTS = [{"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.05, "train.batch_size": 128}]
