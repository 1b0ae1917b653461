"""slurm.sh against stand-ins of Slurm's and Ray's commands."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "slurm.sh"

STAND_INS = {
    "srun": """#!/bin/bash
echo "srun $*" >> "$LOG"
echo "srun cpus ${SRUN_CPUS_PER_TASK:-}" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >> "$LOG"
if [[ $1 == show ]]; then printf 'one\\ntwo\\n'; fi
""",
    "hostname": "#!/bin/bash\necho 10.0.0.1 172.17.0.1\n",
    "ray": """#!/bin/bash
echo "ray $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$LOG"
if [[ $1 == start ]]; then [[ -z ${RAY_BROKEN:-} ]] || exit 1; exec sleep 60; fi
[[ -z ${RAY_SLOW:-} ]]
""",
}
JOB = """
import os, re, signal, sys, time
def stop(number, frame):
    print("checkpoint", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
print("training", os.environ["RAY_ADDRESS"], *sys.argv[1:], flush=True)
while not re.search("^ray start .*--address", open(os.environ["LOG"]).read(), re.MULTILINE):
    time.sleep(0.05)
time.sleep(float(os.environ.get("JOB_SECONDS", "60")))
sys.exit(int(os.environ.get("JOB_EXIT", "0")))
"""


class Slurm:
    """A folder with the stand-ins, first on the PATH of what is submitted."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        self.processes = []
        self.log.touch()
        for name, text in STAND_INS.items():
            file = folder / name
            file.write_text(text)
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        (folder / "job.py").write_text(JOB)

    def submit(self, *flags, **more):
        env = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_ARRAY_TASK_ID": "7",
            **more,
        }
        command = [str(SCRIPT), sys.executable, str(self.folder / "job.py"), *flags]
        with (self.folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def close(self):
        """End what a failed test left, which would hold its pipe open in the next one."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def wait_for(self, text):
        deadline = time.monotonic() + 30
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path):
    slurm = Slurm(tmp_path)
    yield slurm
    slurm.close()


def ended(process):
    """What is printed from now on, once the script is over; nothing it started is left."""
    out, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return out
        time.sleep(0.05)
    raise AssertionError("processes of the job are left")


@pytest.mark.parametrize("code", [0, 2])
def test_the_script_exits_with_the_code_of_the_job(slurm, code):
    process = slurm.submit("--seed", "%a", JOB_SECONDS="0", JOB_EXIT=str(code))
    out = ended(process)
    assert process.returncode == code
    assert out.startswith("training 10.0.0.1:23456 --seed 7"), "20000 + job id % 20000"
    log = slurm.log.read_text()
    start = "ray start --block --disable-usage-stats --num-cpus 3"
    assert f"{start} --head --node-ip-address 10.0.0.1 --port 23456" in log
    assert "--dashboard-host 127.0.0.1 --dashboard-port 43456" in log
    assert f"{start} --address 10.0.0.1:23456" in log
    assert "token 64" in log and "requeue" not in log


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)]
)
def test_a_signal_stops_the_job_with_a_checkpoint_and_only_the_time_limit_requeues_it(
    slurm, sent, code, requeued
):
    process = slurm.submit()
    assert process.stdout.readline().startswith("training")
    process.send_signal(sent)
    out = ended(process)
    assert process.returncode == code and "checkpoint" in out
    assert ("scontrol requeue 123456" in slurm.log.read_text()) is requeued


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)]
)
def test_a_signal_while_ray_starts_ends_the_script_before_the_job(slurm, sent, code, requeued):
    process = slurm.submit(RAY_SLOW="1")
    slurm.wait_for("ray health-check")
    process.send_signal(sent)
    out = ended(process)
    assert process.returncode == code and "training" not in out
    assert ("scontrol requeue 123456" in slurm.log.read_text()) is requeued


def test_a_head_that_does_not_start_is_one_message(slurm):
    process = slurm.submit(RAY_BROKEN="1", RAY_SLOW="1")
    out = ended(process)
    assert process.returncode == 1 and "training" not in out
    assert (
        "error: Ray did not start on one at 10.0.0.1:23456" in (slurm.folder / "stderr").read_text()
    )


def test_steps_get_the_cpus_of_the_job(slurm):
    ended(slurm.submit(JOB_SECONDS="0"))
    assert "srun cpus 3" in slurm.log.read_text()


def test_no_command_is_wrong_input():
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch slurm.sh" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
