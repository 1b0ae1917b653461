"""What the number of rows costs: to prepare, to open, to shuffle, to the first batch, and in
memory.

The pictures are tiny, so that nothing but their number counts. Sets of up to PREPARED rows are
prepared from files as users do it; larger ones repeat one shard, whose index is written as
preparation writes it. Each set is measured in a process of its own:

    python -m ftlib.benchmark.scale SET WORKERS        # prints one line of JSON
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ftlib.benchmark.measure import Case, Cost, Part, by_turns, stream_cost
from ftlib.config import Augment, Run, Train
from ftlib.cpus import available_cpus
from ftlib.data.loader import PREFETCH, Batches, train_batches
from ftlib.data.shards import (
    FORMAT,
    INDEX,
    MANIFEST,
    SCHEMA,
    Dataset,
    FileEntry,
    checksum,
    file_sha256,
)

Say = Callable[[str], None]

ROWS = (10_000, 100_000, 1_300_000)
PREPARED = 100_000
"""Most rows that are prepared from files: more would take longer than all the rest."""
SIDE = 32
BATCH = 32
BATCHES = (200, 10_000)
"""Batches that are loaded before memory is read, and read again."""
PROCESSES = (1, 2, 8, 32)
"""Loader processes that are compared."""
COMPARED = 2000
"""Batches of each comparison: so many that what a process does first counts for little."""
CLASSES = 1000
ROWS_PER_SHARD = 4096


def benchmark(
    scratch: Path, *, workers: int, rounds: int, say: Say, rows: Sequence[int] = ROWS
) -> list[Part]:
    """One line per step and size, the sizes in memory and on disk in the notes; and what the number
    of loader processes costs."""
    costs: dict[str, list[Cost]] = {}
    notes = []
    for count in rows:
        say(f"{count:,} rows")
        folder = scratch / f"{count}-rows"
        if count <= PREPARED:
            cost = prepared(scratch / f"{count}-files", folder, count)
            costs[f"prepare, {count:,} rows"] = [cost]
            notes.append(f"{count:,} rows: {count / cost.wall:,.0f} pictures/s prepared")
        else:
            repeated(folder, count)
        found = _in_a_process(folder, workers)
        for step in ("open", "shuffle", "first batch"):
            costs[f"{step}, {count:,} rows"] = [Cost(*found[step])]
        loaders = " and ".join(f"{mib:.1f}" for mib in found["loader_mib"])
        training = " and ".join(f"{mib:.1f}" for mib in found["training_mib"])
        notes.append(
            f"{count:,} rows: manifest {found['manifest_bytes'] / 1024:,.0f} KiB, index "
            f"{found['index_bytes'] / 2**20:,.1f} MiB; opening takes {found['open_mib']:.1f} MiB; "
            f"a loader process has {loaders} MiB of its own, the training process {training} MiB, "
            f"after {BATCHES[0]:,} and {BATCHES[1]:,} batches"
        )
    smallest = Dataset.open(str(scratch / f"{rows[0]}-rows"))
    sized = Part("Rows", "set", costs, [], notes)
    return [sized, loader_processes(smallest, rounds=rounds, say=say)]


def loader_processes(
    dataset: Dataset, *, rounds: int, say: Say, counts: Sequence[int] = PROCESSES
) -> Part:
    """Tiny pictures through more and more processes, so that what the processes cost each other
    shows: CPU and wall time of all per batch, memory, and the time per batch beyond what the work
    takes on all CPUs."""
    memory: dict[str, list[float]] = {}

    def case(workers: int) -> Case:
        name = f"loader processes: {workers}"

        @contextmanager
        def opened() -> Iterator[Iterator[int]]:
            with _stream(dataset, np.arange(len(dataset.split("train"))), workers) as stream:
                yield (len(batch.labels) for batch in stream)
                memory[name] = _own_mib(stream.process_ids)

        def run() -> Cost:
            image = stream_cost(opened, COMPARED * BATCH, PREFETCH * max(workers, 1) * BATCH)
            return Cost(image.cpu * BATCH, image.wall * BATCH)

        return Case(name, run)

    cases = [case(n) for n in counts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of more processes than CPUs
        part = by_turns("Loader processes", "batch", cases, goals=[], rounds=rounds, say=say)
    cpus = available_cpus()
    for name, costs in part.costs.items():
        beyond = statistics.median(c.wall - c.cpu / cpus for c in costs)
        part.notes.append(
            f"{name}: {1000 * beyond:.2f} ms per batch beyond the work of {cpus} CPUs; "
            f"{statistics.median(memory[name]):.1f} MiB of its own per process"
        )
    return part


def prepared(source: Path, out: Path, count: int) -> Cost:
    """Write and prepare `count` files of tiny pictures; the cost of preparing, all processes
    together."""
    from ftlib.preparation.prepare import prepare

    jpegs = _jpegs()
    for row in range(count + CLASSES // 10):
        split = "train" if row < count else "val"
        folder = source / split / f"{row % (CLASSES // 10):03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:07d}.jpg").write_bytes(jpegs[row % len(jpegs)])
    before, start = os.times(), time.perf_counter()
    prepare(source, out, progress=False)
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return Cost(cpu=cpu, wall=time.perf_counter() - start)


def repeated(out: Path, count: int) -> Dataset:
    """A set of `count` rows, as many links to one shard as it takes."""
    from ftlib.preparation.shard_writer import ShardWriter

    out.mkdir(parents=True)
    jpegs = _jpegs()
    writer = ShardWriter(out / "one")
    for row in range(ROWS_PER_SHARD):
        label = row % CLASSES
        jpeg = jpegs[row % len(jpegs)]
        name = f"{label:04d}"
        path = f"train/{name}/{row:05d}.jpg"
        writer.add(jpeg, label=label, class_name=name, path=path, size=(SIDE, SIDE))
    shard = writer.finish()
    entry = {"rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}
    splits: dict[str, Any] = {}
    for split, shards in (("train", -(-count // ROWS_PER_SHARD)), ("val", 1)):
        files = [f"{split}-{number:05d}.parquet" for number in range(shards)]
        for file in files:
            os.link(out / "one", out / file)
        index = np.tile(shard.index, shards)
        index["shard"] = np.repeat(np.arange(shards, dtype=np.int32), shard.rows)
        splits[split] = {
            "rows": len(index),
            "per_class": np.bincount(index["label"], minlength=CLASSES).tolist(),
            "shards": [{"file": file, **entry} for file in files],
            "index": _write_index(out, split, index),
        }
    (out / "one").unlink()
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "name": out.name,
        "digest": hashlib.sha256(out.name.encode()).hexdigest(),
        "classes": [f"{label:04d}" for label in range(CLASSES)],
        "splits": splits,
    }
    manifest["checksum"] = checksum(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return Dataset.open(str(out))


def _write_index(out: Path, split: str, index: np.ndarray) -> FileEntry:
    path = out / f"{split}.index.npy"
    assert index.dtype == INDEX
    np.save(path, index, allow_pickle=False)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _jpegs(count: int = 64) -> list[bytes]:
    """Different pictures of SIDE pixels."""
    from PIL import Image

    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        out = io.BytesIO()
        pixels = draw.integers(0, 256, (4, 4, 3), np.uint8).repeat(SIDE // 4, 0)
        Image.fromarray(pixels.repeat(SIDE // 4, 1)).save(out, "JPEG", quality=80)
        found.append(out.getvalue())
    return found


# --- one set ------------------------------------------------------------------------------------


def measure(path: str, workers: int, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """What the set at `path` costs: step -> [CPU seconds, wall seconds], and sizes in bytes or MiB.

    The CPU time is this process's; loader processes are not in it. `batches`: after how many
    memory is read.
    """
    from ftlib.data.sampler import epoch_order, subset

    found: dict[str, Any] = {}
    me = psutil.Process()

    def step(name: str, start: float, cpu: float) -> None:
        found[name] = [time.process_time() - cpu, time.perf_counter() - start]

    memory, start, cpu = me.memory_info().rss, time.perf_counter(), time.process_time()
    dataset = Dataset.open(path)
    step("open", start, cpu)
    found["open_mib"] = (me.memory_info().rss - memory) / 2**20

    start, cpu = time.perf_counter(), time.process_time()
    rows = subset(dataset.split("train").labels, 1.0, 0)
    epoch_order(0, 0, len(rows))
    step("shuffle", start, cpu)

    start, cpu = time.perf_counter(), time.process_time()
    found["loader_mib"], found["training_mib"] = [], []
    with _stream(dataset, rows, workers) as stream:
        next(stream)
        step("first batch", start, cpu)
        seen = 1
        for count in batches:
            for _ in range(count - seen):
                next(stream)
            seen = count
            found["loader_mib"].append(max(_own_mib(stream.process_ids), default=0.0))
            found["training_mib"] += _own_mib([me.pid])
    found["manifest_bytes"] = Path(path, MANIFEST).stat().st_size
    found["index_bytes"] = Path(path, "train.index.npy").stat().st_size
    return found


def _stream(dataset: Dataset, rows: np.ndarray, workers: int) -> Batches:
    """Endless batches of small pictures, without augmentation."""
    train = Train(epochs=1000, batch_size=BATCH, microbatch_size=BATCH)
    run = Run(augment=Augment(size=SIDE, color_jitter_p=0), train=train)
    return train_batches(
        dataset, rows, run, rank=0, world=1, start_step=0, stop_step=2**31, workers=workers
    )


def _own_mib(pids: Sequence[int]) -> list[float]:
    """Memory that each process shares with no other."""
    return [psutil.Process(pid).memory_full_info().uss / 2**20 for pid in pids]


def _in_a_process(path: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "ftlib.benchmark.scale", str(path), str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
