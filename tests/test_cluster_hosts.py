"""cluster.yaml on three machines: `ray up`, the pipeline as submitted jobs, faults, `ray down`.

Minutes in all, in this order: `make cluster-test`.
"""

import contextlib
import re
import time

import cv2
import numpy as np
import pytest
import yaml

from tests import cluster_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cluster_hosts.missing()), reason=cluster_hosts.missing()),
]

TOKEN = "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
SHARED = ["--data.path", "/shared/halves", "--checkpoint.storage", "/shared/runs"]
SMALL = [
    *("--model.arch", "shufflenet_v2_x0_5", "--augment.size", "16", "--data.loader-workers", "0"),
    *("--data.subset", "0.5"),
    *("--train.batch-size", "32", "--train.microbatch-size", "16", "--train.log-every", "1"),
    *("--model.dropout", "0", "--train.epochs", "1", "--gates.val-top1", "1"),
    *("--track.no-system-metrics", "--track.no-log-model"),
]
LONG = [
    *(*SHARED, *SMALL, "--cluster.workers", "1:2"),
    *("--train.epochs", "5000", "--checkpoint.every-steps", "5"),
]


def draw_halves(folder):
    """Pictures of 16 px whose left or right half is bright: 240 to train on, 60 to score."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 30)):
        for side in ("left", "right"):
            (folder / split / side).mkdir(parents=True)
            for i in range(count):
                image = draw.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                image[:, slice(0, 8) if side == "left" else slice(8, 16)] += 150
                cv2.imwrite(str(folder / split / side / f"{i:03d}.jpg"), image)


class Job:
    """A submitted job; `log()` is what `ray job submit` has printed of it."""

    def __init__(self, cluster, name, command):
        self.cluster, self.name = cluster, name
        submit = f"ray job submit --submission-id {name} --working-dir . -- {command}"
        self._file = cluster.rack.folder / f"{name}.log"
        self.process = cluster.laptop.start(
            f"{TOKEN}; cd {cluster_hosts.ROOT} && {submit}", self._file
        )

    def log(self):
        return self._file.read_text()

    def wait(self, seconds=240):
        """The job's own exit code."""
        self.process.wait(seconds)
        if "succeeded" in self.log():
            return 0
        found = re.findall(r"exit code (\d+)", self.log())
        assert found, self.log()
        return int(found[-1])

    def until(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return found


class Cluster:
    """The machines with Ray on them, as docs/clusters.md says how to start it."""

    def __init__(self, rack):
        self.rack, self.laptop, self.head = rack, rack["laptop"], rack["head"]
        self.workers = [rack["worker1"], rack["worker2"]]

    def up(self):
        file = self.laptop.files / "root/cluster.yaml"
        file.write_text(yaml.safe_dump(cluster_hosts.cluster_yaml(self.rack)))
        self.laptop.run("RAY_AUTH_MODE=token ray get-auth-token --generate")
        printed = self.laptop.run("RAY_UP_enable_autoscaler_v2=0 ray up --yes cluster.yaml", 300)
        self.laptop.start("ray dashboard cluster.yaml", self.rack.folder / "tunnel.log")
        self.until(lambda: self.cpus() == 2)
        return printed

    def cpus(self):
        """CPUs of the nodes that the head knows; 0 before it answers."""
        with contextlib.suppress(AssertionError):
            status = self.head.run("RAY_AUTH_MODE=token ray status")
            return sum(float(n) for n in re.findall(r"/([\d.]+) CPU", status))
        return 0

    def steps(self, run):
        """Its checkpoints, in order; only finished ones have a manifest."""
        found = (self.rack.shared / "runs" / run / "checkpoints").glob("step-*/manifest.json")
        return sorted(int(file.parent.name.removeprefix("step-")) for file in found)

    def until(self, condition, seconds=180):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return found

    @contextlib.contextmanager
    def job(self, name, *command):
        """A submitted job, stopped if it still runs at the end."""
        job = Job(self, name, " ".join(["python", *command]))
        try:
            yield job
        finally:
            if job.process.poll() is None:
                self.laptop.run(f"{TOKEN}; ray job stop --no-wait {name} || true")
                job.process.wait(60)

    def done(self, name, *command):
        """What a job prints that must succeed."""
        with self.job(name, *command) as job:
            assert job.wait() == 0, job.log()
            return job.log()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_hosts.Rack(tmp_path_factory.mktemp("rack") / "r").running() as rack:
        cluster = Cluster(rack)
        cluster.up()
        draw_halves(rack.shared / "pictures")
        source = ("--source", "/shared/pictures", "--out", "/shared/halves")
        cluster.done("prepare", "jobs/prepare.py", *source)
        yield cluster


def test_the_pipeline_from_pictures_to_a_report(cluster):
    """Phase 1 and, from its weights, Phase 2, each on two machines; an evaluation."""
    two = [*SHARED, *SMALL, "--cluster.workers", "2"]
    from_phase1 = [*two, "--model.init-from", "phase1"]
    phase1 = cluster.done("phase1", "jobs/phase1.py", "--name", "first", *two)
    assert "with 2 workers (1 CPU each)" in phase1 and "first: finished" in phase1
    phase2 = cluster.done("phase2", "jobs/phase2.py", "--name", "second", *from_phase1)
    assert "second: finished" in phase2 and "above the model it started from" in phase2
    score = cluster.done("evaluate", "jobs/evaluate.py", "/shared/runs/second")
    assert "on 60 pictures of halves (val)" in score


def test_training_survives_a_killed_raylet_and_a_cut_network(cluster):
    """On the other machine; the autoscaler starts Ray there again."""
    with cluster.job("lost", "jobs/phase1.py", *LONG, "--name", "lost") as job:

        def goes_on():
            before = cluster.steps("lost")[-1]
            job.until(lambda: cluster.steps("lost")[-1] > before + 10)

        job.until(lambda: cluster.steps("lost"))
        for raylet in cluster.workers[1].processes("raylet/raylet"):
            raylet.kill()
        goes_on()
        cluster.rack.cut("worker2")
        time.sleep(20)
        cluster.rack.mend("worker2")
        goes_on()


def test_down_ends_ray_on_every_machine(cluster):
    """`ray stop` runs on the head; the others end by themselves once it does not answer."""
    cluster.laptop.run("ray down --yes cluster.yaml", 120)
    machines = [cluster.head, *cluster.workers]
    cluster.until(lambda: not any(m.processes("raylet/raylet") for m in machines))
