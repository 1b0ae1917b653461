"""cluster.yaml on three machines: `ray up`, the pipeline as submitted jobs, faults, `ray down`.

About 25 minutes on 2 cores, in this order: `make cluster-test`. It prints a table of the faults.
"""

import contextlib
import json
import re
import sqlite3
import time

import cv2
import numpy as np
import pytest
import yaml

from tests import cluster_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
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
    *("--cluster.max-failures", "20"),
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


def variables(**values):
    """The option of `ray job submit` that sets environment variables of the job."""
    values = {name: str(value) for name, value in values.items()}
    return f"--runtime-env-json '{json.dumps({'env_vars': values})}'"


class Job:
    """A submitted job; `log()` is what `ray job submit` has printed of it."""

    def __init__(self, cluster, name, command, options):
        self.cluster, self.name = cluster, name
        submit = f"ray job submit --submission-id {name} {options} -- {command}"
        self._file = cluster.rack.folder / f"{name}.log"
        self.process = cluster.laptop.start(
            f"{TOKEN} PYTHONUNBUFFERED=1; cd {cluster_hosts.ROOT} && {submit}", self._file
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
        self.table = []

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

    def newest(self, run):
        """The step of its newest checkpoint; 0 for none."""
        return max(self.steps(run), default=0)

    def until(self, condition, seconds=180):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return found

    @contextlib.contextmanager
    def job(self, name, *command, options="--working-dir ."):
        """A submitted job, stopped if it still runs at the end."""
        job = Job(self, name, " ".join(["python", *command]), options)
        try:
            yield job
        finally:
            if job.process.poll() is None:
                self.laptop.run(f"{TOKEN}; ray job stop --no-wait {job.name} || true")
                job.process.wait(60)

    @contextlib.contextmanager
    def training(self, name, run):
        """A job that trains `run`, from its beginning or its newest checkpoint."""
        before = self.newest(run)
        options = f"--working-dir . {variables(RAY_JOB_STOP_WAIT_TIME_S=60)}"
        with self.job(name, "jobs/phase1.py", *LONG, "--name", run, options=options) as job:
            job.until(lambda: self.newest(run) > before)
            job.until(lambda: all(map(self.trains, self.workers)))
            yield job

    def trains(self, machine):
        """Whether a worker trains there. Ray names its process after what it has done last."""
        names = ("ray::RayTrainWorker", "_setup_torch_process_group")
        return any(machine.processes(name) for name in names)

    @contextlib.contextmanager
    def fault(self, job, run, what):
        """Ten steps follow on what the block breaks; notes the seconds from its begin to then."""
        began = time.monotonic()
        yield
        before = self.newest(run)
        job.until(lambda: self.newest(run) > before + 10)
        self.note(what, "goes on", f"{time.monotonic() - began:.0f}")

    def note(self, *cells):
        """A row of the table of faults: what, how it ends, seconds."""
        self.table.append(cells)

    def mlflow_status(self, run):
        with contextlib.closing(sqlite3.connect(self.head.files / "data/ftlib/mlflow.db")) as db:
            return db.execute("select status from runs where name = ?", [run]).fetchone()[0]

    def done(self, name, *command):
        """What a job prints that must succeed."""
        with self.job(name, *command) as job:
            assert job.wait() == 0, job.log()
            return job.log()


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """The running cluster with prepared pictures; prints the table of faults at its end."""
    with cluster_hosts.Rack(tmp_path_factory.mktemp("rack") / "r").running() as rack:
        cluster = Cluster(rack)
        cluster.up()
        draw_halves(rack.shared / "pictures")
        source = ("--source", "/shared/pictures", "--out", "/shared/halves")
        cluster.done("prepare", "jobs/prepare.py", *source)
        yield cluster
    plugins = request.config.pluginmanager
    terminal = plugins.getplugin("terminalreporter")
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        terminal.write_line("\n| fault | ends in | seconds |\n|---|---|---|")
        for cells in cluster.table:
            terminal.write_line(f"| {' | '.join(cells)} |")


def test_the_pipeline_from_pictures_to_a_report(cluster):
    """Phase 1, by the line that estimate.py prints, Phase 2 from its weights; an evaluation.

    Both on two machines.
    """
    two = [*SHARED, *SMALL, "--cluster.workers", "2"]
    from_phase1 = [*two, "--model.init-from", "phase1"]
    ask = "jobs/estimate.py phase1 --cluster cluster.yaml --seconds 5"
    here = f"{TOKEN}; cd {cluster_hosts.ROOT}"
    flags = [*two, "--name", "first"]
    printed = cluster.laptop.run(f"{here}; FTLIB_HOME=/data python {ask} {' '.join(flags)}", 300)
    line = next(part for part in printed.splitlines() if "ray job submit" in part)
    phase1 = cluster.laptop.run(f"{here}; {line}", 300)
    assert "with 2 workers (1 CPU each)" in phase1 and "first: finished" in phase1
    phase2 = cluster.done("phase2", "jobs/phase2.py", "--name", "second", *from_phase1)
    assert "second: finished" in phase2 and "above the model it started from" in phase2
    score = cluster.done("evaluate", "jobs/evaluate.py", "/shared/runs/second")
    assert "on 60 pictures of halves (val)" in score


def test_a_sweep_whose_trials_have_two_workers(cluster):
    sweep = ("--recipe", "phase2", "--space", "quick", "--trials", "2", "--name", "search")
    from_phase1 = [*SHARED, *SMALL, "--cluster.workers", "2", "--model.init-from", "phase1"]
    printed = cluster.done("sweep", "jobs/sweep.py", *sweep, *from_phase1)
    assert "2 trials (0 stopped early, 0 failed)" in printed


def test_job_stop_and_a_killed_driver_are_resumed_by_the_same_command(cluster):
    with cluster.training("first-life", "run") as job:
        asked = time.monotonic()
        cluster.laptop.run(f"{TOKEN}; ray job stop {job.name}", 90)
        job.process.wait(60)
        assert "on request, with a checkpoint" in job.log() and "was stopped" in job.log()
        seconds = f"{time.monotonic() - asked:.0f} until it has ended"
        assert cluster.mlflow_status("run") == "KILLED"
        cluster.note("`ray job stop`", "a checkpoint, MLflow run killed", seconds)
    with cluster.training("second-life", "run") as job:
        assert "run: going on" in job.log()
        for driver in cluster.head.processes("jobs/phase1.py"):
            driver.kill()
        job.process.wait(120)
        assert cluster.mlflow_status("run") == "RUNNING"  # nobody is left to end it
        killed = time.monotonic()
    with cluster.training("third-life", "run") as job:
        assert "run: going on" in job.log()
        seconds = f"{time.monotonic() - killed:.0f} from the same command to the next checkpoint"
        cluster.note("the driver killed (kill -9)", "the job failed", seconds)


def test_training_survives_a_killed_raylet_and_a_cut_network(cluster):
    """On the other machine; the autoscaler starts Ray there again."""
    other = cluster.workers[1]
    with cluster.training("lost", "run") as job:
        with cluster.fault(job, "run", "the other machine's raylet killed"):
            for raylet in other.processes("raylet/raylet"):
                raylet.kill()
            cluster.until(lambda: not cluster.trains(other))
        job.until(lambda: cluster.trains(other))
        with cluster.fault(job, "run", "the other machine's network cut for 20 s"):
            cluster.rack.cut("worker2")
            time.sleep(20)
            cluster.rack.mend("worker2")
    cluster.until(lambda: cluster.cpus() == 2)


def test_training_goes_on_without_a_machine_whose_network_is_gone(cluster):
    with cluster.training("alone", "run") as job:
        with cluster.fault(job, "run", "the other machine's network cut for good"):
            cluster.rack.cut("worker2")
        cluster.rack.mend("worker2")
        cluster.until(lambda: cluster.cpus() == 2)


@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("read-only", "mount --bind /shared /shared && mount -o remount,bind,ro /shared"),
        ("away", "mount -t tmpfs -o ro away /shared"),
    ],
)
def test_training_survives_a_shared_folder_that_fails(cluster, state, command):
    everyone = [cluster.head, *cluster.workers]
    with (
        cluster.training(state, "run") as job,
        cluster.fault(job, "run", f"the shared folder {state} for 30 s"),
    ):
        for machine in everyone:
            machine.run(command)
        time.sleep(30)
        for machine in everyone:
            machine.run("umount -l /shared")


def test_training_survives_a_shared_folder_that_is_full(cluster):
    with (
        cluster.training("full", "run") as job,
        cluster.fault(job, "run", "the shared folder full for 30 s"),
    ):
        cluster.head.run("cat /dev/zero > /shared/filler || true")
        time.sleep(30)
        cluster.head.run("rm /shared/filler")


def test_training_goes_on_over_a_line_of_50_ms_that_loses_frames(cluster):
    with (
        cluster.training("slow", "run") as job,
        cluster.rack.bad_line("worker2", 0.025, 0.01),
        cluster.fault(job, "run", "a line of 50 ms there and back that loses 1 % of frames"),
    ):
        pass


def test_a_node_with_another_version_of_ftlib_is_refused_and_named(cluster):
    """Without --working-dir each node has the ftlib that is installed on it."""
    other = cluster.workers[1]
    package = cluster_hosts.ROOT / "ftlib"
    other.run(
        f"cp -r {package} /data && sed -i 's/^__version__.*/__version__ = \"9.9\"/' "
        f"/data/ftlib/__init__.py && mount --bind /data/ftlib {package}"
    )
    program = (f"{cluster_hosts.ROOT}/jobs/phase1.py", *LONG, "--name", "version")
    with cluster.job("version", *program, options=variables(PYTHONPATH=cluster_hosts.ROOT)) as job:
        assert job.wait() == 2
        assert f"{other.address} runs ftlib 9.9" in job.log()
    other.run(f"umount -l {package}")


def test_down_ends_ray_on_every_machine(cluster):
    """`ray stop` runs on the head; the others end by themselves once it does not answer."""
    cluster.laptop.run("ray down --yes cluster.yaml", 120)
    machines = [cluster.head, *cluster.workers]
    cluster.until(lambda: not any(m.processes("raylet/raylet") for m in machines))
