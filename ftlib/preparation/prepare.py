"""Folders of pictures to a prepared set: list, plan shards, make them in parallel, check the whole, write the manifest last.

It can be killed at any moment: finished shards are kept and recognised by their sha256, and the same call goes on. A set that is
there already, made from the same files with the same rules, is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ftlib import paths, storage
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
from ftlib.preparation import executor, sources
from ftlib.preparation.depth import with_depth_bits
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.report import PreparationReport, Progress
from ftlib.preparation.shard_task import ADMISSION, PART, ShardTask, cannot_write, part_index, plan

MAX_BAD_FRACTION = 0.01
ROOM = 1.05
"""Free space asked for before the start, over the size of the files."""
ROOM_FOR_TILES = 1.2
"""The same where originals become tiles, which takes 7 % more bytes, and up to 17 % where a row of a picture divides badly."""
OURS = re.compile(r"(train|val)-\d{5}\.parquet|(train|val)\.index\.npy|\.tmp-.*")


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
    rules: PrepareOptions | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    workers: int = 0,
    engine: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> PreparationResult:
    """Prepare `source` (a folder, or a built-in name such as digits) as the set `out` (default: a folder under $FTLIB_HOME/data).

    `workers` 0 uses all CPUs; `engine` is auto, here or ray. `overwrite` replaces a set made from other files or with other rules.
    Raises DataError for everything that makes the set unusable, before anything is decoded where that can be known.
    """
    started = time.monotonic()
    rules = rules or PrepareOptions()
    if not 0 <= max_bad_fraction < 1:
        raise DataError(
            f"--max-bad-fraction {max_bad_fraction:g}: needs to be from 0 to below 1, such as {MAX_BAD_FRACTION}"
        )
    name, root = _resolve(str(source), val_fraction)
    out = paths.data_path(str(out)) if out else str(paths.home() / "data" / name)
    found = sources.scan(root, val_fraction, seed)
    _keep_apart(found.root, out)
    read = partial(_first_bytes, found.root)
    rules = with_depth_bits(rules, (e.file for e in found.entries), read)
    tasks = plan(found.root, out, found.classes, found.entries, rules)
    inputs = _inputs(found, [t.digest for t in tasks])
    older = _inputs(found, [t.digest_of(ADMISSION - 1) for t in tasks])
    with _writing(out):
        if (done := _already_there(out, {inputs, older}, overwrite)) is not None:
            return PreparationResult(
                out,
                done,
                json.loads(storage.read_file(storage.join(out, "report.json")) or b"{}"),
                True,
                time.monotonic() - started,
            )
        _check_room(out, found.entries, ROOM_FOR_TILES if rules.tiles else ROOM)
        kind = executor.choose(tasks, engine)
        with Progress(len(found.entries), f"preparing {name}", progress) as bar:
            records = executor.run(tasks, kind, workers, bar.advance)
        made = {
            "source": name,
            "folder": found.root,
            "rules": rules.to_dict(),
            "val_fraction": val_fraction,
            "seed": seed if val_fraction else None,
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {p: version(p) for p in ("pyarrow", "simplejpeg", "pillow", "numpy")},
        }
        dataset, report = _finish(out, found, tasks, records, inputs, made, max_bad_fraction)
    return PreparationResult(out, dataset, report.summary, False, time.monotonic() - started)


def _resolve(source: str, val_fraction: float | None) -> tuple[str, Path]:
    """(name, folder) of a source. A folder of that name wins over a built-in set only when it is written as a path."""
    if source in sources.names():
        if val_fraction is not None:
            raise DataError(
                f"--val-fraction would do nothing: {source} has its own val split. Leave the option out"
            )
        return source, sources.make_folders(source, paths.home() / "sources" / source)
    path = Path(os.path.abspath(Path(source).expanduser()))
    if not path.exists() and os.sep not in source:
        sources.make_folders(source, path)  # says that it is unknown, and what is known
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-.") or "pictures", path


def _keep_apart(root: str, out: str) -> None:
    if storage.is_remote(out):
        return
    real, source = os.path.realpath(out), os.path.realpath(root)
    if real == source or source.startswith(real + os.sep):
        raise DataError(
            f"--out {out} holds the source pictures. Choose another folder for the prepared set"
        )
    if real.startswith(source + os.sep):
        raise DataError(
            f"--out {out} lies within the source folder, where it would be taken for pictures. Choose another folder"
        )


@contextlib.contextmanager
def _writing(out: str) -> Iterator[None]:
    """Make `out`, see that it can be written, and keep a second preparation away from it."""
    if storage.is_remote(out):
        try:
            storage.write_file(storage.join(out, PARTS, "started"), b"")
        except (OSError, storage.StorageError) as error:
            raise DataError(
                f"cannot write {out} ({error}). Check the address and the credentials, or choose another --out"
            ) from error
        yield
        return
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise cannot_write(out, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"another process is preparing {out} right now. Wait for it, or choose another --out"
            ) from None
        yield


def _first_bytes(root: str, file: str, n: int) -> bytes:
    with open(os.path.join(root, file), "rb") as source:
        return source.read(n)


def _inputs(found: sources.Found, digests: list[str]) -> str:
    """sha256 of what a set is made from."""
    links = [list(link) for link in found.refused_links]
    return hashlib.sha256(canonical([digests, links])).hexdigest()


def _already_there(out: str, inputs: set[str], overwrite: bool) -> Dataset | None:
    """The set at `out` if it is whole and made of the same; None when there is work to do."""
    if storage.read_file(storage.join(out, MANIFEST)) is None:
        if not storage.is_remote(out):
            strange = [
                e.name
                for e in os.scandir(out)
                if not e.name.startswith(".")
                and not OURS.fullmatch(e.name)
                and e.name not in ("report.json", "report.csv")
            ]
            if strange:
                raise DataError(
                    f"--out {out} is not empty and holds no prepared set ({', '.join(sorted(strange)[:3])}). Choose a new folder"
                )
        return None
    if overwrite:
        _delete(out, MANIFEST)
        return None
    dataset = Dataset.open(out)
    if dataset.manifest["inputs"] not in inputs:
        raise DataError(
            f"{out} holds a set made from other files or with other options. Choose another --out, or give --overwrite to replace it"
        )
    return dataset


def _check_room(out: str, entries: tuple[sources.Entry, ...], room: float) -> None:
    if storage.is_remote(out):
        return
    need = int(sum(e.bytes for e in entries) * room) - sum(
        e.stat().st_size for e in os.scandir(out) if e.name.endswith(".parquet")
    )
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"cannot write {out}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free. Free some space, or choose another --out"
        )


# --- the whole --------------------------------------------------------------------------------------------------------------------


def _finish(
    out: str,
    found: sources.Found,
    tasks: list[ShardTask],
    records: list[dict[str, Any]],
    inputs: str,
    made: dict[str, Any],
    max_bad_fraction: float,
) -> tuple[Dataset, PreparationReport]:
    report = PreparationReport(out, found, records, max_bad_fraction)
    splits, indexes = {}, {}
    names = [
        s for s in SPLITS if s != "test" or any(r["split"] == s and r["rows"] for r in records)
    ]
    for split in names:
        kept = [(t, r) for t, r in zip(tasks, records) if r["split"] == split and r["rows"]]
        parts = [part_index(t) for t, _ in kept]
        for number, part in enumerate(parts):
            part["shard"] = number
        indexes[split] = np.concatenate(parts) if parts else np.zeros(0, PART)
        splits[split] = {
            "rows": len(indexes[split]),
            "per_class": np.bincount(
                indexes[split]["label"], minlength=len(found.classes)
            ).tolist(),
            "shards": [
                {key: r[key] for key in ("file", "rows", "bytes", "sha256", "content")}
                for _, r in kept
            ],
        }
    try:
        report.write()
        report.check(splits["train"]["per_class"], splits["val"]["per_class"])
        for split in names:
            splits[split]["index"] = _write_index(out, split, indexes[split])
        content = {
            "classes": list(found.classes),
            **{s: [shard["content"] for shard in splits[s]["shards"]] for s in names},
        }
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "name": out.rstrip("/").rpartition("/")[2],
            "digest": hashlib.sha256(canonical(content)).hexdigest(),
            "classes": list(found.classes),
            "splits": splits,
            "statistics": _statistics(indexes, records),
            "inputs": inputs,
            "made": made,
            "report": report.counts,
        }
        dataset = Dataset(out, manifest, None) if not storage.is_remote(out) else None
        report.identical(indexes, dataset)
        report.write()
        manifest["report"] = report.counts
        manifest["checksum"] = checksum(manifest)
        storage.write_file(storage.join(out, MANIFEST), json.dumps(manifest, indent=1).encode())
    except (OSError, storage.StorageError) as error:
        raise cannot_write(out, error) from error
    _tidy(out, manifest)
    return Dataset.open(out), report


def _write_index(out: str, split: str, parts: np.ndarray) -> dict[str, Any]:
    index = np.zeros(len(parts), INDEX)
    for field in INDEX.names or ():
        index[field] = parts[field]
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    data = buffer.getvalue()
    storage.write_file(storage.join(out, f"{split}.index.npy"), data)
    return {
        "file": f"{split}.index.npy",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _statistics(indexes: dict[str, np.ndarray], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-channel mean and standard deviation of train's pixels (0..1, every picture counting the same) and the spread of sizes."""
    train = indexes["train"]
    sums = sum(
        (np.array(r["moments"]) for r in records if r["split"] == "train"), np.zeros(6)
    ) / max(1, len(train))
    spread = {}
    for field, name in (("width", "width"), ("height", "height"), ("length", "bytes")):
        values = np.concatenate([indexes[s][field] for s in indexes])
        spread[name] = dict(
            zip(
                ("min", "p5", "median", "p95", "max"),
                np.percentile(values, (0, 5, 50, 95, 100)).round().astype(int).tolist(),
            )
        )
    return {
        "mean": sums[:3].round(4).tolist(),
        "std": np.sqrt(np.maximum(sums[3:] - sums[:3] ** 2, 0)).round(4).tolist(),
        **spread,
    }


def _delete(out: str, file: str) -> None:
    if storage.is_remote(out):
        fs, path = storage.filesystem(storage.join(out, file))
        fs.delete_file(path)
    else:
        os.unlink(os.path.join(out, file))


def _tidy(out: str, manifest: dict[str, Any]) -> None:
    """Remove what only the making needed, and shards of a set that was replaced. Left behind, they would do no harm."""
    storage.delete_folder(storage.join(out, PARTS))
    keep = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]} | {
        split["index"]["file"] for split in manifest["splits"].values()
    }
    if not storage.is_remote(out):
        for entry in os.scandir(out):
            if OURS.fullmatch(entry.name) and entry.name not in keep:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
