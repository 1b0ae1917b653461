"""The checklist hides nothing; the estimate runs the run's own steps and touches nothing of it.

Holds the tests of checklist, estimate and timing.
"""

import dataclasses
import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ftlib import cli, recipes
from ftlib.config import Augment, Cluster, Data, Model, Run, Track, Train
from ftlib.launch import checklist, cluster, estimate, launch, prices, timing
from ftlib.preparation.prepare import prepare
from ftlib.settings import ConfigError, override
from ftlib.training.loop import Training, WorkerContext

JOB = Path(__file__).parents[2] / "jobs" / "estimate.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 training and 30 validation digits of 3 classes, prepared."""
    root = tmp_path_factory.mktemp("digits")
    x, y = load_digits(return_X_y=True)
    for split, start in (("train", 0), ("val", 20)):
        for label in range(3):
            folder = root / "source" / split / str(label)
            folder.mkdir(parents=True)
            for i in np.flatnonzero(y == label)[start : start + (20 if split == "train" else 10)]:
                Image.fromarray((x[i].reshape(8, 8) * 15).astype(np.uint8)).resize(
                    (24, 24)
                ).convert("RGB").save(folder / f"{i}.jpg")
    prepare(root / "source", root / "set", engine="local", workers=1, progress=False)
    return str(root / "set")


@pytest.fixture
def run(pictures):
    return Run(
        name="est",
        data=Data(path=pictures, loader_workers=0),
        augment=Augment(size=24),
        model=Model(arch="shufflenet_v2_x0_5"),
        train=Train(epochs=4, batch_size=16, microbatch_size=8),
        cluster=Cluster(cpus_per_worker=1),
        track=Track(offline=True, log_model=False, system_metrics=False),
    )


def states(ready):
    return {c.name: c.state for c in ready.checks}


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


# --- the checklist ---


def test_a_run_that_may_start(run):
    ready = checklist.check(run)
    assert ready.ok and ready.prepared is not None and ready.placement is not None
    assert states(ready) == {
        "data": "ok",
        "recipe": "ok",
        "starting model": "ok",
        "devices": "warn",
        "storage": "ok",
        "tracking": "ok",
    }
    assert "60 training and 30 validation images of 3 classes" in ready.checks[0].text


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        ({"data.path": "/nowhere/set"}, "data", "Prepare one"),
        ({"model.arch": "resnet19"}, "recipe", "resnet18"),
        ({"model.init_from": "phase1"}, "starting model", "no finished phase1 run"),
        ({"cluster.gpus_per_worker": 1}, "devices", "there is no GPU here"),
        ({"cluster.cpus_per_worker": 1000}, "devices", "only 0 fit"),
        ({"checkpoint.storage": "/proc/nowhere"}, "storage", "/proc/nowhere"),
        ({"track.uri": "ftp://example.org"}, "tracking", "needs http"),
    ],
)
def test_each_failure_is_one_line_and_hides_no_other(run, changes, line, message, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ready = checklist.check(override(run, changes))
    failed = {c.name: c.text for c in ready.checks if c.state == "fail"}
    assert list(failed) == [line] and message in failed[line]
    assert {"devices", "storage", "tracking"} <= set(states(ready))
    assert not ready.ok


def test_a_shard_that_is_gone_fails_the_data_check(run, tmp_path):
    import shutil

    copy = tmp_path / "set"
    shutil.copytree(run.data.path, copy)
    next(copy.glob("train-*.parquet")).unlink()
    assert states(checklist.check(override(run, {"data.path": str(copy)})))["data"] == "fail"


def test_a_dead_server_is_a_failure_and_with_offline_a_warning(run):
    dead = override(run, {"track.uri": "http://127.0.0.1:9", "track.offline": False})
    assert states(checklist.check(dead))["tracking"] == "fail"
    assert states(checklist.check(override(dead, {"track.offline": True})))["tracking"] == "warn"


# --- the timing ---


def test_nothing_of_the_run_is_touched(run, home):
    before = files_below(run.data.path)
    ready = checklist.check(run)
    found = estimate.measure(ready.prepared, ready.placement, seconds=0.5)
    assert not (home / "runs" / "est").exists() and files_below(home / "runs") == []
    assert files_below(run.data.path) == before
    assert found.steps_per_epoch == 4 and found.epochs == 4 and found.evaluations == 4
    assert found.steps_timed >= estimate.LEAST_STEPS
    assert (
        min(
            found.step_s,
            found.device_step_s,
            found.loader_step_s,
            found.evaluation_s,
            found.checkpoint_s,
        )
        > 0
    )
    assert found.memory["process"] > 10**8 and found.largest_microbatch is None
    json.dumps(found.to_dict())


def test_estimate_of_a_real_short_run_has_its_structure(run, tmp_path):
    run = override(run, {"checkpoint.storage": str(tmp_path / "runs"), "train.epochs": 2})
    ready = checklist.check(run)
    found = estimate.measure(ready.prepared, ready.placement, seconds=1.0)
    outcome = launch.launch(run, local=True, quiet=True)
    history = json.loads((Path(outcome.run_dir) / "result.json").read_text())["history"]
    assert (found.epochs, found.evaluations) == (
        len(history),
        sum("val/top1" in row for row in history),
    )
    real = sum(row["train/epoch_s"] + row["val/seconds"] for row in history)
    assert (
        real / 50 < found.total_s < 50 * real
    )  # the same kind of number; how near they are, docs/performance.md says


def test_an_epoch_counts_its_short_last_step_by_its_images():
    found = estimate.CostEstimate(
        4,
        3,
        2,
        2,
        step_s=1.0,
        device_step_s=0.5,
        loader_step_s=0.25,
        checkpoint_s=0.1,
        evaluation_s=2.0,
        images_per_step=100.0,
        steps_timed=9,
        spread=0.01,
    )
    assert found.epoch_s == pytest.approx(4.1) and found.total_s == pytest.approx(3 * 4.1 + 2 * 2.1)
    assert found.device_hours == pytest.approx(2 * found.total_s / 3600)
    assert (
        found.bound == "device" and dataclasses.replace(found, loader_step_s=0.6).bound == "loader"
    )
    assert found.rate(found.step_s) == 100


def test_steps_are_those_of_training(run):
    """The timed steps leave the very weights that training leaves."""
    import torch

    from ftlib.data.loader import train_batches

    dataset = launch.prepare_run(run).dataset
    paced, plain = (Training(WorkerContext(run, dataset, "")) for _ in range(2))
    with train_batches(
        dataset, paced.rows, run, rank=0, world=1, start_step=0, stop_step=3, workers=0
    ) as batches:
        assert timing.run_steps(paced, batches, 3) == 48
    with train_batches(
        dataset, plain.rows, run, rank=0, world=1, start_step=0, stop_step=3, workers=0
    ) as batches:
        plain.update_frozen(0)
        for _ in range(3):
            plain.train_step(batches, ask=True)
            plain.state.step += 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(paced.model.state_dict().values(), plain.model.state_dict().values())
    )


def test_constant_batches_fit_every_step_of_the_plan(run):
    dataset = launch.prepare_run(run).dataset
    training = Training(WorkerContext(run, dataset, ""))
    assert (
        timing.run_steps(training, timing.constant_batches(training), 5) == 16 + 16 + 16 + 12 + 16
    )  # 60 images: the fourth step is short


@pytest.mark.parametrize("most", [0, 1, 5, 32, 33, 100, 1000, 5000])
def test_largest_microbatch(most):
    found = estimate.largest(lambda n: n <= most, 32, 4096)
    assert found <= most and (found >= min(most, 4096) * 15 / 16 - 1 or found == most)


# --- money, and the command ---


def test_price():
    assert (
        estimate.machines(cluster.Placement(6, 6, 1.0, 4), 6, prices.PRICES["g4dn.12xlarge"]) == 2
    )
    assert estimate.machines(cluster.Placement(1, 1, 0.0, 4), 1, prices.PRICES["c7i.4xlarge"]) == 1
    with pytest.raises(ConfigError, match=r"Did you mean g5\.xlarge"):
        prices.price_of("g5.xlagre")


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("estimate_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLAGS = [
    "--data.subset",
    "1",
    "--model.arch",
    "shufflenet_v2_x0_5",
    "--model.dropout",
    "0",
    "--augment.size",
    "24",
    "--cluster.cpus-per-worker",
    "1",
    "--data.loader-workers",
    "0",
    "--track.offline",
]


def test_the_command(job, pictures, tmp_path, capsys):
    code = job.main(
        [
            "phase1",
            "--data.path",
            pictures,
            *FLAGS,
            "--seconds",
            "0.5",
            "--machine",
            "g5.xlarge",
            "--json",
            str(tmp_path / "e.json"),
        ]
    )
    text = capsys.readouterr().out
    assert code == 0
    for word in ("ok    data", "device-hours", "images/s", "bound", "peak memory", "USD", "epoch"):
        assert word in text
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["estimate"]["bound"] in ("loader", "device") and len(found["checks"]) == 6


def test_the_command_fails_with_exit_code_1(job, pictures, capsys):
    assert (
        job.main(["phase2", "--data.path", pictures, *FLAGS, "--checks-only"]) == 1
    )  # there is no Phase 1 model
    assert "fail  starting model" in capsys.readouterr().out


def test_the_command_prices_an_epoch_on_a_cluster_and_prints_how_to_submit(job, pictures, capsys):
    settings = str(JOB.parents[1] / "cluster.yaml")
    assert (
        job.main(
            [
                "phase1",
                "--data.path",
                pictures,
                *FLAGS,
                "--seconds",
                "0.5",
                "--cluster.gpus-per-worker",
                "0",
                "--cluster",
                settings,
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "gpu: g4dn.2xlarge (AWS, 1 T4, 8 vCPU, 10 Gbit/s), asked for spot" in text
    assert f"ray job submit --working-dir . -- python jobs/phase1.py --data.path {pictures}" in text
    assert "Prices of " in text


def test_the_submitted_command_has_the_flags_that_differ_from_the_job_s_own(job):
    run = override(recipes.load("phase2"), {"seed": 7, "mix.mixup_alpha": 0.0})
    assert job.submit_line("phase2", run, 4) == (
        "ray job submit --working-dir . -- python jobs/phase2.py --seed 7 --mix.mixup-alpha 0.0 "
        "--cluster.workers 1:4"
    )
    chosen = override(run, {"cluster.workers": "2"})
    assert job.submit_line("phase2", chosen, 4).endswith(" --cluster.workers 2")
    sample = recipes.load("sample-phase2")
    words = job.submit_line("sample-phase2", sample, 1).partition("jobs/phase2.py ")[2]
    assert cli.parse(recipes.load("phase2"), shlex.split(words)) == override(
        sample, {"cluster.workers": "1:1"}
    )
