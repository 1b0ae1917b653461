"""Where first weights come from: found by themselves, checked, loaded, or refused with the
remedy."""

import json

import pytest
import torch
from safetensors.torch import save, save_file

from ftlib import storage
from ftlib.config import Run
from ftlib.settings import ConfigError, override, to_dict
from ftlib.training import initial_weights, models

CLASSES = ("cat", "dog", "owl")
SMALL = {"model.arch": "shufflenet_v2_x0_5", "augment.size": 32}


def recipe(**changes):
    return override(Run(), {**SMALL, **changes})


def finished(
    root, name, stage="phase1", digest="d1", top1=50.0, classes=CLASSES, status="completed", seed=0
):
    """A finished run's folder with random weights; the weights."""
    torch.manual_seed(seed)
    run = recipe(stage=stage)
    state = models.build(run.model, len(classes)).state_dict()
    about = {
        "arch": run.model.arch,
        "classes": list(classes),
        "run": name,
        "stage": stage,
        "scores": {"val/top1": top1},
        "step": 3,
    }
    storage.write_folder(
        str(root / name / "best" / "step-00000003"),
        {"model.safetensors": save(state), "model.json": json.dumps(about).encode()},
        {},
    )
    (root / name / "run.json").write_text(
        json.dumps({"run": to_dict(run), "data": {"name": "pets", "digest": digest}})
    )
    (root / name / "result.json").write_text(
        json.dumps({"status": status, "metrics": {"best/val_top1": top1}})
    )
    return state


def find(root, init_from, digest="d1", classes=CLASSES, **changes):
    return initial_weights.resolve_init(
        recipe(**{"model.init_from": init_from, **changes}), "pets", digest, classes, str(root)
    )


def test_scratch_and_imagenet_need_no_source(tmp_path):
    assert find(tmp_path, "scratch") is None and find(tmp_path, "imagenet") is None


def test_the_best_finished_run_of_the_stage_on_the_same_data_is_found(tmp_path):
    finished(tmp_path, "a", top1=60)
    state = finished(tmp_path, "b", top1=70, seed=1)
    finished(tmp_path, "other-data", top1=99, digest="d2")
    finished(tmp_path, "other-stage", top1=99, stage="phase2")
    finished(tmp_path, "unfinished", top1=99, status="running")
    source = find(tmp_path, "phase1")
    assert source.run_name == "b" and source.top1 == 70
    model = initial_weights.start(recipe(**{"model.init_from": "phase1"}), CLASSES, source)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_no_earlier_phase_says_the_command_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=r"python jobs/phase1.py --data.path pets"):
        find(tmp_path, "phase1")
    finished(tmp_path, "x", digest="d2")
    with pytest.raises(ConfigError, match=r"other data: x \(on pets\)"):
        find(tmp_path, "phase1")


@pytest.mark.parametrize(
    "wanted, words",
    [
        ("run:none", "holds no best model"),
        ("file:/none", "never finished"),
        ("file:/none.safetensors", "there is no file"),
        ("ftp://x", "use scratch"),
        ("mlflow:abc", "no tracking server"),
    ],
)
def test_sources_that_are_not_there(tmp_path, wanted, words):
    with pytest.raises(ConfigError, match=words):
        find(tmp_path, wanted)


def test_other_classes_are_refused_unless_a_new_head_is_asked_for(tmp_path):
    state = finished(tmp_path, "a")
    for classes in (("cat", "owl", "dog"), ("cat", "dog")):
        with pytest.raises(ConfigError, match="reset-head"):
            find(tmp_path, "run:a", classes=classes)
    run = recipe(**{"model.init_from": "run:a", "model.reset_head": True})
    source = initial_weights.resolve_init(run, "pets", "d9", ("x", "y"), str(tmp_path))
    model = initial_weights.start(run, ("x", "y"), source)
    head = models.head_name(model)
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, state[key])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_another_architecture_is_refused(tmp_path):
    finished(tmp_path, "a")
    with pytest.raises(ConfigError, match="shufflenet_v2_x0_5"):
        find(tmp_path, "run:a", **{"model.arch": "resnet18"})


def test_a_bare_file_must_fit(tmp_path):
    run = recipe(**{"model.init_from": f"file:{tmp_path}/w.safetensors"})
    save_file(models.build(run.model, 5).state_dict(), tmp_path / "w.safetensors")
    source = initial_weights.resolve_init(run, "pets", "d", CLASSES, str(tmp_path))
    with pytest.raises(ConfigError, match="do not fit"):
        initial_weights.start(run, CLASSES, source)
    assert initial_weights.start(run, tuple("abcde"), source) is not None
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="changed since"):
        initial_weights.start(run, tuple("abcde"), source)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        initial_weights.start(
            run,
            tuple("abcde"),
            initial_weights.resolve_init(run, "pets", "d", CLASSES, str(tmp_path)),
        )


def test_damaged_weights_are_never_used(tmp_path):
    finished(tmp_path, "a")
    path = tmp_path / "a" / "best" / "step-00000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="sha256"):
        find(tmp_path, "phase1")


def test_a_finished_model_comes_back_whole(tmp_path):
    state = finished(tmp_path, "a")
    loaded = initial_weights.load_run_model(str(tmp_path / "a"))
    assert loaded.classes == CLASSES and not loaded.model.training and loaded.about["run"] == "a"
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in state.items())
    with pytest.raises(ValueError, match="not a run"):
        initial_weights.load_run_model(str(tmp_path / "nothing"))
