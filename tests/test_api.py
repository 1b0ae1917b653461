"""The Python interface: prepare, recipe, train, load, predict."""

import dataclasses

import pytest

import ftlib
from ftlib.data.shards import DataError
from ftlib.paths import job_command
from ftlib.settings import ConfigError

SMALL = {
    "data.subset": 0.1,
    "model.arch": "resnet18",
    "augment.size": 32,
    "train.epochs": 1,
    "gates.val_top1": 0.0,
    "track.system_metrics": False,
}


def test_recipe_replaces_settings_and_names_the_nearest_for_a_typo():
    run = ftlib.recipe("phase2", data="pets", **{"mix.mixup_alpha": 0.4})
    assert (run.data.path, run.mix.mixup_alpha, run.stage) == ("pets", 0.4, "phase2")
    with pytest.raises(ConfigError, match="mix.mixup_alpha"):
        ftlib.recipe("phase2", **{"mix.mixup_alhpa": 0.4})
    with pytest.raises(ConfigError, match="Did you mean phase2"):
        ftlib.recipe("phse2")


@pytest.mark.filterwarnings("ignore")  # Ray warns about its own settings
def test_from_pictures_to_a_prediction(home):
    digits = ftlib.prepare("digits", "digits", progress=False)
    run = ftlib.train(ftlib.recipe("phase1", data="digits", **SMALL), quiet=True)
    again = ftlib.train(ftlib.recipe("phase1", data="digits", **SMALL), quiet=True)
    assert again.folder == run.folder and again.metrics == run.metrics
    assert run.passed and run.classes == list(digits.classes) and len(run.history) == 1
    assert 0 <= run.metrics["best/val_top1"] <= 100

    pictures = [bytes(digits.split("val").image(row)) for row in range(3)]
    file = home / "digit.jpg"
    file.write_bytes(pictures[0])
    one = run.predict(str(file), top_k=3)
    several = run.predict(pictures, top_k=3)
    assert one["class"] == several[0]["class"] and len(several) == 3
    assert one["probability"] == pytest.approx(several[0]["probability"], abs=1e-6)
    assert one["class"] in run.classes and len(one["top"]) == 3
    assert run.name in repr(run) and run.name in run._repr_html_()
    assert ftlib.load(run.name).metrics == run.metrics


def test_a_run_that_is_not_there_or_not_finished_is_refused(home):
    with pytest.raises(ConfigError, match="there is no run"):
        ftlib.load("nothing")
    folder = home / "runs" / "begun"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="not finished"):
        ftlib.load("begun")


def test_the_interface_is_what_the_docs_name():
    assert set(ftlib.__all__) >= {"prepare", "recipe", "train", "load"}
    assert {f.name for f in dataclasses.fields(ftlib.TrainedRun)} >= {"folder", "recipe"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ftlib.nothing


def test_an_error_of_prepare_names_its_arguments(home, tmp_path):
    out = tmp_path / "set"
    ftlib.prepare("digits", str(out), progress=False)
    with pytest.raises(DataError, match="another name, or give overwrite=True .* or append=True"):
        ftlib.prepare("digits", str(out), max_side=24, progress=False)


def test_an_error_of_training_names_settings_not_flags(home):
    ftlib.prepare("digits", "digits", progress=False)
    run = ftlib.recipe("phase2", data="digits", name="mine", **SMALL)
    assert run.name == "mine"
    with pytest.raises(ConfigError, match=r"with model\.init_from pretrained") as refused:
        ftlib.train(run)
    command = job_command("phase1", "--data.path digits")
    assert command in str(refused.value) and "--model" not in str(refused.value)
