"""Runs reach MLflow whole, once and with the right end; failing servers cost nothing but time.

Tests of tracking, tracked_run, delivery_thread, logged_model and writer.
"""

import json
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ftlib.config import Track
from ftlib.track import journal
from ftlib.track import tracking as tracking_module
from ftlib.track.journal import journal_file
from ftlib.track.leftovers import deliver_folder, describe, journal_folders, requeue_folder
from ftlib.track.store import TrackingError, client
from ftlib.track.tracking import open_tracking
from ftlib.track.views import TAG, phases_view

ROOT = Path(__file__).parents[2]


def opened(uri, folder, experiment="e", **track):
    return open_tracking(Track(uri=uri, **track), experiment=experiment, journal_dir=folder)


def history(mlflow, run_id, key):
    return [(m.step, m.value) for m in mlflow.get_metric_history(run_id, key)]


def by_name(mlflow, experiment, name):
    found = mlflow.search_runs(
        [mlflow.get_experiment_by_name(experiment).experiment_id],
        filter_string=f"attributes.run_name = '{name}'",
    )
    return found


# --- one run on SQLite ----------------------------------------------------------------------------


def test_everything_of_a_run_arrives(store, mlflow, tmp_path):
    (tmp_path / "figure.png").write_bytes(b"png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").write_text("x")
    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run(
            "phase2",
            tags={"kind": "train", "db": "postgresql://u:hunter2@h/d"},
            params={"lr": 1e-3, "dropout": 0.0, "api_token": "abc"},
        )
        writer = run.writer()
        for epoch in range(1, 31):
            writer.metrics({"train/loss": 1 / epoch, "val/top1": 60 + epoch, "bad": "text"}, epoch)
        writer.metrics({"nan": float("nan"), "inf": float("inf")}, 1)
        writer.params({"late": 1})
        writer.tags({"stage": "phase2", "left out": None})
        writer.json({"run": {"password": "hunter2", "lr": 1}}, "run.json")
        writer.artifact(tmp_path / "figure.png", "figures")
        (tmp_path / "figure.png").unlink()
        writer.artifact(tmp_path / "folder", "more")
        writer.dataset("digits", "d" * 64, "/data/digits", "training")
        run.save_view(phases_view())
        assert run.finish("completed", note="**97 %**")
        run_id, link = run.run_id, run.view_link(phases_view())
    got = mlflow.get_run(run_id)
    assert got.info.status == "FINISHED" and got.info.run_name == "phase2"
    assert got.data.params == {"lr": "0.001", "dropout": "0.0", "late": "1", "api_token": "***"}
    assert (
        got.data.tags["db"] == "postgresql://u:***@h/d"
        and got.data.tags["stage"] == "phase2"
        and got.data.tags["outcome"] == "completed"
    )
    assert got.data.tags["mlflow.note.content"] == "**97 %**" and "left out" not in got.data.tags
    assert history(mlflow, run_id, "val/top1") == [(e, 60 + e) for e in range(1, 31)]
    assert "bad" not in got.data.metrics and {"nan", "inf"} <= set(got.data.metrics)
    assert {
        a.path for folder in ("", "figures", "more") for a in mlflow.list_artifacts(run_id, folder)
    } >= {"run.json", "figures/figure.png", "more/x.txt"}
    assert (
        "hunter2"
        not in Path(mlflow.download_artifacts(run_id, "run.json", str(tmp_path))).read_text()
    )
    assert got.inputs.dataset_inputs[0].dataset.name == "digits"
    assert (
        TAG + "ftlib-phases" in mlflow.get_experiment(got.info.experiment_id).tags
        and "viewStateShareKey=ftlib-phases" in link
        and "workflowType=machine_learning" in link
    )
    assert "hunter2" not in journal_file(tmp_path / "journal", "phase2").read_text()


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("completed", "FINISHED"), ("pruned", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")],
)
def test_outcomes(store, mlflow, tmp_path, outcome, status):
    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={})
        assert run.finish(outcome, note="ValueError: bad\nmore")
        got = mlflow.get_run(run.run_id)
    assert (got.info.status, got.data.tags["outcome"]) == (status, outcome)
    assert (got.data.tags.get("reason") == "ValueError: bad") == (outcome != "completed")


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED"), (RuntimeError("no"), "FAILED")],
)
def test_a_run_left_open_is_ended_when_tracking_closes(store, mlflow, tmp_path, error, status):
    with pytest.raises(type(error)), opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={})
        run_id = run.run_id
        raise error
    assert mlflow.get_run(run_id).info.status == status


def test_a_restart_continues_the_same_run_by_name_or_by_id(store, mlflow, tmp_path):
    ids = []
    for attempt in range(3):
        folder = tmp_path / ("journal" if attempt < 2 else "another")
        with opened(store, folder) as tracking:
            run = tracking.start_run(
                "r",
                tags={"kind": "train"},
                params={"lr": 1},
                run_id=ids[0] if attempt == 2 else None,
            )
            assert mlflow.get_run(run.run_id).info.status == "RUNNING" or run.finish("failed")
            run.writer().metrics({"m": attempt}, attempt)
            run.finish("failed" if attempt < 2 else "completed", note="the reason")
            ids.append(run.run_id)
    assert len(set(ids)) == 1 and len(by_name(mlflow, "e", "r")) == 1
    got = mlflow.get_run(ids[0])
    assert got.info.status == "FINISHED" and got.data.tags["outcome"] == "completed"
    assert "reason" not in got.data.tags
    assert history(mlflow, ids[0], "m") == [(0, 0), (1, 1), (2, 2)]


def test_a_run_deleted_in_the_ui_is_made_again_from_its_journal(store, mlflow, tmp_path):
    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        run.writer().metrics({"m": 5}, 1)
        run.finish("failed")
        old = run.run_id
    mlflow.delete_run(old)
    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1}, run_id=old)
        run.writer().metrics({"m": 6}, 2)
        run.finish("completed")
        assert run.run_id != old and history(mlflow, run.run_id, "m") == [(1, 5), (2, 6)]


def test_delivering_twice_changes_nothing(store, mlflow, tmp_path):
    folder = tmp_path / "journal"
    with opened(store, folder) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        for step in range(50):
            run.writer().metrics({"m": step, "n": 2 * step}, step)
        run.finish("completed")
        run_id = run.run_id
    path = journal_file(folder, "r")
    journal.state_file(path).unlink()
    assert deliver_folder(folder, store, mlflow) == ["r"]
    assert len(by_name(mlflow, "e", "r")) == 1 and len(history(mlflow, run_id, "m")) == 50
    assert mlflow.get_run(run_id).info.status == "FINISHED"


def test_a_record_that_mlflow_never_takes_is_put_aside_and_the_rest_arrives(
    store, mlflow, tmp_path
):
    folder = tmp_path / "journal"
    with opened(store, folder) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        run.writer().params({"lr": 2, "fine": 3})
        run.writer().metrics({"good": 1, "bad@#key": 2, "also/good": 3}, 1)
        run.writer().artifact(tmp_path / "not there")
        assert run.finish("completed")
        got = mlflow.get_run(run.run_id)
    assert (
        got.data.params == {"lr": "1", "fine": "3"}
        and set(got.data.metrics) == {"good", "also/good"}
        and got.info.status == "FINISHED"
    )
    path = journal_file(folder, "r")
    assert describe(path).rejected == 3
    (tmp_path / "not there").write_text("late")
    assert requeue_folder(folder) == 3
    deliver_folder(folder, store, mlflow)
    assert [a.path for a in mlflow.list_artifacts(got.info.run_id)] == ["not there"]


def test_parent_and_children_from_other_processes_and_orphans(store, mlflow, tmp_path):
    with opened(store, tmp_path / "journal") as tracking:
        parent = tracking.start_run("sweep s", tags={"kind": "sweep"}, params={})
        handle = pickle.loads(pickle.dumps(tracking.handle()))
        child = handle.start_run(
            "t00",
            tags={"kind": "trial"},
            params={"lr": 2},
            parent=parent.reference,
            wait_seconds=10,
        )
        assert child.run_id
        child.writer().metrics({"m": 1}, 1)
        child.finish("pruned", "stopped by ASHA")
        handle.start_run("t01", tags={"kind": "trial"}, params={}, parent=parent.reference)
        tracking.end_orphan("t01", "failed", "the worker died")
        tracking.end_orphan("t00", "failed")
        parent.finish("completed")
    runs = {r.info.run_name: r for r in mlflow.search_runs([parent.experiment_id])}
    assert {n: (r.info.status, r.data.tags["outcome"]) for n, r in runs.items()} == {
        "sweep s": ("FINISHED", "completed"),
        "t00": ("FINISHED", "pruned"),
        "t01": ("FAILED", "failed"),
    }
    assert (
        runs["t00"].data.tags["mlflow.parentRunId"]
        == runs["t01"].data.tags["mlflow.parentRunId"]
        == parent.run_id
    )


def test_logged_model_carries_metrics_and_alias(store, mlflow, tmp_path):
    from mlflow.models import Model

    def package(folder):
        folder.mkdir()
        (folder / "weights").write_bytes(b"w" * 10)
        Model(flavors={"python_function": {"loader_module": "json"}}).save(str(folder / "MLmodel"))

    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        run.writer().metrics({"val/top1": 60.0}, 1)
        run.writer().metrics({"val/top1": 70.0}, 2)
        run.writer().metrics({"best/val_top1": 70.0}, 0)
        run.log_model(
            package, name="classifier", registered_name="digits", alias="challenger", step=2
        )
        run.log_model(tmp_path / "nothing", name="missing")  # warns, does not raise
        assert run.finish("completed")
    path = journal_file(tmp_path / "journal", "r")
    journal.state_file(path).unlink()
    deliver_folder(tmp_path / "journal", store, mlflow)  # again
    models = mlflow.search_logged_models([run.experiment_id])
    assert (
        len(models) == 1
        and str(models[0].status) == "READY"
        and models[0].source_run_id == run.run_id
    )
    assert {(m.key, m.value) for m in models[0].metrics} == {
        ("val/top1", 70.0),
        ("best/val_top1", 70.0),
    }
    version = mlflow.get_model_version_by_alias("digits", "challenger")
    assert (
        version.run_id == run.run_id and len(mlflow.search_model_versions("name = 'digits'")) == 1
    )
    local = Path(models[0].artifact_location.removeprefix("file://"))
    assert (
        Model.load(str(local)).model_id == models[0].model_id
        and (local / "weights").read_bytes() == b"w" * 10
    )


# --- a server, and what can happen to it ----------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")


def test_a_dead_server_fails_a_first_launch_at_once_with_what_to_do(tmp_path):
    with pytest.raises(TrackingError, match=r"cannot be reached.*track\.uri.*--track\.offline"):
        opened("http://127.0.0.1:9", tmp_path / "journal")
    assert journal.acquire(tmp_path / "journal")
    journal.release(tmp_path / "journal")


@pytest.mark.parametrize("mode", ["hang", "error"])
def test_a_hanging_or_failing_server_fails_a_first_launch(proxy, tmp_path, quick, mode):
    client(proxy.uri)
    proxy.mode = mode
    with pytest.raises(TrackingError, match=r"cannot be reached.*--track\.offline"):
        opened(proxy.uri, tmp_path / "journal")


def test_offline_starts_on_the_journal_and_the_run_is_made_when_delivered(
    server, tmp_path, experiment, monkeypatch
):
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 1.0)
    dead = "http://127.0.0.1:9"
    folder = tmp_path / "journal"
    with opened(dead, folder, experiment, offline=True) as tracking:
        parent = tracking.start_run("parent", tags={}, params={})
        run = tracking.start_run(
            "r", tags={"kind": "train"}, params={"lr": 1}, parent=parent.reference
        )
        for step in range(20):
            run.writer().metrics({"m": step}, step)
        run.writer().text("hello", "note.txt")
        assert (run.run_id, run.url) == ("", "")
        assert not run.finish("completed", note="done")
        parent.finish("completed")
    mlflow = client(server.uri)
    assert deliver_folder(folder, server.uri, mlflow) == []  # it was meant for another server
    assert sorted(deliver_folder(folder, server.uri, mlflow, any_uri=True)) == ["parent", "r"]
    (got,), (above,) = by_name(mlflow, experiment, "r"), by_name(mlflow, experiment, "parent")
    assert (
        got.info.status == "FINISHED"
        and got.data.params == {"lr": "1"}
        and got.data.tags["mlflow.parentRunId"] == above.info.run_id
    )
    assert history(mlflow, got.info.run_id, "m") == [(s, s) for s in range(20)]
    recorded = next(r["t"] for r, _ in journal.read(journal_file(folder, "r")))
    assert got.info.start_time == recorded
    assert [a.path for a in mlflow.list_artifacts(got.info.run_id)] == ["note.txt"]
    assert deliver_folder(folder, server.uri, mlflow, any_uri=True) == []


@pytest.mark.parametrize("mode", ["error", "hang", "slow"])
def test_a_server_that_fails_in_the_middle_delays_little_and_loses_nothing(
    proxy, server, tmp_path, experiment, quick, mode, monkeypatch
):
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 3.0)
    folder = tmp_path / "journal"
    with opened(proxy.uri, folder, experiment) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        writer = run.writer()
        for step in range(300):
            if step == 100:
                proxy.mode = mode
            writer.metrics({"train/loss": step / 7, "val/top1": step}, step)
            if step % 100 == 0:
                time.sleep(0.6)
        records = [r for r, _ in journal.read(run.path, 0, 1 << 30) if r["op"] == "metrics"]
        assert len(records) == 300  # nothing waited for the server, which is still failing
        run.finish("completed")
    proxy.mode = "pass"
    mlflow = client(server.uri)
    deliver_folder(folder, proxy.uri, client(proxy.uri))
    (got,) = by_name(mlflow, experiment, "r")
    assert got.info.status == "FINISHED"
    assert history(mlflow, got.info.run_id, "val/top1") == [(s, s) for s in range(300)]


def test_a_server_killed_in_the_middle_gets_everything_when_it_is_back(
    server, tmp_path, experiment, monkeypatch
):
    with opened(server.uri, tmp_path / "journal", experiment) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        writer = run.writer()
        for step in range(200):
            if step == 60:
                time.sleep(1)  # some points arrive before
                server.kill()
            writer.metrics({"m": step}, step)
            time.sleep(0.005)
        server.start()
        tracking._finish_left = 60
        assert run.finish("completed")
        mlflow = client(server.uri)
        assert history(mlflow, run.run_id, "m") == [(s, s) for s in range(200)]
        assert mlflow.get_run(run.run_id).info.status == "FINISHED"


def test_a_restart_with_a_dead_server_starts_at_once(
    proxy, server, tmp_path, experiment, quick, monkeypatch
):
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 1.0)
    folder = tmp_path / "journal"
    with opened(proxy.uri, folder, experiment) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        first_id = run.run_id
        run.finish("killed")
    proxy.mode = "error"
    with opened(proxy.uri, folder, experiment) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1}, run_id=first_id)
        run.writer().metrics({"m": 1}, 1)
        assert run.run_id == first_id
        run.finish("completed")
    proxy.mode = "pass"
    other = tmp_path / "runs" / "b" / "journal"
    folder.rename(tmp_path / "moved")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "runs" / "a" / "journal")
    with opened(
        proxy.uri, other, experiment
    ) as tracking:  # the next start of any run delivers what is left
        tracking.start_run("b", tags={}, params={}).finish("completed")
        deadline = time.monotonic() + 15
        while (
            time.monotonic() < deadline
            and client(server.uri).get_run(first_id).info.status != "FINISHED"
        ):
            time.sleep(0.2)
    got = client(server.uri).get_run(first_id)
    assert got.info.status == "FINISHED" and got.data.metrics == {"m": 1.0}


# --- drivers that die -----------------------------------------------------------------------------

DRIVER = """
import sys, time
from pathlib import Path
from ftlib.config import Track
from ftlib.track.tracking import open_tracking
tracking = open_tracking(Track(uri=sys.argv[1]), experiment="e", journal_dir=Path(sys.argv[2]))
run = tracking.start_run("r", tags={}, params={})
print(run.run_id, flush=True)
for step in range(100000):
    run.writer().metrics({"m": step}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""


def test_kill_9_of_the_driver_loses_nothing_and_leaves_no_running_run(store, mlflow, tmp_path):
    folder = tmp_path / "runs" / "a" / "journal"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, store, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    run_id = process.stdout.readline().strip()
    last = -1
    for line in process.stdout:
        last = int(line)
        if last >= 400:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    with opened(store, tmp_path / "runs" / "b" / "journal") as tracking:
        tracking.start_run("other", tags={}, params={})
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and mlflow.get_run(run_id).info.status == "RUNNING":
            time.sleep(0.1)
    got = mlflow.get_run(run_id)
    assert got.info.status == "KILLED" and got.data.tags["outcome"] == "killed"
    assert history(mlflow, run_id, "m")[: last + 1] == [(s, s) for s in range(last + 1)]
    with opened(store, folder) as tracking:  # and the run itself can still be continued
        run = tracking.start_run("r", tags={}, params={})
        run.writer().metrics({"m": -1}, 10**6)
        run.finish("completed")
        assert run.run_id == run_id
    got = mlflow.get_run(run_id)
    assert (got.info.status, got.data.tags["outcome"]) == ("FINISHED", "completed")


def test_a_journal_folder_serves_one_driver(store, tmp_path):
    with opened(store, tmp_path / "journal"), pytest.raises(TrackingError, match="another process"):
        opened(store, tmp_path / "journal")


def test_journal_folders_are_found_below_a_home(store, tmp_path):
    for name in ("a", "b"):
        with opened(store, tmp_path / "home" / "runs" / name / "journal") as tracking:
            tracking.start_run(name, tags={}, params={}).finish("completed")
    (tmp_path / "home" / "runs" / "a" / "other.jsonl").write_text(json.dumps({"x": 1}) + "\n")
    assert [f.parent.name for f in journal_folders(tmp_path / "home")] == ["a", "b"]


# --- the writer -----------------------------------------------------------------------------------


def test_a_writer_never_raises(store, tmp_path, caplog):
    with opened(store, tmp_path / "journal") as tracking:
        run = tracking.start_run("r", tags={}, params={})
        writer = pickle.loads(pickle.dumps(run.writer()))
        writer.metrics({f"train/m{i}": 0.5 for i in range(6)}, 1)
        writer.metrics({"x": object()}, 1)
        writer.metrics(None, 1)
        writer.artifact("/no/such/file")
        writer.tags({"deep": {"api_key": "x"}})
        lost = replace(writer, location=replace(writer.location, machine="elsewhere"))
        lost.metrics({"m": 1}, 1)
        assert "training goes on" in caplog.text and "another machine" in caplog.text
        run.finish("completed")


# --- a server with a login, and many runs at once -------------------------------------------------


def test_a_wrong_login_is_refused_at_launch_with_the_variables_to_set(
    proxy, tmp_path, quick, monkeypatch, experiment
):
    proxy.mode = "auth"
    for user, password in (("", ""), ("me", "wrong")):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        with pytest.raises(
            TrackingError, match=r"refuses access.*MLFLOW_TRACKING_USERNAME"
        ) as error:
            opened(proxy.uri, tmp_path / "journal", experiment)
        assert "wrong" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("where", ["environment", "address"])
def test_a_right_login_tracks_the_run_and_leaves_no_password_behind(
    proxy, server, tmp_path, quick, monkeypatch, experiment, where
):
    proxy.mode = "auth"
    uri = proxy.uri
    if where == "address":
        uri = uri.replace("http://", "http://me:s3same@")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3same")
    with opened(uri, tmp_path / "journal", experiment) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        run.writer().metrics({"m": 1}, 1)
        assert run.finish("completed") and "s3same" not in run.uri + run.url
    (got,) = by_name(client(server.uri), experiment, "r")
    assert got.info.status == "FINISHED" and got.data.metrics == {"m": 1.0}
    assert not [f for f in (tmp_path / "journal").rglob("*.json*") if "s3same" in f.read_text()]


EIGHTH = """
import sys
from pathlib import Path
from ftlib.config import Track
from ftlib.track.tracking import open_tracking
name = sys.argv[1]
folder = Path(sys.argv[2]) / name / "journal"
with open_tracking(Track(), experiment="e", journal_dir=folder) as tracking:
    run = tracking.start_run(name, tags={}, params={"lr": 1})
    for step in range(300):
        run.writer().metrics({"a": step, "b": 2 * step}, step)
    assert run.finish("completed")
"""


@pytest.mark.slow
def test_eight_runs_at_once_on_a_new_sqlite_store_all_arrive(home):
    """They also make the store together."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EIGHTH, f"r{number}", str(home / "runs")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [p.returncode for p in processes] == [0] * 8 and errors == [""] * 8
    mlflow = client(f"sqlite:///{home / 'mlflow.db'}")
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("e").experiment_id])
    assert sorted(r.info.run_name for r in runs) == [f"r{number}" for number in range(8)]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert sorted(history(mlflow, run.info.run_id, "b")) == [(s, 2.0 * s) for s in range(300)]
