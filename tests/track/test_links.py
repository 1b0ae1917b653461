"""Links open the pages for training and hold on any host; commands hide passwords."""

from ftlib.track.links import (
    absolute,
    artifact_page,
    experiment_page,
    opened_by,
    place_lines,
    run_page,
    ui_base,
    ui_command,
)
from ftlib.track.redact import redact_address
from ftlib.track.store import resolve_uri


def test_links_open_the_pages_for_training_and_hide_passwords():
    assert (
        absolute("http://u:pw@h:5000", experiment_page("3", "ftlib-phases"))
        == "http://h:5000/#/experiments/3/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART&viewStateShareKey=ftlib-phases"
    )
    assert (
        absolute("sqlite:////x.db", run_page("3", "abc"))
        == "http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    )
    assert ui_command("https://u:pw@h") == "open https://h"
    command = ui_command("sqlite:////x y/mlflow.db")
    assert (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in command
        and "'sqlite:////x y/mlflow.db'" in command
    )
    assert "pw" not in ui_command("postgresql://u:pw@h/d")


def test_pages_for_notes_name_no_host_and_carry_the_workflow():
    pages = (
        run_page("3", "abc"),
        run_page("3", "abc", "model-metrics"),
        artifact_page("3", "abc", "report/report ü.html"),
        experiment_page("3", "ftlib-phases"),
    )
    for page in pages:
        assert page.startswith("#/experiments/3/") and "workflowType=machine_learning" in page
    assert "report/report%20%C3%BC.html" in pages[2] and "/model-metrics?" in pages[1]


def test_places_are_lined_up_and_those_without_an_address_left_out():
    places = {"kept in": "/runs/x", "MLflow": "", "best model": "/runs/x/best"}
    assert place_lines(places, "track ui") == [
        "  kept in     /runs/x",
        "  best model  /runs/x/best",
        "  start UI    track ui",
    ]
    assert place_lines({"MLflow": "http://h/#/x"}, "") == ["  MLflow      http://h/#/x"]


def test_services_without_a_known_ui_have_no_address():
    assert ui_base("databricks") == "" and absolute("databricks", run_page("3", "abc")) == ""
    assert ui_base("arn:aws:sagemaker:us-east-1:1:mlflow-tracking-server/x") == ""


def test_only_a_store_without_a_server_is_said_to_need_one(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert opened_by(resolve_uri()).endswith("track.py ui")
    assert opened_by("sqlite:////x y.db").endswith("track.py ui --uri 'sqlite:////x y.db'")
    assert opened_by("http://127.0.0.1:5000") == opened_by("databricks") == ""  # --track.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert opened_by("http://127.0.0.1:5000") == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:pw@h/d")
    assert opened_by(redact_address("postgresql://u:pw@h/d")).endswith("track.py ui")
