"""A run far from what its recipe was measured on is told so, in one line each, with the remedy."""

import pytest

from ftlib import recipes
from ftlib.data.shards import Dataset
from ftlib.launch import preflight
from ftlib.launch.launch import launch
from ftlib.paths import data_path
from ftlib.settings import override


def notes(run):
    return preflight.plan(run, Dataset.open(data_path(run.data.path))).far_outside


@pytest.fixture
def phase1(shapes):
    """Phase 1 as shipped, on 48 pictures of 16 px in two classes."""
    return override(recipes.load("phase1"), {"data.path": shapes, "model.arch": "resnet18"})


def test_phase1_on_a_few_small_pictures_says_all_that_does_not_fit(phase1):
    size, crop, batch, subset, number = notes(phase1)
    assert size.startswith("augment.size = 128: half of the training images are at most 16 px")
    assert size.endswith("Set it to 16")
    assert "augment.crop_scale = 0.08 1: of 16 px it may leave 5 px" in crop
    assert "train.batch_size = 128: 8 images make 1 optimizer steps an epoch, 30 in all" in batch
    assert batch.endswith("Set it and train.microbatch_size to 8")
    assert "data.subset = 0.2: it leaves 4 images a class" in subset
    assert "8 training images: the recipe was measured on 256,190" in number
    assert "jobs/finetune.py" in number


def test_what_a_note_says_to_set_silences_it(phase1):
    suited = {
        "augment.size": 16,
        "augment.crop_scale": (0.35, 1.0),
        "data.subset": 1.0,
        "train.batch_size": 8,
        "train.microbatch_size": 8,
    }
    left = notes(override(phase1, {**suited, "augment.crop_scale": (1.0, 1.0)}))
    assert len(left) == 1 and "48 training images" in left[0]
    assert (
        "train.epochs = 7: the recipe was measured over 30"
        in notes(override(phase1, {**suited, "train.epochs": 7}))[-1]
    )


def test_a_recipe_is_silent_at_its_own_scale(phase1):
    own = {"measured.size": 16, "measured.images": 8, "measured.epochs": 30, "augment.size": 16}
    assert notes(override(phase1, own)) == ()
    unknown = {"measured.size": 0, "measured.images": 0, "measured.epochs": 0}
    assert notes(override(phase1, unknown)) == ()


def test_a_launch_prints_the_notes_and_trains(tiny, capsys):
    run = override(tiny, {"measured.epochs": 100, "train.epochs": 1})
    assert launch(run).status == "completed"
    assert "  note: train.epochs = 1: the recipe was measured over 100" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["phase1", "phase2", "phase3"])
def test_the_phases_state_their_scale(name):
    run = recipes.load(name)
    assert run.measured.epochs == run.train.epochs and run.measured.size == run.augment.size
    assert run.measured.images in (256_190, 1_281_167)
