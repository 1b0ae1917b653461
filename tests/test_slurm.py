"""slurm.sh against stand-ins of Slurm's and Ray's commands."""

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
if [[ $1 == start ]]; then exec sleep 60; fi
""",
}
JOB = """
import os, signal, sys, time
def stop(number, frame):
    print("checkpoint", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
print("training", os.environ["RAY_ADDRESS"], *sys.argv[1:], flush=True)
time.sleep(float(os.environ.get("JOB_SECONDS", "60")))
sys.exit(int(os.environ.get("JOB_EXIT", "0")))
"""


class Slurm:
    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
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
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


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
def test_the_job_s_exit_code_is_slurm_s(slurm, code):
    process = slurm.submit("--seed", "%a", JOB_SECONDS="0", JOB_EXIT=str(code))
    out = ended(process)
    assert process.returncode == code
    assert out.startswith("training 10.0.0.1:23456 --seed 7"), "20000 + job id % 20000"
    said = slurm.log.read_text()
    assert "ray start --block --disable-usage-stats --num-cpus 3 --head --node-ip-address" in said
    assert "ray start --block --disable-usage-stats --num-cpus 3 --address 10.0.0.1:23456" in said
    assert "token 64" in said and "requeue" not in said


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)]
)
def test_a_signal_stops_the_job_with_a_checkpoint_and_the_time_limit_queues_it_again(
    slurm, sent, code, requeued
):
    process = slurm.submit()
    assert process.stdout.readline().startswith("training")
    process.send_signal(sent)
    out = ended(process)
    assert process.returncode == code and "checkpoint" in out
    assert ("scontrol requeue 123456" in slurm.log.read_text()) is requeued


def test_no_command_is_wrong_input():
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch slurm.sh" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
