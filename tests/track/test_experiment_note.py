"""An experiment's note names its best run, and a person's own note stays."""

from ftlib.track import experiment_note
from ftlib.track.store import NOTE_TAG, ensure_experiment


def note(mlflow, experiment):
    return mlflow.get_experiment(experiment).tags[NOTE_TAG]


def test_the_first_line_says_the_best_result_and_leads_to_its_report(store, mlflow, tmp_path):
    (tmp_path / "report.html").write_text("<h1>Report</h1>")
    experiment = ensure_experiment(mlflow, "pets", store)
    assert not experiment_note.update(mlflow, experiment)  # nothing is finished
    ids = {}
    scores = {"probe": 70.0, "train": 80.0, "trial": 99.0}
    for kind, score in scores.items():
        ids[kind] = mlflow.create_run(experiment, tags={"kind": kind}, run_name=kind).info.run_id
        mlflow.log_metric(ids[kind], "best/val_top1", score)
        mlflow.log_artifact(ids[kind], str(tmp_path / "report.html"), "report")
        if kind == "probe":
            assert experiment_note.update(mlflow, experiment)
            assert "**Best: 70.00 %**, [probe]" in note(mlflow, experiment)
    mlflow.create_run(experiment, tags={"kind": "train"})  # it has no score yet
    assert experiment_note.update(mlflow, experiment)
    first = note(mlflow, experiment).splitlines()[0]
    assert first.startswith(f"**Best: 80.00 %**, [train](#/experiments/{experiment}/runs/")
    assert f"[Report](#/experiments/{experiment}/runs/{ids['train']}/artifacts/report/" in first
    assert "[Charts of all runs](#/experiments/" in first
    assert not experiment_note.update(mlflow, experiment)  # nothing is new


def test_a_note_that_a_person_wrote_stays(store, mlflow):
    experiment = ensure_experiment(mlflow, "pets", store)
    run = mlflow.create_run(experiment, tags={"kind": "train"}).info.run_id
    mlflow.log_metric(run, "best/val_top1", 80.0)
    assert experiment_note.update(mlflow, experiment)
    mlflow.set_experiment_tag(experiment, NOTE_TAG, "mine")
    mlflow.log_metric(run, "best/val_top1", 81.0)
    assert not experiment_note.update(mlflow, experiment)
    assert note(mlflow, experiment) == "mine"
