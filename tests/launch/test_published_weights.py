"""Runs that start from published weights: `prepared_run` and `active_run` around
`training.initial_weights`."""

import dataclasses
import json
import shutil

import pytest

from ftlib import recipes
from ftlib.launch import run_record
from ftlib.launch.launch import launch, prepare_run
from ftlib.settings import ConfigError, override
from ftlib.training import checkpoint
from ftlib.training.initial_weights import load_run_model
from tests import weights


@pytest.fixture
def lite0(tiny, offline_hub):
    changes = {"model.arch": weights.LITE0, "model.init_from": "pretrained", "augment.size": 32}
    return override(tiny, {**changes, "train.epochs": 1})


def test_a_run_keeps_the_weights_it_began_with_and_what_they_expect(
    lite0, offline_hub, home, monkeypatch, capsys, tmp_path
):
    prepared = prepare_run(lite0)
    assert prepared.run.data.mean == (0.5, 0.5, 0.5)
    assert not (home / "runs").exists()  # nothing is written before the launch
    outcome = launch(lite0, local=True)
    assert "the classifier starts anew" in capsys.readouterr().out
    folder = home / "runs" / outcome.name
    record = json.loads((folder / "run.json").read_text())
    assert record["init"]["uri"] == str(folder / "init")
    assert record["init"]["name"] == "tf_efficientnet_lite0.in1k"
    assert record["run"]["data"]["mean"] == [0.5, 0.5, 0.5]
    loaded = load_run_model(str(folder))
    assert loaded.about["mean"] == [0.5, 0.5, 0.5]

    # The cache is gone: the copy is enough to resume, by the same name and with the same weights.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    again = prepare_run(override(lite0, {"name": outcome.name}))
    assert again.finished and again.fingerprint == prepared.fingerprint
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "best")
    resumed = launch(override(lite0, {"name": outcome.name}), local=True, quiet=True)
    assert resumed.metrics == outcome.metrics


def test_weights_that_are_not_there_are_missed_before_anything_starts(
    lite0, home, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="model.init_from = pretrained: .*hf download"):
        launch(lite0, local=True)
    assert not list(home.iterdir())


def test_a_run_from_before_published_weights_were_recorded_resumes(tiny, home):
    """init_from = imagenet was not part of the fingerprint, and the run's record has no weights."""
    run = override(tiny, {"train.epochs": 1})
    outcome = launch(run, local=True, quiet=True)
    old = override(run, {"model.init_from": "imagenet"})
    digest = prepare_run(run).dataset.digest
    fingerprint = run_record.fingerprint(old, digest, None)
    name = run_record.default_name(old, "prepared", fingerprint)
    folder = home / "runs" / name
    shutil.copytree(home / "runs" / outcome.name, folder)
    record = json.loads((folder / "run.json").read_text())
    record["run"]["model"]["init_from"] = "imagenet"
    del record["run"]["model"]["preprocessing"]
    record["run"]["name"], record["fingerprint"], record["init"] = name, fingerprint, None
    (folder / "run.json").write_text(json.dumps(record))
    assert checkpoint.steps(str(folder / "checkpoints"))
    for wanted in (old, override(old, {"name": name})):
        prepared = prepare_run(wanted)
        assert (prepared.run.name, prepared.fingerprint, prepared.source) == (
            name,
            fingerprint,
            None,
        )


@pytest.mark.parametrize("stage", ["phase2", pytest.param("phase3", marks=pytest.mark.slow)])
def test_a_later_phase_starts_from_published_weights_without_a_phase_before(
    lite0, stage, home, capsys
):
    """The phase's own regularization on EfficientNet-Lite0, for one epoch of 32 px pictures."""
    recipe = recipes.load(stage)
    run = override(
        dataclasses.replace(lite0, stage=stage, mix=recipe.mix, optimizer=recipe.optimizer),
        {
            "model.dropout": recipe.model.dropout,
            "train.ema_decay": recipe.train.ema_decay,
            "augment.randaugment_n": recipe.augment.randaugment_n,
            "augment.randaugment_m": recipe.augment.randaugment_m,
        },
    )
    outcome = launch(run, local=True)
    assert "the classifier starts anew" in capsys.readouterr().out
    record = json.loads((home / "runs" / outcome.name / "run.json").read_text())
    assert record["init"]["name"] == "tf_efficientnet_lite0.in1k"
    trained = load_run_model(outcome.run_dir).model.state_dict()["conv_stem.weight"]
    # One epoch of two small steps: still the published weights, a little changed.
    published = weights.lite0_state()["conv_stem.weight"]
    assert 0 < (trained - published).abs().max() < 0.01
