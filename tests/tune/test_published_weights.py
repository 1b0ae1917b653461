"""Sweeps from published weights: `train_trial` copies them once, and all trials start from the
copy."""

import pytest

from ftlib.config import Augment, Data, Model, Run, Train
from ftlib.launch.prepared_run import prepare_run
from ftlib.tune import train_trial
from tests import weights


@pytest.fixture
def recipe(shapes, offline_hub, home):
    return Run(
        data=Data(path=shapes.path, loader_workers=0),
        model=Model(arch=weights.LITE0, init_from="pretrained"),
        augment=Augment(size=32),
        train=Train(epochs=1, batch_size=8, microbatch_size=8),
    )


def test_all_trials_start_from_one_copy_with_its_preprocessing(recipe, tmp_path, monkeypatch, home):
    found = train_trial.check(recipe)
    assert not list(home.iterdir())  # nothing is written before the sweep's folder is locked
    sweep = str(tmp_path / "sweep")
    inputs = found.at(sweep)
    assert inputs.init_uri == f"{sweep}/init"
    inputs.copy_weights(sweep)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))  # trials need no cache

    trial = train_trial.trial_recipe(recipe, str(tmp_path), inputs, {"CPU": 1}, name="t00")
    prepared = prepare_run(trial)
    assert prepared.source.uri == inputs.init_uri and prepared.source.new_head
    assert prepared.source.sha256 == found.init_sha256
    assert prepared.run.data.mean == (0.5, 0.5, 0.5)
    assert prepared.run.evaluate.interpolation == "bicubic"
