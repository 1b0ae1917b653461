"""A Ray cluster of two nodes on this machine, one of which gets a notice, or goes without one, while both train. Minutes each.

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

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
SETTINGS = ["--model.arch", "shufflenet_v2_x0_5", "--augment.size", "16", "--augment.crop-scale", "0.9", "1", "--data.subset", "1", "--data.loader-workers", "0", "--optimizer", "sgd",
            "--train.epochs", "2000", "--train.batch-size", "32", "--train.microbatch-size", "16", "--gates.val-top1", "1", "--track.no-system-metrics", "--track.no-log-model", "--train.log-every", "1",
            "--cluster.workers", "1:2", "--cluster.cpus-per-worker", "1"]

pytestmark = pytest.mark.slow


class Nodes:
    """A head with one CPU and, once `join` is called, a second node with another one."""

    def __init__(self, folder, free_port):
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))}
        self.env = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef", "OMP_NUM_THREADS": "1"}
        self.free_port = free_port
        self.address = f"127.0.0.1:{free_port()}"
        self.start("--head", "--node-ip-address", "127.0.0.1", "--port", self.address.split(":")[1], "--ray-client-server-port", str(self.free_port()), "--include-dashboard", "false",
                   "--temp-dir", str(folder), "--dashboard-agent-listen-port", str(self.free_port()))
        self.env["RAY_ADDRESS"] = self.address

    def start(self, *flags):
        subprocess.run([RAY, "start", "--num-cpus", "1", "--disable-usage-stats", *flags], env={k: v for k, v in self.env.items() if k != "RAY_ADDRESS"}, check=True, capture_output=True, timeout=180)

    def join(self):
        """Start the second node. Returns its raylet's process id."""
        before = set(self.raylets())
        self.start("--address", self.address, "--dashboard-agent-listen-port", str(self.free_port()))
        (raylet,) = set(self.raylets()) - before
        return raylet

    def raylets(self):
        return [p.pid for p in self.family() if p.name() == "raylet"]

    def family(self):
        """This cluster's processes, and no other's, have its folder in their command lines."""
        found = []
        for p in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in word for word in p.info["cmdline"] or []):
                found.append(p)
        return found

    def ids(self):
        code = "import ray, json; ray.init(logging_level='ERROR', log_to_driver=False); print('IDS', json.dumps([n['NodeID'] for n in ray.nodes() if n['Alive']]), ray.get_runtime_context().get_node_id())"
        out = subprocess.run([sys.executable, "-c", code], env=self.env, capture_output=True, text=True, timeout=120).stdout
        listed, own = re.search(r"IDS (\[.*\]) (\w+)", out).groups()
        return json.loads(listed), own

    def kill(self, raylet):
        """As when the power goes: everything of that node at once."""
        node = psutil.Process(raylet)
        for p in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                p.kill()

    def close(self):
        family = self.family()
        for p in [*family, *(child for parent in family for child in _children(parent))]:
            with contextlib.suppress(psutil.Error):
                p.kill()


def _children(process):
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


@pytest.fixture
def nodes(free_port):
    folder = Path("/tmp") / f"ftn{os.getpid()}"  # sockets need a short path
    cluster = Nodes(folder, free_port)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def training(nodes, shapes, home, *flags):
    log = open(home / "log", "w")  # noqa: SIM115 - closed below
    process = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "phase1.py"), "--data.path", shapes, *SETTINGS, *flags], env={**nodes.env, "FTLIB_HOME": str(home)}, cwd="/",
                               stdout=log, stderr=subprocess.STDOUT, text=True)
    process.log = lambda: (home / "log").read_text()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def until(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.log()
        assert time.monotonic() < deadline, process.log()
        time.sleep(0.1)
    return found


def steps(home, name):
    return sorted(int(p.name.removeprefix("step-")) for p in (home / "runs" / name / "checkpoints").glob("step-*") if (p / "manifest.json").exists())


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, process.log()


def test_training_goes_on_without_a_lost_node(nodes, shapes, home):
    second = nodes.join()
    with training(nodes, shapes, home, "--name", "lost", "--checkpoint.every-steps", "1") as process:
        until(lambda: "with 1 to 2 workers" in process.log() or "with 2 workers" in process.log(), process)
        until(lambda: len(steps(home, "lost")) >= 2, process)
        last = steps(home, "lost")[-1]
        nodes.kill(second)
        lost = time.monotonic()
        until(lambda: steps(home, "lost")[-1] > last + 2, process)
        print(f"\ntraining again {time.monotonic() - lost:.1f} s after a node was lost without notice")
        assert "Traceback" not in process.log(), process.log()
        stop(process)


def test_a_killed_worker_is_replaced(nodes, shapes, home):
    second = nodes.join()
    with training(nodes, shapes, home, "--name", "killed", "--checkpoint.every-steps", "1") as process:
        until(lambda: len(steps(home, "killed")) >= 2, process)
        (worker,) = [p for p in psutil.Process(second).children(recursive=True) if "RayTrainWorker" in p.name() or any("RayTrainWorker" in word for word in p.cmdline())]
        last = steps(home, "killed")[-1]
        worker.kill()
        lost = time.monotonic()
        until(lambda: steps(home, "killed")[-1] > last + 2, process)
        print(f"\ntraining again {time.monotonic() - lost:.1f} s after a worker was killed")
        stop(process)


def test_a_drain_notice_leads_to_a_checkpoint(nodes, shapes, home):
    second = nodes.join()
    # No checkpoint is due but those at an epoch's edge (every third step), so one of another step is the notice's.
    with training(nodes, shapes, home, "--name", "drained", "--checkpoint.every-seconds", "0", "--checkpoint.every-steps", "0", "--train.batch-size", "16", "--train.microbatch-size", "8",
                  "--checkpoint.keep-last", "50") as process:
        until(lambda: len(steps(home, "drained")) >= 2, process)
        listed, own = nodes.ids()
        (other,) = set(listed) - {own}
        seen = set(steps(home, "drained"))
        assert all(s % 3 == 0 for s in seen), "three steps make an epoch"
        asked = time.monotonic()
        subprocess.run([RAY, "drain-node", "--node-id", other, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"],
                       env=nodes.env, check=True, capture_output=True, timeout=60)
        noticed = time.monotonic()
        until(lambda: [s for s in steps(home, "drained") if s % 3], process, 60)
        print(f"\na committed checkpoint {time.monotonic() - noticed:.1f} s after the notice ({noticed - asked:.1f} s to give it)")
        nodes.kill(second)
        last, lost = steps(home, "drained")[-1], time.monotonic()
        until(lambda: steps(home, "drained")[-1] > last + 6, process)
        print(f"training again {time.monotonic() - lost:.1f} s after the node went")
        stop(process)
