"""jobs/probe.py and jobs/finetune.py killed with SIGKILL and started again: the same weights, bit
for bit, as those of a run that nobody disturbed.

Modules: probe_run, fine_tune.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from tests import weights

FLAGS = (
    "--model.arch", weights.LITE0,
    "--augment.size", "32",
    "--optimizer", "adamw",
    "--optimizer.lr", "3e-4",
    "--optimizer.layer-decay", "0.75",
    "--train.epochs", "5",
    "--checkpoint.every-steps", "1",
)  # fmt: skip
"""Ten steps of the recipe, over the settings of `jobs`: the last value of a flag holds."""
DIES = """
import os, runpy, signal, sys
from ftlib.training import probe
setattr(probe, sys.argv.pop(1), lambda *_: os.kill(os.getpid(), signal.SIGKILL))
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A job that dies where the probe calls the function that is named first."""

pytestmark = pytest.mark.slow


def killed(jobs, env, function, job, *flags):
    """Start the job, which kills itself with SIGKILL when its probe calls `function`."""
    script = str(jobs.root / "jobs" / f"{job}.py")
    command = [sys.executable, "-c", DIES, function, script, *flags]
    died = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr


def finished(run_dir):
    """(scores of each epoch, tensors of the best model) of a finished run."""
    result = json.loads((run_dir / "result.json").read_text())
    clocks = ("images_per_s", "epoch_s", "time_ms", "seconds")
    rows = [
        {name: value for name, value in row.items() if not name.endswith(clocks)}
        for row in result["history"]
    ]
    return rows, load_file(run_dir / result["best"] / "model.safetensors")


def assert_same(one, two):
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert all(tensor.tobytes() == two[1][name].tobytes() for name, tensor in one[1].items())


@pytest.mark.parametrize("moment", ["fit", "write_best"])
def test_a_killed_probe_ends_as_one_undisturbed(jobs, home, shapes, offline_hub, tmp_path, moment):
    flags = [shapes, "--augment.size", "32", "--name", "pets", "--track.no-log-model"]
    whole, torn = (jobs.environment(FTLIB_HOME=str(tmp_path / name)) for name in ("whole", "torn"))
    killed(jobs, torn, moment, "probe", *flags)
    assert not list(tmp_path.glob("torn/runs/*/result.json"))
    for env in (whole, torn):
        command = [sys.executable, str(jobs.root / "jobs" / "probe.py"), *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (next(tmp_path.glob(f"{name}/runs/*")) for name in ("whole", "torn"))
    assert one.name == two.name and one.name.startswith("probe-")
    assert_same(finished(one), finished(two))


def test_fine_tuning_killed_in_its_probe_and_in_training_ends_as_one_undisturbed(
    jobs, shapes, offline_hub, tmp_path
):
    whole, torn = (jobs.environment(FTLIB_HOME=str(tmp_path / name)) for name in ("whole", "torn"))
    flags = [*FLAGS, "--name", "pets"]
    with jobs.started(*flags, job="finetune", env=whole) as job:
        assert job.wait(300) == 0, job.log()
    killed(jobs, torn, "write_best", "finetune", "--data.path", shapes, *jobs.settings, *flags)
    run = tmp_path / "torn" / "runs" / "pets"
    with jobs.started(*flags, job="finetune", env=torn) as job:
        jobs.until(lambda: (run / "checkpoints" / "step-00000002").is_dir(), job)
        os.kill(job.pid, signal.SIGKILL)
        job.wait(60)
    assert not (run / "result.json").exists()
    with jobs.started(*flags, job="finetune", env=torn) as job:
        assert job.wait(300) == 0, job.log()
    assert json.loads((run / "run.json").read_text())["launches"] == 2
    assert_same(finished(tmp_path / "whole" / "runs" / "pets"), finished(run))
