"""The soak of whole jobs: a run on two Ray workers, or a sweep, as a user starts them.

They run as root of a user namespace of their own (`unshare`), so that a disk can really be full and
a network really be cut, without rights on this machine and without harm to it.
"""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from track.conftest import Proxy, Server

from ftlib.track.store import ensure_store

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ("kill", "stop", "disk", "server", "net")
RECIPE = {
    "stage": "phase2",
    "data": {"path": "digits"},
    "augment": {"size": 16, "crop_scale": [0.5, 1.0], "flip": 0.0},
    "mix": {"mixup_alpha": 0.2},
    "model": {"arch": "shufflenet_v2_x0_5"},
    "optimizer": {"type": "AdamW", "lr": 0.002},
    "train": {"batch_size": 128, "microbatch_size": 32, "precision": "fp32", "log_every": 1},
    "cluster": {"allow_open": True, "gpus_per_worker": 0},
    "checkpoint": {"every_steps": 4},
    "track": {"system_metrics": False},
}
SECONDS = 300
"""What a life may take without a fault."""


LINGER_SECONDS = 120
"""How long Ray's agents may outlive a killed driver: they first ask their dead GCS for a minute."""


def in_namespace():
    """Go on in a user, mount and network namespace of this process's own."""
    if "FTLIB_SOAK" in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    os.environ["FTLIB_SOAK"] = "inside"
    os.execvp("unshare", ["unshare", "-Urmn", sys.executable, *sys.argv])


class JobSoak:
    """One job, broken again and again until it gets through.

    `over`: sweep, or ray (a run on two workers). Its home is a disk of its own.
    """

    def __init__(self, folder, rng, over, count, *, server=False):
        self.home, self.rng, self.over, self.count = folder / "home", rng, over, count
        self.workers = 2
        self.home.mkdir(parents=True)
        self.outputs = folder / "outputs"
        self.outputs.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600m", "soak", str(self.home)], check=True
        )
        self.drawn, self.endings, self.unclear = Counter(), Counter(), []
        self.uri, self.server, self.proxy = "", None, None
        if server:
            self._start_server(folder / "server")
        self.recipe = folder / "recipe.json"
        epochs = {"ray": 4 * count, "sweep": 3}[over]
        train = {**RECIPE["train"], "epochs": epochs}
        self.recipe.write_text(json.dumps({**RECIPE, "train": train}))
        self._run("prepare", "--source", "digits")

    def _start_server(self, folder):
        folder.mkdir()
        ensure_store(f"sqlite:///{folder / 'empty.db'}")
        self.server = Server(folder, folder / "empty.db")
        self.server.start()
        self.proxy = Proxy(self.server.uri)
        self.uri = self.proxy.uri

    def _run(self, *command):
        subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{command[0]}.py"), *command[1:]],
            env=self.environment,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=SECONDS,
        )

    @property
    def environment(self):
        paths = {"FTLIB_HOME": str(self.home), "PYTHONPATH": str(ROOT), "HOME": str(self.home)}
        return {**os.environ, **paths, "MLFLOW_TRACKING_URI": self.uri, "OMP_NUM_THREADS": "1"}

    @property
    def command(self):
        if self.over == "sweep":
            trials = str(max(4, self.count // 3))
            return (
                *("sweep", "--recipe", str(self.recipe), "--space", "quick", "--name", "soak"),
                *("--trials", trials, "--search", "random", "--no-early-stopping"),
                "--retry-failed",  # a trial whose process was killed three times
            )
        cluster = ("--cluster.workers", str(self.workers), "--cluster.strict-elastic")
        return ("phase2", "--recipe", str(self.recipe), "--name", "soak", *cluster)

    def start(self):
        output = self.outputs / f"{time.monotonic_ns()}"
        with open(output, "w") as file:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / f"{self.command[0]}.py"), *self.command[1:]],
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )
        process.output = output
        return process

    def run(self, kinds=()):
        """Until it gets through, with `count` faults of `kinds` at most."""
        process, deadline = self.start(), time.monotonic() + SECONDS
        while process.poll() is None or process.returncode:
            if process.poll() is not None:
                self._note_end(process)
                process, deadline = self.start(), time.monotonic() + SECONDS
            assert time.monotonic() < deadline, f"it hangs: {process.output.read_text()[-3000:]}"
            if kinds and self.drawn.total() < self.count:
                time.sleep(self.rng.expovariate(1 / 5))
                deadline = time.monotonic() + SECONDS
                self.inject(self.rng.choice(kinds), process)
            else:
                time.sleep(0.2)
        self._run("track", "deliver")

    def _note_end(self, process):
        text = process.output.read_text()
        self.endings[process.returncode] += 1
        if process.returncode > 0 and ("error: " not in text or "Traceback" in text):
            self.unclear.append(f"exit code {process.returncode}:\n{text[-3000:]}")
        if self.endings.total() > 3 * self.count:
            raise AssertionError(f"it never gets through: {text[-3000:]}")

    def inject(self, kind, process):
        """Break the job in one way, for a few seconds at most."""
        if process.poll() is not None:
            return
        self.drawn[kind] += 1
        what = getattr(self, f"_{kind}")(process)
        print(f"{self.drawn.total():3d} of {self.count}: {kind:<7} {what}", flush=True)

    def _family(self, process):
        with contextlib.suppress(psutil.Error):
            return psutil.Process(process.pid).children(recursive=True)
        return []

    def _victim(self, process):
        """The driver, or any other process of the job."""
        family = self._family(process)
        driver = not family or self.rng.random() < 0.5
        return psutil.Process(process.pid) if driver else self.rng.choice(family)

    def _kill(self, process):
        family = self._family(process)
        with contextlib.suppress(psutil.Error):
            victim = self._victim(process)
            name = victim.name()
            victim.kill()
            if victim.pid != process.pid:
                return name
        process.wait(SECONDS)
        _, left = psutil.wait_procs(family, LINGER_SECONDS)
        left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"processes outlive the killed driver: {left}"
        return "the driver"

    def _stop(self, process):
        with contextlib.suppress(psutil.Error):
            victim = self._victim(process)
            name = victim.name()
            victim.suspend()
            time.sleep(self.rng.uniform(0, 5))
            victim.resume()
            return name
        return "nothing, it had ended"

    def _disk(self, _):
        seconds = self.rng.uniform(0, 4)
        filler = self.home / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"\0" * 1_000_000):
                pass
        time.sleep(seconds)
        filler.unlink()
        return f"full for {seconds:.1f} s"

    def _server(self, _):
        mode = self.rng.choice(("error", "hang", "slow", "gone"))
        seconds = self.rng.uniform(0, 8)
        if mode == "gone":
            self.server.kill()
            time.sleep(seconds)
            self.server.start()
        else:
            self.proxy.mode = mode
            time.sleep(seconds)
            self.proxy.mode = "pass"
        return f"{mode} for {seconds:.1f} s"

    def _net(self, _):
        seconds = self.rng.uniform(0, 3)
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        time.sleep(seconds)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return f"down for {seconds:.1f} s"

    # --- what must be as if nothing had happened ---

    def found(self):
        """What name of a part -> its value, the same after any faults."""
        run = self.home / "runs" / "soak"
        parts = {"mlflow": self._mlflow()}
        if self.over == "sweep":
            for file in sorted(run.glob("trials/*/trial.json")):
                trial = json.loads(file.read_text())
                points = [{k: v for k, v in p.items() if k != "seconds"} for p in trial["history"]]
                kept = ("values", "origin", "outcome")
                score = trial["result"].get("score")
                parts[file.parent.name] = [*(trial[k] for k in kept), score, points]
            parts["best.json"] = (run / "report" / "best.json").read_text()
        else:
            result = json.loads((run / "result.json").read_text())
            parts["history"] = scores(result)
            parts["weights"] = (run / result["best"] / "model.safetensors").read_bytes()
        return parts

    def _mlflow(self):
        """Name of each run -> its status and the points of what does not depend on speed."""
        database = (self.server.folder if self.server else self.home) / "mlflow.db"
        query = (
            "select name, status, key, step, value from runs join metrics "
            "on runs.run_uuid = metrics.run_uuid order by name, key, step, value"
        )
        with contextlib.closing(sqlite3.connect(database)) as db:
            known = {name: [status] for name, status in db.execute("select name, status from runs")}
            for name, _, key, step, value in db.execute(query):
                if key.startswith(DETERMINISTIC):
                    known[name].append((key, step, value))
        return known

    def end(self):
        if self.proxy is not None:
            self.proxy.close()
            self.server.kill()
        subprocess.run(["umount", "-l", str(self.home)], check=True)


DETERMINISTIC = ("train/loss", "train/top1", "val/loss", "val/top", "tuning/loss", "tuning/top")
"""Beginnings of the names of metrics that do not depend on the machine's speed."""


def scores(result):
    """The part of a history that does not depend on the machine's speed."""
    return [
        {k: v for k, v in row.items() if k.startswith(DETERMINISTIC)} for row in result["history"]
    ]
