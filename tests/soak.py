"""A chaos soak: break a small run at random moments until it gets through.

    make soak KILLS=30 SEED=0 FAULTS=kill,stop,disk,clock,loader
    make soak KILLS=15 OVER=sweep FAULTS=kill,stop,disk,server,net
    make soak KILLS=15 OVER=ray FAULTS=kill,stop,disk,server,net

Over `workers` (the default), training alone. Every life draws its number of workers (1 or 2,
strictly elastic), and faults of the kinds that were asked for, at random times: while starting,
restoring, stepping, writing a checkpoint, scoring.

    kill     kill -9 of all workers; the next life resumes
    stop     SIGSTOP of one worker for up to a second, then SIGCONT
    disk     every write fails for up to a second, as on a full disk
    clock    the wall clock is off by up to an hour, forward or back
    loader   kill -9 of a loader process

The end must be bit-identical to that of an undisturbed run: weights, weight average, optimizer,
metrics history.

Over `sweep` and `ray` (a run on two workers), whole jobs in a namespace of their own (Linux with
`unshare`); each is given again when it has ended:

    kill     kill -9 of the driver, or of any process below it: workers, loaders, Ray's own
    stop     SIGSTOP of one of them for up to 5 s
    disk     the disk of its home is full for up to 4 s
    server   the MLflow server answers 500, late, never, or is killed and started again
    net      the network is down for up to 3 s

The scores, the best model, the trials and all points in MLflow must be those of an undisturbed job
(of one worker, for `ray`), no run may be left open, and what ended with an error must have said one
in a line. The exit code is 1 where that does not hold.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "training"), str(HERE), str(HERE.parent)]

import soak_jobs
from soak_jobs import JobSoak, scores
from test_workers import Workers

FAULTS = ("kill", "stop", "disk", "clock", "loader")


class Soak:
    """One run, broken again and again."""

    def __init__(self, folder, rng, changes):
        self.folder, self.rng, self.changes = folder, rng, changes
        self.control = folder / "control"
        self.control.mkdir(parents=True)
        self.drawn = Counter()

    def start(self):
        world = self.rng.choice((1, 2))
        return Workers(self.folder / "run", world, self.changes, faults=self.control)

    def inject(self, kind, workers):
        """Break `workers` in one way. Returns whether they live on."""
        self.drawn[kind] += 1
        if kind == "kill":
            workers.kill()
            return False
        if kind == "stop":
            pid = self.rng.choice(workers.processes).pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.rng.uniform(0, 1))
                os.kill(pid, signal.SIGCONT)
        elif kind == "disk":
            (self.control / "disk").touch()
            time.sleep(self.rng.uniform(0, 1))
            (self.control / "disk").unlink()
        elif kind == "clock":
            (self.control / "clock").write_text(str(self.rng.uniform(-3600, 3600)))
        elif kind == "loader":
            for loader in self.loaders(workers)[:1]:
                with contextlib.suppress(psutil.Error):
                    loader.kill()
        return True

    def loaders(self, workers):
        """The loader processes: grandchildren of a worker, below its fork server."""
        found = []
        for process in workers.processes:
            with contextlib.suppress(psutil.Error):
                for server in psutil.Process(process.pid).children():
                    found += server.children()
        self.rng.shuffle(found)
        return found

    def run(self, count, kinds):
        """Draw `count` faults, or fewer if the run gets through before."""
        workers = self.start()
        for number in range(1, count + 1):
            if self.rng.random() < 0.8:
                workers.wait_for(1)
            time.sleep(self.rng.expovariate(1 / 0.8))
            if not workers.processes[0].is_alive():
                if workers.processes[0].exitcode == 0:
                    return
                workers.kill()  # a fault ended one worker: the others end too, and all start again
                workers = self.start()
            kind = self.rng.choice(kinds)
            lives = self.inject(kind, workers)
            print(f"{number:3d} of {count}: {kind:<7} {self.progress(workers)}", flush=True)
            if not lives:
                workers = self.start()
        workers.kill()

    def progress(self, workers):
        lines = [s for s in workers.lines.read_text().splitlines() if s.startswith("step")]
        reached = lines[-1] if lines else "before its first step"
        return f"{len(workers.processes)} worker(s), {reached}"


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="faults to draw (30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn and when (0)")
    over = ("workers", "sweep", "ray")
    parser.add_argument("--over", choices=over, default="workers", help="what is broken (workers)")
    known = {"workers": FAULTS, "sweep": soak_jobs.FAULTS, "ray": soak_jobs.FAULTS}
    parser.add_argument("--faults", default="kill", help="some of those above, with commas")
    asked = parser.parse_args()
    if asked.kills < 1:
        parser.error(f"--kills {asked.kills}: 1 or more, or nothing is broken")
    asked.faults = asked.faults.split(",")
    if unknown := set(asked.faults) - set(known[asked.over]):
        parser.error(
            f"--faults {','.join(sorted(unknown))}: over {asked.over} there are "
            f"{', '.join(known[asked.over])}"
        )
    return asked


def over_workers(asked, folder):
    """Break the training of one run; what came of it."""
    changes = {
        "cluster.strict_elastic": True,
        "checkpoint.every_steps": 2,
        # 21 steps a fault: most kinds let the run live on, and it must not end before the draws do.
        "train.epochs": max(2, 3 * asked.kills),
        "data.loader_workers": int("loader" in asked.faults),
    }
    truth = Workers(folder / "undisturbed", changes=changes).finish()
    steps = changes["train.epochs"] * 7
    print(f"undisturbed: {steps} steps, state {truth['digest'][:16]}", flush=True)
    soak = Soak(folder / "soak", random.Random(asked.seed), changes)
    soak.run(asked.kills, asked.faults)
    result = Workers(soak.folder / "run", changes=changes).finish()
    return {
        "faults": dict(soak.drawn),
        "identical_state": result["digest"] == truth["digest"],
        "identical_history": scores(result) == scores(truth),
    }


def over_jobs(asked, folder):
    """Break a job as a user starts it; what came of it."""
    truth = JobSoak(folder / "undisturbed", random.Random(asked.seed), asked.over, asked.kills)
    truth.workers = 1
    soak = JobSoak(
        folder / "soak", truth.rng, asked.over, asked.kills, server="server" in asked.faults
    )
    try:
        truth.run()
        expected = truth.found()
        print(f"undisturbed: {', '.join(expected)}", flush=True)
        soak.run(asked.faults)
        found = soak.found()
    finally:
        truth.end()
        soak.end()
    differ = [part for part in {**expected, **found} if expected.get(part) != found.get(part)]
    for part in differ:
        print(f"{part}:\n  {str(expected.get(part))[:2000]}\n  now {str(found.get(part))[:2000]}")
    for text in soak.unclear:
        print(f"not one clear message: {text}")
    return {
        "faults": dict(soak.drawn),
        "endings": {str(code): n for code, n in soak.endings.items()},
        "identical_parts": not differ,
        "clear_messages": not soak.unclear,
    }


def main():
    asked = options()
    if asked.over != "workers":
        soak_jobs.in_namespace()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = (over_workers if asked.over == "workers" else over_jobs)(asked, Path(folder))
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"over": asked.over, "seed": asked.seed, **found, "seconds": seconds}))
    sys.exit(0 if all(v for k, v in found.items() if k.startswith(("identical", "clear"))) else 1)


if __name__ == "__main__":
    main()
