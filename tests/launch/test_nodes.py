"""A Ray cluster of two nodes on this machine that loses one, with or without notice.

Minutes each.

The times printed (pytest -s) are those that docs/recovery.md gives.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FLAGS = ["--train.epochs", "2000", "--cluster.workers", "1:2", "--cluster.cpus-per-worker", "1"]

pytestmark = pytest.mark.slow


class Nodes:
    """A head with one CPU and, once `join` is called, a second node with another one."""

    def __init__(self, folder, free_port, jobs, family):
        self.folder, self.jobs, self.family, self.free_port = (
            folder,
            jobs,
            family(folder),
            free_port,
        )
        self.env = jobs.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=jobs.token)
        self.address = f"127.0.0.1:{free_port()}"
        self.start(
            "--head",
            "--node-ip-address",
            "127.0.0.1",
            "--port",
            self.address.split(":")[1],
            "--ray-client-server-port",
            str(self.free_port()),
            "--include-dashboard",
            "false",
            "--temp-dir",
            str(folder),
            "--dashboard-agent-listen-port",
            str(self.free_port()),
        )
        self.env["RAY_ADDRESS"] = self.address

    def start(self, *flags):
        subprocess.run(
            [self.jobs.ray, "start", "--num-cpus", "1", "--disable-usage-stats", *flags],
            env={k: v for k, v in self.env.items() if k != "RAY_ADDRESS"},
            check=True,
            capture_output=True,
            timeout=180,
        )

    def join(self):
        """Start the second node. Returns its raylet's process id."""
        before = set(self.raylets())
        self.start(
            "--address", self.address, "--dashboard-agent-listen-port", str(self.free_port())
        )
        (raylet,) = set(self.raylets()) - before
        return raylet

    def raylets(self):
        return [p.pid for p in self.family.processes() if p.name() == "raylet"]

    def ids(self):
        code = (
            "import ray, json; ray.init(logging_level='ERROR', log_to_driver=False); "
            "ids = [n['NodeID'] for n in ray.nodes() if n['Alive']]; "
            "print('IDS', json.dumps(ids), ray.get_runtime_context().get_node_id())"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], env=self.env, capture_output=True, text=True, timeout=120
        ).stdout
        listed, own = re.search(r"IDS (\[.*\]) (\w+)", out).groups()
        return json.loads(listed), own

    def kill(self, raylet):
        """As when the power goes: everything of that node at once."""
        node = psutil.Process(raylet)
        for p in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                p.kill()

    def training(self, *flags):
        return self.jobs.started(*FLAGS, *flags, env=self.env)


@pytest.fixture
def nodes(free_port, jobs, family):
    folder = Path("/tmp") / f"ftn{os.getpid()}"  # sockets need a short path
    cluster = Nodes(folder, free_port, jobs, family)
    try:
        yield cluster
    finally:
        cluster.family.end()
        shutil.rmtree(folder, ignore_errors=True)


def steps(home, name):
    return sorted(
        int(p.name.removeprefix("step-"))
        for p in (home / "runs" / name / "checkpoints").glob("step-*")
        if (p / "manifest.json").exists()
    )


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, process.log()


def test_training_goes_on_without_a_lost_node(nodes, jobs, home):
    second = nodes.join()
    with nodes.training("--name", "lost", "--checkpoint.every-steps", "1") as process:
        jobs.until(
            lambda: "with 1 to 2 workers" in process.log() or "with 2 workers" in process.log(),
            process,
        )
        jobs.until(lambda: len(steps(home, "lost")) >= 2, process)
        last = steps(home, "lost")[-1]
        nodes.kill(second)
        lost = time.monotonic()
        jobs.until(lambda: steps(home, "lost")[-1] > last + 2, process)
        print(
            f"\ntraining again {time.monotonic() - lost:.1f} s after a node was lost without notice"
        )
        assert "Traceback" not in process.log(), process.log()
        stop(process)


def test_a_killed_worker_is_replaced(nodes, jobs, home):
    second = nodes.join()
    with nodes.training("--name", "killed", "--checkpoint.every-steps", "1") as process:
        jobs.until(lambda: len(steps(home, "killed")) >= 2, process)
        (worker,) = [
            p
            for p in psutil.Process(second).children(recursive=True)
            if "RayTrainWorker" in p.name() or any("RayTrainWorker" in word for word in p.cmdline())
        ]
        last = steps(home, "killed")[-1]
        worker.kill()
        lost = time.monotonic()
        jobs.until(lambda: steps(home, "killed")[-1] > last + 2, process)
        print(f"\ntraining again {time.monotonic() - lost:.1f} s after a worker was killed")
        stop(process)


def test_a_drain_notice_leads_to_a_checkpoint(nodes, jobs, home):
    second = nodes.join()
    # Checkpoints are due only at an epoch's edge (every third step): another is the notice's.
    with nodes.training(
        "--name",
        "drained",
        "--checkpoint.every-seconds",
        "0",
        "--checkpoint.every-steps",
        "0",
        "--train.batch-size",
        "16",
        "--train.microbatch-size",
        "8",
        "--checkpoint.keep-last",
        "50",
    ) as process:
        jobs.until(lambda: len(steps(home, "drained")) >= 2, process)
        listed, own = nodes.ids()
        (other,) = set(listed) - {own}
        seen = set(steps(home, "drained"))
        assert all(s % 3 == 0 for s in seen), "three steps make an epoch"
        asked = time.monotonic()
        subprocess.run(
            [
                jobs.ray,
                "drain-node",
                "--node-id",
                other,
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "spot",
                "--deadline-remaining-seconds",
                "60",
            ],
            env=nodes.env,
            check=True,
            capture_output=True,
            timeout=60,
        )
        noticed = time.monotonic()
        jobs.until(lambda: [s for s in steps(home, "drained") if s % 3], process, 60)
        print(
            f"\na committed checkpoint {time.monotonic() - noticed:.1f} s after the notice "
            f"({noticed - asked:.1f} s to give it)"
        )
        nodes.kill(second)
        last, lost = steps(home, "drained")[-1], time.monotonic()
        jobs.until(lambda: steps(home, "drained")[-1] > last + 6, process)
        print(f"training again {time.monotonic() - lost:.1f} s after the node went")
        stop(process)
