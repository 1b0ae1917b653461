"""What a report says of the run itself."""

import dataclasses
import json

from ftlib import recipes
from ftlib.config import Run
from ftlib.report.run_facts import RunFacts, run_facts
from ftlib.settings import override


def test_settings_that_differ_from_the_recipe_are_listed_and_none_else(tmp_path):
    recipe = recipes.load("phase2")
    changes = {"optimizer.lr": 0.0042, "data.path": "elsewhere", "cluster.workers": "2"}
    run = override(dataclasses.replace(recipe, name="mine"), changes)
    assert run_facts(run, str(tmp_path)).changed == (
        ("optimizer.lr", str(recipe.optimizer.lr), "0.0042"),
    )


def test_the_mlflow_page_and_the_curves_are_found_in_the_folder(tmp_path):
    known = {"uri": "sqlite:////home/mlflow.db", "experiment_id": "3", "run_id": "abc"}
    (tmp_path / "run.json").write_text(json.dumps({"mlflow": known}))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "curves.png").write_bytes(b"drawn")
    facts = run_facts(Run(), str(tmp_path))
    assert facts.curves == b"drawn"
    assert facts.mlflow.startswith("http://127.0.0.1:5000/#/experiments/3/runs/abc?")


def test_a_run_of_no_recipe_without_tracking_has_no_facts(tmp_path):
    assert run_facts(override(Run(), {"stage": "other"}), str(tmp_path)) == RunFacts()
