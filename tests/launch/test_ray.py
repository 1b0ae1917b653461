"""The jobs as a user starts them: on a Ray of their own, and submitted to a cluster.

Each takes a minute or more. Holds the tests of executor and worker on a cluster.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

# Short runs of six steps with a checkpoint after each.
FLAGS = ["--optimizer.lr", "0.05", "--train.epochs", "3", "--checkpoint.every-steps", "1"]

pytestmark = pytest.mark.slow


def result(home, name):
    return json.loads((home / "runs" / name / "result.json").read_text())


def weights(home, name):
    from safetensors.numpy import load_file

    return load_file(home / "runs" / name / result(home, name)["best"] / "model.safetensors")


def test_two_workers_killed_and_started_again_end_as_one_undisturbed(jobs, home):
    """kill -9 of the whole job in mid-run; the same command, from another folder, finishes it.

    Its weights are those of one worker that nobody disturbed.
    """
    strict = ("--cluster.strict-elastic", "--cluster.cpus-per-worker", "1", "--train.epochs", "20")
    # One worker trains in the job's own process, two on a cluster.
    with jobs.started(*FLAGS, "--name", "whole", *strict) as whole:
        assert whole.wait(300) == 0, whole.log()
    longer = ("--name", "torn", "--cluster.workers", "2", *strict)
    with jobs.started(*FLAGS, *longer) as torn:
        checkpoints = home / "runs" / "torn" / "checkpoints"
        jobs.until(lambda: any(checkpoints.glob("step-*")), torn)
        torn.send_signal(signal.SIGKILL)
        torn.wait()
    assert not (home / "runs" / "torn" / "result.json").exists()
    before = json.loads((home / "runs" / "torn" / "run.json").read_text())
    with jobs.started(*FLAGS, *longer, cwd=str(home)) as torn:
        assert torn.wait(300) == 0, torn.log()
        assert (
            "going on with 2 workers" in torn.log()
            and "finished in" in torn.log()
            and "Traceback" not in torn.log()
        )
    after = json.loads((home / "runs" / "torn" / "run.json").read_text())
    assert after["mlflow"]["run_id"] == before["mlflow"]["run_id"] and after["launches"] == 2
    one, two = result(home, "whole"), result(home, "torn")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert (a["train/loss"], a["val/top1"]) == (b["train/loss"], b["val/top1"])
        # Two workers add up what each has scored: the last of the six decimals may differ.
        assert a["val/loss"] == pytest.approx(b["val/loss"], abs=1.5e-6)
    theirs = weights(home, "torn")
    assert all((value == theirs[name]).all() for name, value in weights(home, "whole").items())
    with jobs.started(*FLAGS, *longer) as again:
        assert again.wait(120) == 0 and "is finished already" in again.log()


def runs_in_mlflow(home):
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as db:
        return dict(db.execute("select name, status from runs").fetchall())


LOCAL = ("--data.loader-workers", "1")
CLUSTER = ("--cluster.local", "false")


@pytest.mark.parametrize(
    ("flags", "sent", "code", "group"),
    [
        (LOCAL, signal.SIGTERM, 143, False),
        (LOCAL, signal.SIGTERM, 143, True),
        (LOCAL, signal.SIGINT, 130, True),
        (CLUSTER, signal.SIGTERM, 143, False),
        (CLUSTER, signal.SIGTERM, 143, True),
        (CLUSTER, signal.SIGINT, 130, True),
    ],
)
def test_a_signal_ends_with_a_checkpoint_and_a_killed_mlflow_run(
    jobs, home, flags, sent, code, group
):
    """To the job alone or to its process group, as a terminal, Slurm and containers send it."""
    given = (*FLAGS, "--name", "stopped", "--train.epochs", "4000", *flags)
    with jobs.started(*given, start_new_session=True) as process:
        jobs.until(lambda: "loss" in process.log(), process)
        os.killpg(process.pid, sent) if group else process.send_signal(sent)
        assert process.wait(90) == code, process.log()
        said = re.search(r"stopped at step (\d+) of 8000 on request, with a check", process.log())
        assert said, process.log()
    step = home / "runs" / "stopped" / "checkpoints" / f"step-{int(said[1]):08d}"
    assert (step / "manifest.json").is_file()
    assert not (home / "runs" / "stopped" / "lease.json").exists()
    assert runs_in_mlflow(home) == {"stopped": "KILLED"}
    assert "Traceback" not in process.log(), process.log()


AGENTS = ("DashboardAgent", "RuntimeEnvAgent")


def ray_processes(process, name):
    return [c for c in psutil.Process(process.pid).children() if name in c.name()]


def ends_without(name, jobs):
    """Kill a process of Ray's under a run, which then says so once and leaves no process."""
    given = (*FLAGS, "--name", "orphan", "--train.epochs", "4000", *CLUSTER)
    with jobs.started(*given) as process:
        jobs.until(lambda: "loss" in process.log(), process)
        family = psutil.Process(process.pid).children(recursive=True)
        (victim,) = (p for p in family if name in p.name())
        victim.kill()
        assert process.wait(60) == 1, process.log()
        said = re.findall(r"error: Ray's (\w+) has ended while the run was training", process.log())
        # They end together, so on a busy machine another one of them may be seen first.
        assert len(said) == 1 and said[0] in {name, "raylet", *AGENTS}, process.log()
    _, alive = psutil.wait_procs(family, 30)
    assert alive == []


@pytest.mark.parametrize("name", AGENTS)
def test_a_driver_that_ray_ends_from_within_has_said_why(jobs, home, name):
    """The raylet ends when one of its agents does, and Ray's client ends the driver at once."""
    ends_without(name, jobs)


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_driver_whose_ray_died_ends_and_leaves_nothing(jobs, home, name):
    ends_without(name, jobs)
    assert runs_in_mlflow(home) == {"orphan": "FAILED"}


def test_a_stop_that_finds_ray_silent_ends_without_a_checkpoint_and_leaves_nothing(jobs, home):
    given = (*FLAGS, "--name", "silent", "--train.epochs", "4000", *CLUSTER)
    with jobs.started(*given) as process:
        jobs.until(lambda: "loss" in process.log(), process)
        family = psutil.Process(process.pid).children(recursive=True)
        for name in ("gcs_server", "raylet"):
            (silent,) = ray_processes(process, name)
            silent.suspend()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, process.log()
        assert "stopped without a checkpoint, because Ray does not answer" in process.log()
    _, alive = psutil.wait_procs(family, 30)
    assert alive == [] and runs_in_mlflow(home) == {"silent": "KILLED"}


def test_an_error_that_would_come_again_is_not_retried(jobs, home):
    with jobs.started(
        *FLAGS,
        "--name",
        "boom",
        "--optimizer.lr",
        "1e30",
        "--train.clip-norm",
        "0",
        "--train.max-nonfinite",
        "0",
        "--train.epochs",
        "20",
    ) as process:
        assert process.wait(240) == 1, process.log()
        assert (
            "error: the loss or its gradient was not finite" in process.log()
            and "Traceback" not in process.log()
            and "goes on from" not in process.log()
        )


@pytest.fixture
def head(free_port, jobs, family):
    """A `ray start --head` of this test's own; its processes are ended by their ids."""
    short = Path("/tmp") / f"ftr{os.getpid()}"  # sockets need a short path
    dashboard = free_port()
    env = jobs.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=jobs.token)
    # Not with --block, which ends everything when Ray's client server (unused) starts slowly.
    command = [
        jobs.ray,
        "start",
        "--head",
        "--port",
        str(free_port()),
        "--dashboard-port",
        str(dashboard),
        "--dashboard-agent-listen-port",
        str(free_port()),
        "--ray-client-server-port",
        str(free_port()),
        "--temp-dir",
        str(short),
        "--disable-usage-stats",
        "--num-cpus",
        "2",
    ]
    try:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=180)
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline, "the dashboard does not answer"
            with contextlib.suppress(OSError):
                asked = urllib.request.Request(
                    f"http://127.0.0.1:{dashboard}/api/version",
                    headers={"Authorization": f"Bearer {jobs.token}"},
                )
                with urllib.request.urlopen(asked, timeout=5):
                    break
            time.sleep(0.5)
        yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        family(short).end()
        shutil.rmtree(short, ignore_errors=True)


def submit(jobs, head, *command):
    return subprocess.run(
        [jobs.ray, "job", "submit", "--working-dir", str(jobs.root), "--", *command],
        env=head,
        cwd=str(jobs.root),
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_submitted_as_a_job(jobs, home, head):
    """Phase 1, Phase 2 and evaluate through `ray job submit`; the exit code of wrong input."""
    python = sys.executable
    env = {**head, "FTLIB_HOME": str(home)}
    give = ["env", f"FTLIB_HOME={home}", "OMP_NUM_THREADS=1", python]
    one = submit(
        jobs,
        env,
        *give,
        "jobs/phase1.py",
        "--data.path",
        jobs.shapes,
        *jobs.settings,
        *FLAGS,
        "--name",
        "one",
    )
    assert one.returncode == 0, one.stdout + one.stderr
    assert "one: finished in" in one.stdout
    two = submit(
        jobs,
        env,
        *give,
        "jobs/phase2.py",
        "--data.path",
        jobs.shapes,
        *jobs.settings,
        *FLAGS,
        "--name",
        "two",
        "--model.dropout",
        "0",
        "--augment.randaugment-m",
        "1",
        "--gates.gain",
        "-99",
        "--schedule.min-lr",
        "0",
    )
    assert two.returncode == 0, two.stdout + two.stderr
    assert result(home, "two")["start_top1"] == result(home, "one")["metrics"]["best/val_top1"]
    scored = submit(jobs, env, *give, "jobs/evaluate.py", "two", "--no-report", "--no-track")
    assert scored.returncode == 0 and "top-1" in scored.stdout, scored.stdout + scored.stderr
    wrong = submit(
        jobs,
        env,
        *give,
        "jobs/phase2.py",
        "--data.path",
        jobs.shapes,
        *jobs.settings,
        *FLAGS,
        "--name",
        "two",
        "--seed",
        "5",
        "--model.dropout",
        "0",
    )
    assert (
        wrong.returncode == 1
        and "exit code 2" in wrong.stdout + wrong.stderr
        and "the name 'two' is taken" in wrong.stdout
    )


def test_a_sweep_submitted_as_a_job(jobs, home, head):
    """A sweep on a cluster that somebody else started runs there; its report and runs are whole."""
    recipe = {
        "stage": "phase2",
        "data": {"path": jobs.shapes, "tuning_fraction": 0.25},
        "augment": {"size": 16, "crop_scale": [0.9, 1.0], "flip": 0.0},
        "mix": {"mixup_alpha": 0.2},
        "model": {"arch": "shufflenet_v2_x0_5"},
        "train": {"epochs": 2, "batch_size": 32, "microbatch_size": 16},
        "track": {"system_metrics": False},
    }
    (home / "recipe.json").write_text(json.dumps(recipe))
    done = submit(
        jobs,
        {**head, "FTLIB_HOME": str(home)},
        "env",
        f"FTLIB_HOME={home}",
        "OMP_NUM_THREADS=1",
        sys.executable,
        "jobs/sweep.py",
        "--recipe",
        str(home / "recipe.json"),
        "--space",
        "quick",
        "--trials",
        "3",
        "--name",
        "far",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 trials (" in done.stdout and "0 failed" in done.stdout
    report = home / "runs" / "far" / "report"
    assert (report / "index.html").is_file() and json.loads((report / "best.json").read_text())[
        "data"
    ]["path"] == jobs.shapes
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as db:
        runs = dict(db.execute("select name, status from runs").fetchall())
    assert set(runs.values()) == {"FINISHED"} and len(runs) == 4
