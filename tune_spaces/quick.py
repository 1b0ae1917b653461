"""A first sweep: learning rate and Mixup, the two settings that show the most on a small data set.

With the sample recipe a few minutes on two cores: python jobs/sweep.py --recipe sample-phase2
--space quick --trials 8
"""

from ray import tune

SPACE = {
    "optimizer.lr": tune.loguniform(1e-4, 1e-2),
    "mix.mixup_alpha": tune.quniform(0, 1, 0.1),
}
