"""Finished runs below a folder, and the best of a stage."""

import json

import pytest

from ftlib.runs import best_of_stage, finished_runs
from ftlib.settings import ConfigError


def make(root, name, stage="phase1", digest="d1", top1=50.0, status="completed"):
    folder = root / name
    folder.mkdir()
    about = {"run": {"stage": stage}, "data": {"name": f"set-{digest}", "digest": digest}}
    (folder / "run.json").write_text(json.dumps(about))
    result = {"status": status, "metrics": {"best/val_top1": top1}}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_best_finished_run_of_the_stage_on_the_same_data_is_found(tmp_path):
    make(tmp_path, "low", top1=40)
    make(tmp_path, "high", top1=60)
    make(tmp_path, "other-data", digest="d2", top1=90)
    make(tmp_path, "other-stage", stage="phase2", top1=90)
    make(tmp_path, "unfinished", top1=90, status="running")
    assert best_of_stage("phase1", "pets", "d1", str(tmp_path)) == f"{tmp_path}/high"


def test_a_missing_stage_says_what_there_is(tmp_path):
    make(tmp_path, "elsewhere", digest="d2")
    with pytest.raises(ConfigError) as error:
        best_of_stage("phase1", "pets", "d1", str(tmp_path))
    for words in (
        "no finished phase1 run on the data set 'pets'",
        "jobs/phase1.py --data.path pets",
        "elsewhere (on set-d2)",
        "--model.init-from pretrained",
    ):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"Did you mean phase1\?"):
        best_of_stage("phse1", "pets", "d1", str(tmp_path))


def test_damaged_and_foreign_folders_are_passed_over(tmp_path):
    make(tmp_path, "good")
    make(tmp_path, "bad")
    (tmp_path / "bad" / "result.json").write_text("{")
    (tmp_path / "empty").mkdir()
    assert [run.name for run in finished_runs(str(tmp_path))] == ["good"]
    assert list(finished_runs(str(tmp_path / "nowhere"))) == []
