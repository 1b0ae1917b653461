"""From pictures to a prepared set: read the source, plan shards, make them, write the manifest.

It can be killed at any moment: finished shards are kept and recognized by their sha256, and the
same call goes on. A set that is there already, made from the same files with the same rules, is
left as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ftlib import paths, storage
from ftlib.console import Progress
from ftlib.data.shards import (
    FORMAT,
    INDEX,
    MANIFEST,
    PARTS,
    SCHEMA,
    SPLITS,
    DataError,
    Dataset,
    canonical,
    checksum,
)
from ftlib.preparation import executor
from ftlib.preparation.append import Addition, merged
from ftlib.preparation.depth import with_depth_bits
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.report import PreparationReport
from ftlib.preparation.shard_task import (
    PART,
    VALIDATION_VERSION,
    ShardRecord,
    ShardTask,
    cannot_write,
    part_index,
    plan,
)
from ftlib.preparation.sources import builtin
from ftlib.preparation.sources.archive import ENDINGS
from ftlib.preparation.sources.listing import Listing, scan
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.places import read_file

MAX_BAD_FRACTION = 0.01
FREE_SPACE = 1.05
"""Free space needed before the start, over the size of the files."""
FREE_SPACE_FOR_TILES = 1.2
"""The same where originals become tiles, which takes 7 % more bytes, and up to 17 % where a row of
a picture divides badly."""
OURS = re.compile(r"(train|val|test)-\d{5}\.parquet|(train|val|test)(-\d+)?\.index\.npy|\.tmp-.*")
DEPTH_SAMPLE = 1000
"""Files of an archive or an address that are opened to find out how many bits they use."""

Understood = Callable[[Listing], None]
"""Called with what a source was taken for, before anything is written."""


@dataclass(frozen=True)
class PreparationResult:
    """A prepared set and how it came about."""

    path: str
    dataset: Dataset
    report: dict[str, Any]
    """The contents of report.json."""
    already_done: bool
    seconds: float


def prepare(
    source: str | Path,
    out: str | Path | None = None,
    *,
    val_fraction: float | None = None,
    seed: int = 42,
    reading: SourceOptions | None = None,
    rules: PrepareOptions | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    workers: int = 0,
    engine: str = "auto",
    connect_ray: executor.Connect | None = None,
    overwrite: bool = False,
    append: bool = False,
    progress: bool = True,
    understood: Understood = lambda listing: None,
) -> PreparationResult:
    """Prepare the pictures of `source` as the set `out`, by default one below $FTLIB_HOME/data.

    Args:
        source: a folder, archive, table, address, or a built-in name such as digits.
        val_fraction, seed: short for these two of `reading`.
        reading: how the source is read and split.
        rules: what is done with a picture.
        max_bad_fraction: stop where a larger share of the files is refused.
        workers: shards made at a time; 0 for all CPUs.
        engine: auto, local or ray; `connect_ray` joins or starts Ray where it is needed.
        overwrite: replace a set made from other files or with other rules.
        append: add what `source` has and the set at `out` does not.
        understood: called with the listing before anything is written. What it raises stops the
            preparation.

    Raises:
        DataError: everything that makes the set unusable, before anything is decoded where that
            can be known.
    """
    started = time.monotonic()
    executor.choose(engine)
    _check_request(max_bad_fraction, overwrite and append)
    reading = reading or SourceOptions(val_fraction=val_fraction, seed=seed)
    name, listing = list_source(source, reading, adding=append)
    out = paths.data_path(str(out)) if out else str(paths.home() / "data" / name)
    _keep_apart(listing.root, out)
    addition = Addition.of(out, listing, reading) if append else None
    if addition is not None:
        listing, rules = addition.listing, addition.rules(rules)
    understood(listing)
    rules = with_depth_bits(rules or PrepareOptions(), *_depth_sample(listing))
    tasks = _plan(listing, out, rules, addition)
    inputs = _inputs(listing, [task.digest for task in tasks])
    older = _inputs(listing, [task.digest_of(VALIDATION_VERSION - 1) for task in tasks])
    made = _made(name, listing, rules, reading)
    with _writing(out):
        same = {inputs, older} | _of_the_same_built_in(out, made)
        done = addition.unchanged() if addition else _existing(out, same, overwrite)
        if done is not None:
            report = json.loads(storage.read_file(storage.join(out, "report.json")) or b"{}")
            return PreparationResult(out, done, report, True, time.monotonic() - started)
        _check_space(out, listing, FREE_SPACE_FOR_TILES if rules.tiles else FREE_SPACE)
        with Progress(len(listing.entries), f"preparing {name}", shown=progress) as bar:
            records = executor.run(tasks, engine, workers, bar.advance, connect_ray)
        finish = _Finish(
            out=out,
            listing=listing,
            tasks=tasks,
            records=records,
            inputs=inputs,
            made=made,
            addition=addition,
        )
        dataset, report = finish.write(max_bad_fraction)
    return PreparationResult(out, dataset, report.summary, False, time.monotonic() - started)


def _check_request(max_bad_fraction: float, both: bool) -> None:
    if not 0 <= max_bad_fraction < 1:
        raise DataError(
            f"--max-bad-fraction {max_bad_fraction:g}: needs to be from 0 to below 1, such as "
            f"{MAX_BAD_FRACTION}"
        )
    if both:
        raise DataError("--overwrite and --append: give one of them")


def _plan(
    listing: Listing, out: str, rules: PrepareOptions, addition: Addition | None
) -> list[ShardTask]:
    return plan(
        listing.root,
        out,
        listing.classes,
        listing.entries,
        rules=rules,
        first=addition.first_shards if addition else None,
    )


def _made(
    name: str, listing: Listing, rules: PrepareOptions, reading: SourceOptions
) -> dict[str, Any]:
    """How a set was made, for its manifest."""
    return {
        "source": name,
        "folder": listing.root,
        "rules": rules.to_dict(),
        "val_fraction": reading.val_fraction,
        "seed": reading.seed if reading.val_fraction else None,
        "reading": reading.changed(),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {p: version(p) for p in ("pyarrow", "simplejpeg", "pillow", "numpy")},
    }


def list_source(
    source: str | Path, reading: SourceOptions, adding: bool = False
) -> tuple[str, Listing]:
    """(name for the set, the pictures) of a source; built-in sets are written as folders first.

    `adding`: one class is enough, as others are there already. A folder of that name wins over a
    built-in set only when it is written as a path.
    """
    source = str(source)
    if source in builtin.names():
        if reading.val_fraction is not None:
            raise DataError(
                f"--val-fraction would do nothing: {source} has its own val split. Leave the "
                "option out"
            )
        root = builtin.make_folders(source, paths.home() / "sources" / source)
        return source, scan(root, reading, adding)
    if not storage.is_remote(source) and os.sep not in source and not Path(source).exists():
        builtin.make_folders(source, source)  # says that it is unknown, and what is known
    last = source.split("?")[0].rstrip("/").rpartition("/")[2] or Path(source).resolve().name
    for ending in (*ENDINGS, ".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        last = last.removesuffix(ending)
    if last in (".", ".."):
        last = Path(source).resolve().name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "pictures"
    return name, scan(source, reading, adding)


def _depth_sample(listing: Listing) -> tuple[list[str], Callable[[str, int], bytes]]:
    """(files to look at, how their first bytes are read) for finding out the depth of pictures."""
    entries: Sequence[Any] = listing.entries
    away = storage.is_remote(listing.root) or any(e.place for e in entries[:1])
    if away:
        entries = entries[:: -(-len(entries) // DEPTH_SAMPLE) or 1]
    by_name = {entry.file: entry for entry in entries} if away else {}

    def read(file: str, n: int) -> bytes:
        if not away:
            with open(os.path.join(listing.root, file), "rb") as source:
                return source.read(n)
        entry = by_name[file]
        data = entry.place.read() if entry.place else read_file(listing.root, file)
        return data if n < 0 else data[:n]

    return [entry.file for entry in entries], read


def _keep_apart(root: str, out: str) -> None:
    if storage.is_remote(out) or storage.is_remote(root):
        return
    real, source = os.path.realpath(out), os.path.realpath(root)
    if real == source or source.startswith(real + os.sep):
        raise DataError(
            f"--out {out} holds the source pictures. Choose another folder for the prepared set"
        )
    if real.startswith(source + os.sep):
        raise DataError(
            f"--out {out} lies within the source folder, where it would be taken for pictures. "
            "Choose another folder"
        )


@contextlib.contextmanager
def _writing(out: str) -> Iterator[None]:
    """Make `out`, see that it can be written, and keep a second preparation away from it."""
    if storage.is_remote(out):
        try:
            storage.write_file(storage.join(out, PARTS, "started"), b"")
        except (OSError, storage.StorageError) as error:
            raise DataError(
                f"cannot write {out} ({error}). Check the address and the credentials, or choose "
                "another --out"
            ) from error
        yield
        return
    lock = FileLock(Path(out) / ".lock", blocking=False)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(
            f"another process is preparing {out} right now. Wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _inputs(listing: Listing, digests: list[str]) -> str:
    """sha256 of what a set is made from."""
    rejected = [list(row) for row in listing.rejected]
    return hashlib.sha256(canonical([digests, rejected])).hexdigest()


def _of_the_same_built_in(out: str, made: dict[str, Any]) -> set[str]:
    """The inputs of the set at `out`, if it was made of the same built-in pictures by the same
    options: their files may have other times, as in a home that was copied."""
    try:
        manifest = storage.read_json(storage.join(out, MANIFEST)) or {}
    except storage.DamagedError:  # which is said when the set is opened
        return set()
    keys = ("source", "rules", "val_fraction", "seed", "reading")
    old, new = ({k: of.get(k) for k in keys} for of in (manifest.get("made", {}), made))
    built_in = made["folder"] == str(paths.home() / "sources" / made["source"])
    return {manifest["inputs"]} if built_in and canonical(old) == canonical(new) else set()


def _existing(out: str, inputs: set[str], overwrite: bool) -> Dataset | None:
    """The set at `out` if it is whole and made of the same; None when there is work to do."""
    if storage.read_file(storage.join(out, MANIFEST)) is None:
        if not storage.is_remote(out):
            _refuse_foreign_files(out)
        return None
    if overwrite:
        _delete(out, MANIFEST)
        return None
    dataset = Dataset.open(out)
    if dataset.manifest["inputs"] not in inputs:
        raise DataError(
            f"{out} holds a set made from other files or with other options. Choose another --out, "
            "or give --overwrite to replace it, or --append to add what is new"
        )
    return dataset


def _refuse_foreign_files(out: str) -> None:
    reports = ("report.json", "report.csv")
    foreign = [
        entry.name
        for entry in os.scandir(out)
        if not entry.name.startswith(".")
        and not OURS.fullmatch(entry.name)
        and entry.name not in reports
    ]
    if foreign:
        raise DataError(
            f"--out {out} is not empty and holds no prepared set "
            f"({', '.join(sorted(foreign)[:3])}). Choose a new folder"
        )


def _check_space(out: str, listing: Listing, factor: float) -> None:
    if storage.is_remote(out):
        return
    need = int(sum(entry.bytes for entry in listing.entries) * factor)
    need -= sum(e.stat().st_size for e in os.scandir(out) if e.name.endswith(".parquet"))
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"cannot write {out}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are "
            "free. Free some space, or choose another --out"
        )


# --- the whole set ---


@dataclass(frozen=True)
class _Finish:
    """Everything that the manifest is made of."""

    out: str
    listing: Listing
    tasks: list[ShardTask]
    records: list[ShardRecord]
    inputs: str
    made: dict[str, Any]
    addition: Addition | None

    def write(self, max_bad_fraction: float) -> tuple[Dataset, PreparationReport]:
        """Check the whole and write indexes, reports and, last, the manifest. Raises DataError."""
        report = PreparationReport(self.out, self.listing, self.records, max_bad_fraction)
        indexes = self._indexes()
        try:
            report.write()
            per_class = {split: self._per_class(indexes.get(split)) for split in SPLITS}
            report.check(self._with_old(per_class))
            manifest = self._manifest(indexes, report)
            whole = None if storage.is_remote(self.out) else Dataset(self.out, manifest, None)
            report.identical(self._all_parts(indexes), whole)
            report.write()
            manifest["report"] = report.counts
            manifest["checksum"] = checksum(manifest)
            data = json.dumps(manifest, indent=1).encode()
            storage.write_file(storage.join(self.out, MANIFEST), data)
        except (OSError, storage.StorageError) as error:
            raise cannot_write(self.out, error) from error
        _tidy(self.out, manifest)
        return Dataset.open(self.out), report

    def _indexes(self) -> dict[str, np.ndarray]:
        """The `PART` records of the new pictures of each split; `test` only where there are any."""
        indexes = {}
        for split in SPLITS:
            parts = [part_index(task) for task, _ in self._kept(split)]
            first = self.addition.shards(split) if self.addition else 0
            for number, part in enumerate(parts):
                part["shard"] = first + number
            indexes[split] = np.concatenate(parts) if parts else np.zeros(0, PART)
        if not len(indexes["test"]):
            del indexes["test"]
        return indexes

    def _kept(self, split: str) -> list[tuple[ShardTask, ShardRecord]]:
        return [
            (task, record)
            for task, record in zip(self.tasks, self.records)
            if record["split"] == split and record["rows"]
        ]

    def _per_class(self, index: np.ndarray | None) -> list[int]:
        labels = index["label"] if index is not None else np.zeros(0, np.int64)
        counts: list[int] = np.bincount(labels, minlength=len(self.listing.classes)).tolist()
        return counts

    def _with_old(self, per_class: dict[str, list[int]]) -> dict[str, list[int]]:
        return self.addition.add_per_class(per_class) if self.addition else per_class

    def _all_parts(self, indexes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.addition.with_old_parts(indexes) if self.addition else indexes

    def _manifest(
        self, indexes: dict[str, np.ndarray], report: PreparationReport
    ) -> dict[str, Any]:
        splits: dict[str, dict[str, Any]] = {}
        keys = ("file", "rows", "bytes", "sha256", "content")
        for split, index in indexes.items():
            splits[split] = {
                "rows": len(index),
                "per_class": self._per_class(index),
                "shards": [{k: record[k] for k in keys} for _, record in self._kept(split)],  # type: ignore[literal-required]
            }
        statistics = _statistics(indexes, self.records)
        made, inputs = self.made, self.inputs
        if self.addition:
            old = self.addition.dataset.manifest
            splits, indexes, mean = merged(self.addition, splits, indexes, statistics)
            statistics = {**mean, **spread(indexes)}
            made = {**made, "before": {"digest": old["digest"], "made": old["made"]}}
            inputs = hashlib.sha256(canonical([old["inputs"], inputs])).hexdigest()
        suffix = self.addition.index_suffix if self.addition else ""
        for split, index in indexes.items():
            splits[split]["index"] = _write_index(self.out, f"{split}{suffix}.index.npy", index)
        classes = list(self.listing.classes)
        content = {
            "classes": classes,
            **{s: [shard["content"] for shard in splits[s]["shards"]] for s in splits},
        }
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "name": self.out.rstrip("/").rpartition("/")[2],
            "digest": hashlib.sha256(canonical(content)).hexdigest(),
            "classes": classes,
            "splits": splits,
            "statistics": statistics,
            "inputs": inputs,
            "made": made,
            "report": report.counts,
        }


def _write_index(out: str, file: str, parts: np.ndarray) -> dict[str, Any]:
    index = np.zeros(len(parts), INDEX)
    for name in INDEX.names or ():
        index[name] = parts[name]
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    data = buffer.getvalue()
    storage.write_file(storage.join(out, file), data)
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _statistics(indexes: dict[str, np.ndarray], records: Sequence[ShardRecord]) -> dict[str, Any]:
    """Per-channel mean and standard deviation of train's pixels (0..1, every picture counting the
    same) and the spread of sizes."""
    sums = np.zeros(6)
    for record in records:
        if record["split"] == "train":
            sums += np.array(record["moments"])
    sums /= max(1, len(indexes["train"]))
    return {
        "mean": sums[:3].round(4).tolist(),
        "std": np.sqrt(np.maximum(sums[3:] - sums[:3] ** 2, 0)).round(4).tolist(),
        **spread(indexes),
    }


def spread(indexes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Percentiles of width, height and bytes over all splits."""
    found = {}
    for field, name in (("width", "width"), ("height", "height"), ("length", "bytes")):
        values = np.concatenate([index[field] for index in indexes.values()])
        percentiles = np.percentile(values, (0, 5, 50, 95, 100)).round().astype(int).tolist()
        found[name] = dict(zip(("min", "p5", "median", "p95", "max"), percentiles))
    return found


def _delete(out: str, file: str) -> None:
    if storage.is_remote(out):
        fs, path = storage.filesystem(storage.join(out, file))
        fs.delete_file(path)
    else:
        os.unlink(os.path.join(out, file))


def _tidy(out: str, manifest: dict[str, Any]) -> None:
    """Remove what only the making needed, and shards of a set that was replaced. Left behind, they
    would do no harm."""
    storage.delete_folder(storage.join(out, PARTS))
    splits = manifest["splits"].values()
    keep = {shard["file"] for split in splits for shard in split["shards"]}
    keep |= {split["index"]["file"] for split in splits}
    if not storage.is_remote(out):
        for entry in os.scandir(out):
            if OURS.fullmatch(entry.name) and entry.name not in keep:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
