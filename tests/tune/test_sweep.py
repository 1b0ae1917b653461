"""Holds the tests of sweep.py, ray_tune.py, trial_runs.py and resources.py.

Whole sweeps with real Ray Tune and a fake training function: killed, stopped, failing, extended.
"""

import gc
import io
import json
import os
import signal
import sqlite3
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import psutil
import pytest

from ftlib.config import Cluster, Data, Mix, Run, Train
from ftlib.launch.cluster import Capacity, Node
from ftlib.launch.errors import LaunchError
from ftlib.report.html import Markup
from ftlib.settings import ConfigError, from_json, override
from ftlib.storage import StorageError
from ftlib.tune import figures, ray_tune, spaces
from ftlib.tune import sweep as sweeps
from ftlib.tune.budget import TimeBudget
from ftlib.tune.ray_tune import TrialEnd
from ftlib.tune.resources import TrialResources, allocate
from ftlib.tune.sweep import Sweep
from ftlib.tune.train_trial import SweepInputs
from ftlib.tune.trial_runs import Hooks, TrialGroup, TrialTracker
from ftlib.tune.trial_store import Trial, TrialStore, leaf_defaults
from ftlib.tune.tuning_split import TuningSplit
from tests.columns import too_wide
from tests.failing_writes import FailingWrites, whole


def wait(process, driver, seconds=240):
    try:
        process.wait(seconds)
    except Exception:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(driver.output()[-3000:]) from None
    return driver.output()


def first_epoch(process, driver):
    """Wait for the first epoch of a trial."""
    deadline = time.monotonic() + 200
    while not any(line[0] == "epoch" for line in driver.log()):
        assert process.poll() is None and time.monotonic() < deadline, driver.output()
        time.sleep(0.1)


def store_of(home, name="regularisation-phase2"):
    store = TrialStore(str(home / "runs"), name)
    assert store.read()
    return store


def mlflow_runs(home):
    """name -> (status, tags)."""
    with sqlite3.connect(home / "mlflow.db") as db:
        runs = db.execute("select run_uuid, name, status from runs").fetchall()
        return {
            name: (
                status,
                dict(db.execute("select key, value from tags where run_uuid = ?", (i,)).fetchall()),
            )
            for i, name, status in runs
        }


def kill_tree(process):
    """kill -9 of the driver alone, as the kernel would; what it started must go by itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return children


def gone(processes, seconds=60):
    _, alive = psutil.wait_procs(processes, seconds)
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_sweep_with_stopped_failing_and_dying_trials(driver, home):
    process = driver.start(trials=9, epochs=3, seconds=0.05, fails=4, dies=6)
    children = []
    while process.poll() is None:
        children = (
            {
                c.pid: c for c in [*children, *psutil.Process(process.pid).children(recursive=True)]
            }.values()
            if process.poll() is None
            else children
        )
        time.sleep(1)
    out = wait(process, driver)
    assert process.returncode == 0, out
    assert "PLACEMENT GROUPS LEFT 0" in out and "FINISHED True" in out
    assert all("(raylet)" in line for line in too_wide(out))  # Ray's own words
    assert not gone(list(children)), "processes were left behind"

    trials = store_of(home).trials
    assert sorted(trials) == list(range(9)) and all(t.outcome for t in trials.values())
    assert trials[0].outcome == "completed" and trials[0].origin == "recipe"
    assert (trials[4].outcome, trials[4].reason) == (
        "failed",
        "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
    )
    assert trials[6].outcome == "failed" and "died 3 times" in trials[6].reason
    assert any(t.outcome == "pruned" for t in trials.values())
    starts = [line[1] for line in driver.log() if line[0] == "start"]
    assert all(starts.count(str(n)) == (3 if n == 6 else 1) for n in range(9)), starts

    runs = mlflow_runs(home)
    assert "RUNNING" not in {status for status, _ in runs.values()}, runs
    assert sum(tags.get("kind") == "trial" for _, tags in runs.values()) == 9
    parent_status, parent = runs["sweep regularisation-phase2"]
    assert (
        parent_status == "FINISHED"
        and parent["kind"] == "sweep"
        and parent["mlflow.note.content"].startswith("**")
    )
    outcome = {
        tags["trial"]: tags["outcome"] for _, tags in runs.values() if tags.get("kind") == "trial"
    }
    assert outcome == {t.name: t.outcome for t in trials.values()}
    failed = next(tags for _, tags in runs.values() if tags.get("trial") == "t04")
    assert "out of memory" in failed["reason"]

    report = home / "runs" / "regularisation-phase2" / "report"
    page = (report / "index.html").read_text()
    assert "tuning split" in page and "out of memory" in page
    assert (home / "runs" / "regularisation-phase2" / "optuna.journal").exists()
    best = from_json(Run, (report / "best.json").read_text())
    assert best.data.tuning_fraction == 0 and best.train.epochs == 3

    process = driver.start(trials=9, epochs=3, seconds=0.05)
    assert "FINISHED True" in wait(process, driver)
    assert len([line for line in driver.log() if line[0] == "start"]) == len(starts), (
        "a finished sweep runs nothing again"
    )
    process = driver.start(trials=9, epochs=4)
    assert (
        "recipe.train.epochs is 3 there, 4 here" in wait(process, driver)
        and process.returncode == 2
    )


@pytest.mark.slow
def test_a_driver_killed_twice_goes_on_and_runs_each_trial_once(driver, home):
    for kill in range(2):
        process = driver.start(trials=8, epochs=4, seconds=0.7, asha=False)
        seen = len(driver.log())
        deadline = time.monotonic() + 200
        while (
            not (
                len(log := driver.log()) >= seen + 6
                and log[-1][0] == "epoch"
                and log[-1][2] in "123"
            )
            and time.monotonic() < deadline
        ):
            assert process.poll() is None, driver.output()
            time.sleep(0.1)
        left = gone(kill_tree(process), 90)
        assert not left, f"kill {kill}: {left}"
    done = [t.number for t in store_of(home).done()]
    process = driver.start(trials=10, epochs=4, seconds=0.1, asha=False)
    out = wait(process, driver)
    assert "FINISHED True" in out, out
    trials = store_of(home).trials
    assert sorted(trials) == list(range(10)) and {t.outcome for t in trials.values()} == {
        "completed"
    }
    log = driver.log()
    ends = [line[1] for line in log if line[0] == "end"]
    found = {
        line[1] for line in log if line[0] == "found"
    }  # killed after its last epoch: a restart finds it finished and trains nothing
    assert len(ends) == len(set(ends)) and {int(n) for n in {*ends, *found}} == set(range(10)), (
        "each trial ended exactly once"
    )
    epochs = [tuple(line[1:3]) for line in log if line[0] == "epoch"]
    assert len(epochs) == len(set(epochs)), "no epoch was trained twice"
    assert all([p["epoch"] for p in t.history][-1] == 4 for t in trials.values())
    resumed = [line for line in log if line[0] == "start" and line[2] != "0"]
    assert resumed, "a trial that was cut off went on from its checkpoint"
    last_start = (
        max(i for i, line in enumerate(log) if line[0] == "start" and int(line[1]) in done)
        if done
        else -1
    )
    assert all(int(line[1]) not in done for line in log[last_start + 1 :] if line[0] == "start")
    runs = mlflow_runs(home)
    assert {status for status, _ in runs.values()} == {"FINISHED"}, runs
    assert sum(tags.get("kind") == "trial" for _, tags in runs.values()) == 10, (
        "a trial that went on is one run"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_sweep_whose_ray_died_says_so_ends_and_goes_on(driver, home, name):
    process = driver.start(trials=4, epochs=40, seconds=0.5, asha=False)
    first_epoch(process, driver)
    family = psutil.Process(process.pid).children(recursive=True)
    (victim,) = (p for p in family if name in p.name())
    victim.kill()
    out = wait(process, driver)
    assert process.returncode == 1 and f"error: Ray's {name} has ended while trials were" in out
    assert "Traceback" not in out and "GCS may have been killed" not in out
    assert not gone(family)
    assert "RUNNING" not in {status for status, _ in mlflow_runs(home).values()}
    assert not store_of(home).done()


@pytest.mark.slow
def test_a_sweep_that_is_stopped_while_ray_is_silent_ends_and_leaves_nothing(driver, home):
    process = driver.start(trials=3, epochs=40, seconds=0.5, asha=False)
    first_epoch(process, driver)
    family = psutil.Process(process.pid).children(recursive=True)
    for name in ("gcs_server", "raylet"):
        (silent,) = (p for p in family if name in p.name())
        silent.suspend()
    os.kill(process.pid, signal.SIGTERM)
    out = wait(process, driver)
    assert process.returncode == 143, out
    assert "because Ray does not answer" in out and "goes on with them" in out
    assert "Traceback" not in out and not gone(family)
    assert "RUNNING" not in {status for status, _ in mlflow_runs(home).values()}
    assert not store_of(home).done()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_it_goes_on(driver, home, how):
    process = driver.start(trials=6, epochs=6, seconds=0.5, asha=False)
    while len(driver.log()) < 5:
        assert process.poll() is None, driver.output()
        time.sleep(0.1)
    os.kill(process.pid, how)
    out = wait(process, driver)
    assert "FINISHED False" in out and "The same command goes on" in out, out
    runs = mlflow_runs(home)
    assert "RUNNING" not in {status for status, _ in runs.values()}, runs
    process = driver.start(trials=6, epochs=6, seconds=0.05, asha=False)
    assert "FINISHED True" in wait(process, driver)
    assert {status for status, _ in mlflow_runs(home).values()} == {"FINISHED"}


@pytest.mark.slow
def test_a_hundred_tiny_trials_each_exactly_once(driver, home):
    process = driver.start(trials=100, epochs=1, seconds=0.0, asha=False)
    while len(driver.log()) < 90:
        assert process.poll() is None, driver.output()
        time.sleep(0.1)
    kill_tree(process)
    process = driver.start(trials=100, epochs=1, seconds=0.0, asha=False)
    out = wait(process, driver, 400)
    assert "FINISHED True" in out and "PLACEMENT GROUPS LEFT 0" in out
    trials = store_of(home).trials
    assert sorted(trials) == list(range(100)) and {t.outcome for t in trials.values()} == {
        "completed"
    }
    epochs = [int(line[1]) for line in driver.log() if line[0] == "epoch"]
    assert sorted(epochs) == list(range(100)), "no epoch was trained twice"
    assert len({json.dumps(t.values, sort_keys=True) for t in trials.values()}) > 90


# --- without Ray -----------------------------------------------------------------------------

RECIPE = Run(stage="phase2", data=Data(path="x"), mix=Mix(mixup_alpha=0.2), train=Train(epochs=27))


LABELS = np.arange(1000) % 10
INPUTS = SweepInputs("set", "d", LABELS, np.zeros(1000, bool))
SPLIT = TuningSplit("reserve", 0.1, 100, 0)


def test_a_sweep_fills_in_its_name_split_and_first_rung():
    plan = Sweep(RECIPE, "jobs/phase2", spaces.load("quick"))
    assert plan.name == "quick-phase2" and plan.first_rung == 3
    data = plan.base(SPLIT).data
    assert (data.tuning_source, data.tuning_fraction) == ("reserve", 0.1)
    short = Sweep(RECIPE, "x", spaces.load("quick"), epochs=4)
    assert short.base(SPLIT).train.epochs == 4 and short.first_rung == 2
    for wrong in ({"trials": 0}, {"reduction": 1}, {"parallel": -1}):
        with pytest.raises(ConfigError):
            Sweep(RECIPE, "x", spaces.load("quick"), **wrong)


def test_more_trials_and_another_cluster_are_the_same_sweep():
    def identity(plan, inputs=INPUTS):
        return plan.identity(plan.base(SPLIT), inputs)

    plan = Sweep(RECIPE, "x", spaces.load("quick"))
    same = replace(
        plan, trials=99, parallel=3, recipe=replace(RECIPE, cluster=Cluster(workers="2"))
    )
    assert identity(same) == identity(plan)
    for other in (
        {"seed": 1},
        {"search": "random"},
        {"early_stopping": False},
        {"epochs": 3},
        {"space": spaces.load("regularisation")},
    ):
        assert identity(replace(plan, **other)) != identity(plan)
    assert identity(plan, replace(INPUTS, data_digest="e")) != identity(plan)


def test_a_sweep_of_an_earlier_version_goes_on_with_its_default_grace(tmp_path):
    plan = Sweep(RECIPE, "x", spaces.load("quick"), epochs=4)
    base = plan.base(SPLIT)
    began = replace(plan, grace=1).identity(base, INPUTS)
    TrialStore(str(tmp_path), "s").open(began, {})
    store = TrialStore(str(tmp_path), "s")
    assert sweeps._with_known_grace(plan, store).identity(base, INPUTS) == began
    assert sweeps._with_known_grace(replace(plan, grace=3), store).first_rung == 3
    assert sweeps._with_known_grace(plan, TrialStore(str(tmp_path), "new")).first_rung == 2


def test_a_sweep_of_an_earlier_version_goes_on_with_the_split_it_began_with(tmp_path):
    """Its recipe lacks settings that came later, and it scored on images of the subset."""
    plan = Sweep(RECIPE, "x", spaces.load("quick"))
    old = plan.base(TuningSplit("subset", 0.1, 100, 0))
    identity = plan.identity(old, INPUTS)
    del identity["recipe"]["data.tuning_source"], identity["recipe"]["augment.vflip"]
    about = json.loads(json.dumps(plan.about(old, INPUTS, SPLIT)))
    del about["base"]["data"]["tuning_source"]
    TrialStore(str(tmp_path), "s").open(identity, about)

    store = TrialStore(str(tmp_path), "s")
    split = sweeps._tuning_split(plan, store, replace(INPUTS, seen=np.ones(1000, bool)))
    assert (split.source, split.fraction, split.seen) == ("subset", 0.1, 100)
    base = plan.base(split)
    assert base == old
    assert store.open(plan.identity(base, INPUTS), {}, leaf_defaults(base))
    other = override(base, {"augment.vflip": 0.5})
    with pytest.raises(ConfigError, match=r"augment.vflip is 0.0 there, 0.5 here"):
        store.open(plan.identity(other, INPUTS), {}, leaf_defaults(other))


def test_a_sweep_without_time_left_starts_no_trial_and_says_so(tmp_path, monkeypatch):
    store = TrialStore(str(tmp_path), "s")
    store.open({}, {"spent_seconds": 3600.0})
    plan = Sweep(RECIPE, "x", spaces.load("quick"), budget="1h")
    budget = TimeBudget(store, plan.budget_seconds)
    assert sweeps._proposals(plan, RECIPE, store, 3, budget)() is None
    result = sweeps.SweepResult(store, True, None, "", "", 0.0)
    said = " ".join(sweeps.sentence(plan, result, 3, budget).split())
    assert "larger --budget goes on" in said
    more = TimeBudget(store, 2 * 3600)
    assert sweeps._proposals(plan, RECIPE, store, 3, more)().number == 0


def test_the_time_of_a_sweep_is_that_of_all_its_starts(tmp_path):
    store = TrialStore(str(tmp_path), "s")
    store.open({}, {"spent_seconds": 3600.0, "split": "tuning"})
    own = Trial(0, {}, "recipe", "completed", "", [{"epoch": 1, "score": 80.0, "seconds": 1.0}])
    store.add(own)
    plan = Sweep(RECIPE, "x", spaces.load("quick"))
    result = sweeps.SweepResult(store, True, own, "", "", seconds=5.0)
    budget = TimeBudget(store, plan.budget_seconds)
    said = sweeps.sentence(plan, result, 1, budget)
    assert said.startswith("1 trials (0 stopped early, 0 failed) in 1:00:")


def test_the_best_score_of_a_pruned_trial_reaches_mlflow_before_its_run_ends(tmp_path):
    calls = []

    class Tracking:
        def writer_of(self, title):
            return self

        def metrics(self, values, step):
            calls.append(("metrics", values, step))

        def end_orphan(self, title, outcome, reason, metrics=None):
            calls.append(("end", title, outcome, metrics))

    store = TrialStore(str(tmp_path), "s")
    group = TrialGroup(store, RECIPE, INPUTS, "tuning", "trial", {})
    history = [{"epoch": 1, "score": 50.0}, {"epoch": 2, "score": 48.0}]
    trial = Trial(3, {"mix.mixup_alpha": 0.5}, "tpe", "pruned", "why", history)
    tracker = TrialTracker(group, Tracking(), "parent", local=False)
    tracker.ended(trial, TrialEnd("pruned", "why"))
    tracker.close()
    best = {"best/tuning_top1": 50.0, "best/epoch": 1}
    assert calls[:2] == [("metrics", best, 0), ("end", "t03 mx.5", "pruned", None)]
    calls.clear()
    local = TrialTracker(group, Tracking(), "parent", local=True)
    local.ended(trial, TrialEnd("pruned", "why"))
    local.close()
    assert calls == [("end", "t03 mx.5", "pruned", best)]


def test_slots_and_resources_are_computed_from_the_cluster():
    def slots(nodes, **cluster):
        run = override(
            RECIPE,
            {
                "train.batch_size": 256,
                **{f"cluster.{k}": v for k, v in cluster.items() if k != "parallel"},
            },
        )
        place = allocate(
            run, Capacity(tuple(Node(*n) for n in nodes)), 100, cluster.get("parallel", 0)
        )
        return place.slots, place.each, place.local

    assert slots([(2, 0)]) == (2, {"CPU": 1.0}, True)
    assert slots([(16, 0)]) == (4, {"CPU": 4.0}, True)
    assert slots([(16, 0)], cpus_per_worker=2) == (4, {"CPU": 2.0}, True)
    assert slots([(32, 4), (32, 4)]) == (8, {"CPU": 8.0, "GPU": 1.0}, True)
    assert slots([(32, 4), (32, 4)], workers="4") == (2, {"CPU": 8.0, "GPU": 1.0}, False)
    assert slots([(32, 4)], gpus_per_worker=0.5) == (8, {"CPU": 4.0, "GPU": 0.5}, True)
    assert Cluster().workers == "1"
    with pytest.raises(LaunchError, match="only 4 fit on this cluster"):
        slots([(32, 4)], workers="8")
    with pytest.raises(LaunchError, match="there is no GPU here"):
        slots([(8, 0)], gpus_per_worker=1)


BEST = "runs/s/report/best.json"


def execute(next_trial, config, train, listeners, **_):
    """Ray Tune's part without its processes: one trial after the other, here."""
    for trial in iter(next_trial, None):

        def report(epoch, metrics, trial=trial):
            for listener in listeners:
                listener.progressed(trial, {"epoch": epoch, "seconds": 1.0, **metrics})

        end = TrialEnd("completed", "", train(config(trial), report))
        for listener in listeners:
            listener.ended(trial, end)
    return True


def two_epochs(context, config, report):
    """Training that keeps nothing: a trial that is run again reports the same."""
    scores = [40.0 + config["number"] + epoch for epoch in (1, 2)]
    for epoch, score in enumerate(scores, 1):
        report(epoch, {"score": score, "tuning/top1": score})
    return {"score": scores[-1], "run_dir": "", "best_dir": "", "mlflow_run_id": "", "metrics": {}}


@pytest.fixture
def small_sweep(monkeypatch):
    """small_sweep(home): two trials of two epochs; all is real but Ray, MLflow and training."""
    monkeypatch.setattr(sweeps, "connect", lambda *_: TrialResources(1, {"CPU": 1.0}, True))
    monkeypatch.setattr(ray_tune, "execute", execute)
    monkeypatch.setattr(ray_tune, "placement_groups", list)
    monkeypatch.setattr(ray_tune, "remove_placement_groups", lambda _: None)
    # Drawing takes most of the time.
    monkeypatch.setattr(figures, "png", lambda figure: b"a picture")
    monkeypatch.setattr(figures, "drawing", lambda *_: Markup("a drawing"))
    tracking = mock.MagicMock()
    tracking.__exit__.return_value = False
    parent = tracking.start_run.return_value
    parent.run_id, parent.url = "r", ""
    for link in (parent.view_url, parent.view_link, parent.artifact_link):
        link.return_value = ""

    def run(home):
        monkeypatch.setenv("FTLIB_HOME", str(home))
        recipe = override(RECIPE, {"train.epochs": 2})
        plan = Sweep(recipe, "x", spaces.load("quick"), name="s", trials=2, search="random")
        hooks = Hooks(
            lambda run: replace(INPUTS, val_images=100),
            two_epochs,
            open_tracking=lambda *_, **__: tracking,
            out=io.StringIO(),
        )
        return sweeps.sweep(plan, hooks)

    yield run
    # Up to CPython 3.11.7 an ast.parse (of numpy.load) fails when what many sweeps left behind is
    # collected within it (python/cpython#106905).
    gc.collect()


@pytest.mark.parametrize(
    "length",
    [pytest.param(1, id="once"), pytest.param(5, id="for a while", marks=pytest.mark.slow)],
)
def test_every_write_rename_and_sync_of_a_sweep_may_fail(
    small_sweep, tmp_path, monkeypatch, length
):
    """Each fails in turn. The sweep ends with an error, and what can be read of it is right; the
    same command then ends with the files that it would have had, byte for byte."""
    faults = FailingWrites(monkeypatch)

    def files(root):
        """All but what names this driver and this hour, and the copy for optuna-dashboard."""
        about = json.loads((root / "runs" / "s" / "sweep.json").read_text())
        for changing in ("created", "driver", "spent_seconds"):
            about.pop(changing, None)
        found = whole(root, but=("sweep.json", "optuna.journal", ".lock", ".lock-holder"))
        return found | {"sweep.json": json.dumps(about)}

    assert small_sweep(tmp_path / "whole").finished
    writes, expected = faults.count, files(tmp_path / "whole")
    assert writes > 40 and {BEST, "runs/s/trials/t01/trial.json"} <= set(expected)
    for first in range(writes):
        root = tmp_path / f"{first}"
        faults.count, faults.wanted = 0, lambda number, _, k=first: k <= number < k + length
        try:
            small_sweep(root)
        except StorageError as error:
            assert "disk is full" in str(error)
        for name in (BEST, "runs/s/report/index.html"):
            file = root / name
            assert not file.exists() or file.read_bytes() == expected[name], first
        faults.wanted = lambda number, _: False
        assert small_sweep(root).finished
        assert files(root) == expected, f"write {first} of {writes} failed"
