"""The probe as a run, and the training that starts from it, with real ImageNet weights.

Modules: probe_run, fine_tune.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ftlib.config import AdamW
from ftlib.launch import fine_tune, probe_run
from ftlib.launch.launch import launch
from ftlib.report import evaluation
from ftlib.settings import ConfigError, from_dict, override
from ftlib.training.initial_weights import load_run_model
from tests import weights


@pytest.fixture
def lite0(tiny, offline_hub):
    """A fine-tuning recipe for EfficientNet-Lite0 on the half-bright pictures, at 32 px."""
    return override(
        dataclasses.replace(tiny, stage="finetune", optimizer=AdamW(lr=1e-4, layer_decay=0.75)),
        {
            "model.arch": weights.LITE0,
            "model.init_from": "pretrained",
            "model.freeze_norm": True,
            "augment.size": 32,
            "train.epochs": 1,
        },
    )


def test_a_probe_is_a_finished_run_that_is_found_again(lite0, monkeypatch):
    outcome = probe_run.launch_probe(lite0, quiet=True)
    assert outcome.status == "completed" and outcome.name.startswith("probe-")
    assert not outcome.compare_url  # the charts of all training runs have none of a probe
    assert outcome.metrics["best/val_top1"] >= 60
    loaded = load_run_model(outcome.run_dir)
    assert loaded.about["stage"] == "probe" and loaded.run.data.mean == (0.5, 0.5, 0.5)
    state = weights.lite0_state()
    kept = loaded.model.state_dict()
    assert torch.equal(kept["conv_stem.weight"], state["conv_stem.weight"])

    monkeypatch.setattr(probe_run.probe, "compute_features", None)
    again = probe_run.launch_probe(lite0, quiet=True)
    assert again.status == "finished" and again.metrics == outcome.metrics


def test_features_serve_a_second_probe_of_the_same_weights(lite0, monkeypatch):
    probe_run.launch_probe(lite0, quiet=True)
    monkeypatch.setattr(probe_run.probe, "compute_features", None)
    other = probe_run.launch_probe(override(lite0, {"seed": 7}), quiet=True)
    assert other.status == "completed"


def test_training_starts_from_the_probes_classifier_and_its_preprocessing(lite0):
    score = probe_run.launch_probe(lite0, quiet=True).metrics["best/val_top1"]
    run = probe_run.probed(lite0, quiet=True)
    assert run.model.init_from.startswith("run:probe-")
    assert run.data.mean == (0.5, 0.5, 0.5) and run.evaluate.interpolation == "bicubic"
    outcome = launch(run, local=True, quiet=True)
    start = json.loads((Path(outcome.run_dir) / "result.json").read_text())["start_top1"]
    assert start == score
    assert probe_run.probed(lite0, quiet=True) == run


def test_the_statistics_of_batchnorm_stay_where_they_are_frozen(lite0):
    outcome = launch(probe_run.probed(lite0, quiet=True), local=True, quiet=True)
    state, trained = weights.lite0_state(), load_run_model(outcome.run_dir).model.state_dict()
    assert torch.equal(trained["bn1.running_mean"], state["bn1.running_mean"])
    assert not torch.equal(trained["conv_head.weight"], state["conv_head.weight"])


def test_a_run_from_scratch_or_from_another_run_is_not_probed(tiny):
    assert probe_run.probed(tiny) == tiny
    other = override(tiny, {"model.init_from": "phase1"})
    assert probe_run.probed(other) == other


def test_a_probe_of_weights_that_have_seen_every_image_is_refused(tiny):
    first = launch(override(tiny, {"train.epochs": 1, "data.subset": 0.5}), local=True, quiet=True)
    same = override(tiny, {"model.init_from": f"run:{first.name}", "data.subset": 0.5})
    with pytest.raises(ConfigError, match=rf"{first.name} had trained on all 24 training images"):
        probe_run.launch_probe(same, quiet=True)
    more = probe_run.launch_probe(override(same, {"data.subset": 1.0}), quiet=True)
    assert more.status == "completed"


def test_a_probe_is_evaluated_like_any_run(lite0):
    outcome = probe_run.launch_probe(lite0, quiet=True)
    loaded = evaluation.load(outcome.run_dir)
    dataset = evaluation.Dataset.open(lite0.data.path)
    scored = evaluation.score(loaded, dataset)
    assert scored.before["top1"].value == outcome.metrics["best/val_top1"]


def test_recipes_that_differ_in_training_only_share_a_probe(lite0):
    one = probe_run.probe_recipe(lite0)
    other = probe_run.probe_recipe(override(lite0, {"train.epochs": 9, "optimizer.lr": 1e-3}))
    assert one == other and from_dict(
        type(one), json.loads(json.dumps(probe_run.settings.to_dict(one)))
    )


def test_fine_tuning_probes_and_trains_for_about_the_asked_steps(lite0):
    outcome = fine_tune.fine_tune(lite0, steps=6, quiet=True)
    result = json.loads((Path(outcome.run_dir) / "result.json").read_text())
    assert result["epochs"] == 3 and result["start_top1"] is not None
    plain = fine_tune.fine_tune(lite0, steps=0, probe=False, quiet=True)
    result = json.loads((Path(plain.run_dir) / "result.json").read_text())
    assert result["epochs"] == 1 and result["start_top1"] is None


@pytest.mark.parametrize(("images", "epochs"), [(10, 20), (960, 10), (3200, 3), (1_000_000, 3)])
def test_small_sets_get_more_epochs(images, epochs):
    assert fine_tune.epochs_for(images, 32, 300) == epochs
