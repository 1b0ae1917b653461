import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from ftlib.launch.errors import LeaseLostError
from ftlib.settings import ConfigError
from ftlib.tune import trial_store
from ftlib.tune.trial_store import Trial, TrialStore

ROOT = str(Path(__file__).resolve().parents[2])


def test_what_is_written_is_read(tmp_path):
    store = TrialStore(str(tmp_path), "s")
    assert not store.open({"recipe": {"a": 1}}, {"kind": "sweep"})
    for n in range(12):
        store.add(Trial(n, {"model.dropout": n / 100}, "tpe"))
    store.trials[3].record({"epoch": 1, "score": 50.0})
    store.trials[3].outcome = "completed"
    store.save(store.trials[3])
    again = TrialStore(str(tmp_path), "s")
    assert again.open({"recipe": {"a": 1}}, {})
    assert again.trials == store.trials and again.about["proposed"] == 12
    assert [t.number for t in again.done()] == [3] and len(again.open_trials()) == 11


def test_a_sweep_that_was_moved_finds_the_runs_of_its_trials(tmp_path):
    store = TrialStore(str(tmp_path / "old"), "s")
    store.open({}, {})
    run_dir = f"{store.trials_root()}/t00"
    store.add(Trial(0, {}, "recipe", "completed", result={"run_dir": run_dir}))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = TrialStore(str(tmp_path / "new"), "s")
    assert moved.read()
    assert moved.trials[0].result["run_dir"] == str(tmp_path / "new/s/trials/t00")


def test_a_trial_whose_number_was_not_committed_is_not_there(tmp_path):
    store = TrialStore(str(tmp_path), "s")
    store.open({}, {})
    store.save(Trial(0, {}, "recipe"))  # the crash came before sweep.json
    again = TrialStore(str(tmp_path), "s")
    again.open({}, {})
    assert again.trials == {} and again.about["proposed"] == 0


def test_a_name_taken_by_another_sweep_is_refused_with_what_differs(tmp_path):
    TrialStore(str(tmp_path), "s").open(
        {
            "recipe": {"train.epochs": 9, "data.mean": (0.1, 0.2)},
            "space": {"model.dropout": "0 to 1"},
        },
        {"kind": "sweep"},
    )
    TrialStore(str(tmp_path), "s").open(
        {
            "recipe": {"train.epochs": 9, "data.mean": (0.1, 0.2)},
            "space": {"model.dropout": "0 to 1"},
        },
        {"kind": "sweep"},
    )
    with pytest.raises(
        ConfigError,
        match=r"the name s is taken by another sweep(.|\n)*recipe.train.epochs is 9 there, 10 here"
        r"(.|\n)*space.model.dropout(.|\n)*another --name",
    ):
        TrialStore(str(tmp_path), "s").open(
            {"recipe": {"train.epochs": 10, "data.mean": (0.1, 0.2)}, "space": {}}, {}
        )


def test_an_epoch_run_again_replaces_the_first():
    t = Trial(0, {}, "recipe")
    for epoch, score in [(1, 10), (2, 20), (3, 30), (2, 21), (3, 25)]:
        t.record({"epoch": epoch, "score": score, "seconds": 2.0})
    assert [(p["epoch"], p["score"]) for p in t.history] == [(1, 10), (2, 21), (3, 25)]
    assert (t.score, t.epoch, t.seconds) == (25, 3, 6.0)


def test_two_drivers_cannot_run_one_sweep_and_a_killed_one_lets_go(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from ftlib.tune.trial_store import TrialStore
with TrialStore({str(tmp_path)!r}, "s").lock():
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"s is running already .process {other.pid} on"),
            TrialStore(str(tmp_path), "s").lock(),
        ):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with TrialStore(str(tmp_path), "s").lock():
        pass


def test_a_driver_that_lost_its_lock_cannot_damage_its_successor(tmp_path, monkeypatch):
    """A file system whose locks end while their holder is paused: the second driver goes on with
    the trial, and what the first one still writes is refused."""
    monkeypatch.setattr(trial_store, "FileLock", mock.MagicMock())
    first, second = (TrialStore(str(tmp_path), "s") for _ in range(2))
    with first.lock(), second.lock():
        first.open({}, {})
        first.add(Trial(0, {}, "recipe"))
        second.open({}, {})
        trial = second.trials[0]
        trial.outcome = "completed"
        second.save(trial)
        first.trials[0].outcome = "failed"
        for write in (
            lambda: first.save(first.trials[0]),
            lambda: first.add(Trial(1, {}, "tpe")),
            lambda: first.save_about(sentence="late"),
        ):
            with pytest.raises(LeaseLostError, match="s does not belong to this process any more"):
                write()
        second.save_about(sentence="right")
    found = TrialStore(str(tmp_path), "s")
    assert found.read() and found.trials == {0: trial} and found.about["sentence"] == "right"


def test_a_store_of_a_newer_ftlib_is_refused(tmp_path):
    store = TrialStore(str(tmp_path), "s")
    store.open({}, {})
    store.save_about(schema=99)
    with pytest.raises(ConfigError, match="newer ftlib"):
        TrialStore(str(tmp_path), "s").read()
