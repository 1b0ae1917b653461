"""Parameters and tags say what a run is and where it comes from.

Tests of lineage, logged_params and system_metrics.
"""

import subprocess
import sys
import time

from ftlib.config import AdamW, Augment, Data, Mix, Model, OneCycle, Run
from ftlib.process_identity import machine_id
from ftlib.track import lineage
from ftlib.track.journal import read
from ftlib.track.logged_params import PARAMS, params_of, short_name, swept_params
from ftlib.track.system_metrics import SystemSampler
from ftlib.track.writer import JournalLocation, Writer

RUN = Run(
    stage="phase2",
    seed=7,
    data=Data(path="x", subset=0.2),
    augment=Augment(size=224, randaugment_n=2, randaugment_m=9),
    mix=Mix(mixup_alpha=0.2),
    model=Model(dropout=0.02, init_from="phase1"),
    optimizer=AdamW(lr=1e-4),
    schedule=OneCycle(),
)


def test_parameters_are_few_flat_and_complete_for_every_run():
    params = params_of(RUN)
    assert (
        tuple(params) == PARAMS
        and 10 <= len(params) <= 25
        and all("." not in name for name in params)
    )
    assert {
        "dropout": 0.02,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 0.0,
        "randaugment_m": 9.0,
        "lr": 1e-4,
        "optimizer": "AdamW",
        "schedule": "OneCycle",
        "seed": 7,
        "subset": 0.2,
    }.items() <= params.items()
    assert set(params_of(Run(stage="phase1"))) == set(params)


def test_swept_settings_have_short_names():
    assert (
        short_name("mix.mixup_alpha") == "mixup_alpha"
        and short_name("augment.crop_scale") == "crop_scale"
    )
    assert (
        swept_params(RUN, ["augment.crop_scale", "loss", "model.dropout"])["crop_scale"]
        == "[0.08, 1.0]"
    )
    assert swept_params(RUN, ["schedule.up"])["up"] == 0.3


def test_tags_name_code_data_and_command(monkeypatch):
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "raysubmit_1")
    monkeypatch.setattr(sys, "argv", ["jobs/phase2.py", "--track.uri", "http://u:hunter2@h"])
    tags = lineage.run_tags(
        RUN,
        dataset=("digits", "0123456789abcdef"),
        sweep="s",
        trial="t01",
        kind="trial",
        extra={"stage": "other"},
    )
    assert {
        "kind": "trial",
        "stage": "other",
        "arch": "resnet50",
        "seed": "7",
        "dataset": "digits@01234567",
        "sweep": "s",
        "trial": "t01",
        "ray.job_id": "raysubmit_1",
        "mlflow.source.name": "phase2.py",
        "mlflow.source.type": "JOB",
    }.items() <= tags.items()
    assert "hunter2" not in tags["command"] and "phase2.py" in tags["command"]
    assert "promoted_from" not in tags and all(isinstance(v, str) for v in tags.values())


def test_git_state_of_a_checkout_and_of_no_checkout(tmp_path):
    assert lineage.git_state(tmp_path) == {}
    folder = tmp_path / "code"
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q", "-b", "trunk"], check=True)
    (folder / "a.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    clean = lineage.git_state(folder)
    assert (
        len(clean["mlflow.source.git.commit"]) == 40
        and clean["mlflow.source.git.branch"] == "trunk"
        and clean["git.dirty"] == "false"
    )
    (folder / "a.py").write_text("2")
    lineage.git_state.cache_clear()
    assert lineage.git_state(folder)["git.dirty"] == "true"


def test_system_metrics_go_through_the_journal(tmp_path):
    writer = Writer(JournalLocation(str(tmp_path), machine_id()), "r.jsonl")
    with SystemSampler(writer, node="node_3", every_seconds=0.05, disk=str(tmp_path)):
        time.sleep(0.6)
    records = [r for r, _ in read(tmp_path / "r.jsonl")]
    assert len(records) >= 3
    values = records[-1]["values"]
    assert (
        0 <= values["system/node_3/cpu_utilization_percentage"] <= 100
        and 0 < values["system/node_3/system_memory_usage_percentage"] <= 100
        and values["system/node_3/disk_available_megabytes"] > 0
    )
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
