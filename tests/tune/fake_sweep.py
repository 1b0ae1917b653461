"""A sweep with a fake training function, for tests that kill it.

Settings come in $FAKE_PLAN; trials log to $FAKE_LOG.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from ftlib.cli import job
from ftlib.config import Augment, Cluster, Data, Mix, Model, Run, Train
from ftlib.tune import spaces, train_trial
from ftlib.tune.sweep import Sweep, sweep
from ftlib.tune.trial_runs import Hooks

LOG = os.environ["FAKE_LOG"]
PLAN = json.loads(os.environ["FAKE_PLAN"])


def check(run):
    return train_trial.SweepInputs("fake", "d" * 64, np.arange(1000) % 10, np.zeros(1000, bool))


def train(context, config, report):
    """Epochs of `seconds`; keeps its last epoch in the trial's folder, as launch() a checkpoint."""
    run, number = config["run"], config["number"]
    folder = Path(run["checkpoint"]["storage"]) / run["name"]
    memory = folder / "fake-checkpoint"
    start = int(memory.read_text()) if memory.exists() else 0

    def log(event, epoch):
        with open(LOG, "a") as f:
            f.write(f"{event} {number} {epoch} {os.getpid()}\n")

    epochs = run["train"]["epochs"]

    def score_at(epoch):
        return (
            60
            - 100 * abs(run["model"]["dropout"] - 0.04)
            - 5 * abs(run["mix"]["mixup_alpha"] - 0.5)
            - 8 / epoch
        )

    final = {
        "score": score_at(epochs),
        "run_dir": str(folder),
        "best_dir": "",
        "mlflow_run_id": "",
        "metrics": {},
        "history": [
            {"epoch": e, "score": score_at(e), "seconds": PLAN.get("seconds", 0.0)}
            for e in range(1, epochs + 1)
        ],
    }
    if start == epochs:  # it had finished, but the driver died before it heard of it
        log("found", start)
        return {**final, "found": True}
    log("start", start)
    tracking = train_trial.TitledTracking(context.tracking, config["title"], config["params"])
    tracked = tracking.start_run(
        config["name"],
        tags={"kind": context.kind, **context.tags, "trial": config["name"]},
        params={},
        parent=context.parent,
    )
    try:
        for epoch in range(start + 1, epochs + 1):
            time.sleep(PLAN.get("seconds", 0.0))
            if number == PLAN.get("fails"):
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            if number == PLAN.get("dies"):
                os._exit(1)
            score = score_at(epoch)
            tracked.writer().metrics({"tuning/top1": score}, epoch)
            memory.write_text(str(epoch))
            log("epoch", epoch)
            report(epoch, {"score": score, "tuning/top1": score})
    except BaseException as error:
        tracked.finish(
            "pruned" if isinstance(error, train_trial.TrialStoppedError) else "failed", str(error)
        )
        raise
    log("end", epoch)
    tracked.finish("completed")
    return final


def main():
    recipe = Run(
        stage="phase2",
        data=Data(path="fake"),
        augment=Augment(randaugment_n=2, randaugment_m=9),
        mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0),
        model=Model(dropout=0.02),
        train=Train(epochs=PLAN.get("epochs", 3)),
        cluster=Cluster(allow_open=True, gpus_per_worker=0, cpus_per_worker=1),
    )
    result = sweep(
        Sweep(
            recipe=recipe,
            recipe_name="phase2",
            space=spaces.load("regularisation"),
            name=PLAN.get("name", ""),
            trials=PLAN.get("trials", 6),
            early_stopping=PLAN.get("asha", True),
            parallel=2,
        ),
        Hooks(check, train),
    )
    import ray

    if ray.is_initialized():
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        print("PLACEMENT GROUPS LEFT", len(groups))
    print("FINISHED", result.finished)


if __name__ == "__main__":
    job(main)
