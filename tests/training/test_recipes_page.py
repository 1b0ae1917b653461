"""docs/recipes.md speaks of what there is: every loss, optimizer and schedule, and the
phases' own values."""

import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from ftlib import config, recipes
from ftlib.training.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()


def recipe(stage):
    spec = importlib.util.spec_from_file_location(stage, ROOT / "jobs" / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, stage.upper())


def row(start):
    return next(
        [c.strip() for c in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith(f"| {start}")
    )


@pytest.mark.parametrize("union", [config.Loss, config.Optimizer, config.Schedule])
def test_every_choice_is_explained(union):
    assert all(f"| `{kind.__name__}` |" in PAGE for kind in get_args(union))


@pytest.mark.parametrize("column,stage", list(enumerate(["phase1", "phase2", "phase3"], 1)))
def test_the_phases_values_are_the_recipes(column, stage):
    run = recipe(stage)
    assert row("`augment.size`")[column] == str(run.augment.size)
    assert row("`model.dropout`")[column].split(",")[0] == f"{run.model.dropout:g}"
    assert row("epochs")[column].split(",")[0] == str(run.train.epochs)
    assert (f"EMA {run.train.ema_decay:g}" in row("epochs")[column]) == (run.train.ema_decay > 0)
    if stage != "phase3":
        assert row("optimizer")[column].startswith(
            f"{type(run.optimizer).__name__}, lr {run.optimizer.lr:.0e}".replace("e-0", "e-")
        )
    assert (run.train.batch_size, run.train.microbatch_size, run.train.clip_norm) == (
        128,
        32,
        1.0,
    ) and "128 as 4 microbatches of 32" in PAGE


def test_phase_1s_rates_are_those_of_the_table():
    run = recipe("phase1")
    rates = [learning_rate(run.schedule, run.optimizer.lr, t, 1000, 100) for t in (0, 299, 999)]
    assert (
        rates == pytest.approx([6e-4, 3e-3, 6e-7])
        and "6e-4 up to 3e-3 in 30 % of the steps, down to 6e-7" in row("schedule")[1]
    )


def test_a_recipe_is_found_with_dashes_as_with_underscores():
    run = recipes.load("from-scratch-short")
    assert run == recipes.load("from_scratch_short") and run.stage == "from_scratch_short"
    assert "from_scratch_short" in recipes.available()


@pytest.mark.parametrize("name", ["from-scratch-short", "from-scratch-long"])
def test_the_recipes_from_scratch_were_measured_at_their_own_scale(name):
    run = recipes.load(name)
    assert (run.measured.size, run.measured.epochs) == (run.augment.size, run.train.epochs)
