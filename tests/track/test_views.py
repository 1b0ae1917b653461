"""Saved views are what MLflow's pages read, and a person's changes to them stay."""

import json

import pytest

from ftlib.track import views
from ftlib.track.logged_params import PARAMS


@pytest.mark.parametrize(
    "view",
    [
        views.phases_view(),
        views.sweep_view("reg 11/22", ["dropout", "mixup_alpha"]),
        views.sweep_view("x", list(PARAMS), finished_only=True),
    ],
)
def test_views_survive_the_round_trip_and_fit_into_a_tag(view):
    value = views.encode(view, 1, 2)
    assert len(value) < views.LARGEST_TAG
    assert views.decode(view.key, value) == view
    charts, sections = (
        view.state["compareRunCharts"],
        {s["uuid"] for s in view.state["compareRunSections"]},
    )
    assert (
        len({c["uuid"] for c in charts}) == len(charts)
        and {c["metricSectionId"] for c in charts} == sections
    )


def test_views_show_parameters_that_runs_have():
    shown = {
        c.split("`")[1]
        for c in views.phases_view().state["selectedColumns"]
        if c.startswith("params.")
    }
    assert shown <= set(PARAMS)


def test_the_first_section_of_the_phases_is_never_empty():
    """MLflow says "no charts" of a section in which nothing is drawn yet; results come last."""
    state = views.phases_view().state
    first = state["compareRunSections"][0]["uuid"]
    charts = [c for c in state["compareRunCharts"] if c["metricSectionId"] == first]
    assert {"best/val_top1", "val/top1", "step/loss"} <= {c["metricKey"] for c in charts}
    assert state["hideEmptyCharts"]


def test_searches_are_ones_that_mlflow_takes(store, mlflow):
    experiment = mlflow.create_experiment("e")
    mlflow.create_run(experiment, tags={"kind": "train"})
    mlflow.create_run(experiment, tags={"kind": "trial", "sweep": "s", "outcome": "completed"})
    for view in (
        views.phases_view(),
        views.sweep_view("s", ["dropout"]),
        views.sweep_view("s", ["dropout"], finished_only=True),
    ):
        order = view.state["orderByKey"] + (" ASC" if view.state["orderByAsc"] else " DESC")
        assert (
            len(
                mlflow.search_runs(
                    [experiment], filter_string=view.state["searchFilter"], order_by=[order]
                )
            )
            == 1
        )


def test_a_view_is_written_once_and_renewed_unless_a_person_changed_it(store, mlflow):
    experiment = mlflow.create_experiment("e")
    one, two = views.sweep_view("s", ["dropout"]), views.sweep_view("s", ["dropout", "lr"])
    assert views.save(mlflow, experiment, one)
    assert not views.save(mlflow, experiment, one)
    assert views.save(mlflow, experiment, two)
    tag = views.TAG + two.key
    stored = json.loads(mlflow.get_experiment(experiment).tags[tag])
    mlflow.set_experiment_tag(experiment, tag, json.dumps({**stored, "name": "my own"}))
    assert not views.save(mlflow, experiment, one)
    assert json.loads(mlflow.get_experiment(experiment).tags[tag])["name"] == "my own"


@pytest.mark.parametrize(
    ("version", "is_known"),
    [
        ("3.17.2", True),
        ("3.15.0", True),
        ("3.14.9", False),
        ("2.22.0", False),
        ("4.0.0", False),
        ("", False),
    ],
)
def test_only_for_versions_whose_format_is_known(version, is_known):
    assert views.is_known_version(version) is is_known


def test_the_view_of_phases_begins_with_score_gain_epochs_and_data():
    columns = views.phases_view().state["columnOrder"]
    assert [c.split("`")[1] for c in columns[:5]] == [
        "best/val_top1",
        "best/gain",
        "best/epoch",
        "epochs",
        "dataset",
    ]
    assert set(columns) == set(views.phases_view().state["selectedColumns"])


def test_a_sweep_shows_all_trials_and_has_a_view_of_the_finished_ones():
    every, finished = (
        views.sweep_view("s", ["lr"]),
        views.sweep_view("s", ["lr"], finished_only=True),
    )
    assert (every.name, finished.name) == ("Sweep s", "Sweep s, finished trials")
    assert every.key != finished.key
    assert "outcome" not in every.state["searchFilter"]
    assert "outcome = 'completed'" in finished.state["searchFilter"]


def test_views_of_older_versions_that_are_now_one_are_removed(store, mlflow):
    experiment = mlflow.create_experiment("e")
    old = views.TAG + views.OBSOLETE[0]
    mlflow.set_experiment_tag(experiment, old, "{}")
    views.save(mlflow, experiment, views.phases_view())
    assert old not in mlflow.get_experiment(experiment).tags
