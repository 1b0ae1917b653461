"""Which training images a model's weights have seen, through all the runs they come from.

Each run keeps a bitmap over the rows of its train split in `seen_rows.json`: the rows it trains on
itself, and those that its starting weights were trained on. A score that chooses settings must
come from other images: on images that the starting weights have learnt it can be too high, and
highest for the settings that forget least.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftlib.config import Run
from ftlib.data import sampler
from ftlib.data.shards import DataError, Dataset
from ftlib.settings import ConfigError, from_dict
from ftlib.storage import DamagedError, join, read_json, write_file
from ftlib.training.initial_weights import InitialWeights

FILE = "seen_rows.json"
SCHEMA = 1


@dataclass(frozen=True)
class SeenSet:
    """Seen rows of one data set's train split."""

    name: str
    path: str
    """Where the set lay."""
    mask: np.ndarray
    """bool[rows of the train split]."""


@dataclass(frozen=True)
class SeenRows:
    """The training images that some weights have seen."""

    sets: Mapping[str, SeenSet] = field(default_factory=dict)
    """By the digest of the data set."""
    runs: tuple[str, ...] = ()
    """Names of the runs that trained the weights, the latest first."""
    unknown: tuple[str, ...] = ()
    """Weights among their origins without a record of their images, such as published ones."""

    def count(self, digest: str) -> int:
        """Seen images of the data set with that digest."""
        return int(self.sets[digest].mask.sum()) if digest in self.sets else 0

    def mask(self, dataset: Dataset) -> np.ndarray:
        """bool[rows of the train split of `dataset`]."""
        known = self.sets.get(dataset.digest)
        return known.mask if known else np.zeros(len(dataset.split("train")), bool)

    def trained(self, run: str, dataset: Dataset, rows: np.ndarray) -> SeenRows:
        """With `rows` of the train split of `dataset` added, which `run` trains on."""
        mask = self.mask(dataset).copy()
        mask[rows] = True
        added = SeenSet(dataset.name, dataset.path, mask)
        return SeenRows({**self.sets, dataset.digest: added}, (run, *self.runs), self.unknown)

    def in_split(self, dataset: Dataset, split: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """(bool[rows of the split], data sets that could not be compared).

        Within one data set rows are compared, across data sets the bytes of the pictures. Data
        sets that are no longer where they were cannot be compared.
        """
        seen = np.zeros(len(dataset.split(split)), bool)
        if split == "train":
            seen |= self.mask(dataset)
        unchecked = []
        for digest, other in self.sets.items():
            if digest == dataset.digest or not other.mask.any():
                continue
            try:
                theirs = Dataset.open(other.path)
                if theirs.digest != digest:
                    raise DataError(f"{other.path} holds another data set now")
                known = theirs.split("train").sha256[other.mask]
                seen |= np.isin(dataset.split(split).sha256, known)
            except DataError:
                unchecked.append(f"{other.name}@{digest[:8]}")
        return seen, tuple(unchecked)

    @property
    def digest(self) -> str:
        """sha256 (hex) of what was seen."""
        content = hashlib.sha256()
        for digest, seen in sorted(self.sets.items()):
            content.update(f"{digest} {len(seen.mask)} ".encode())
            content.update(np.packbits(seen.mask).tobytes())
        return content.hexdigest()

    def to_json(self) -> bytes:
        sets = [
            {
                "name": seen.name,
                "digest": digest,
                "path": seen.path,
                "rows": len(seen.mask),
                "seen": int(seen.mask.sum()),
                "bitmap": base64.b64encode(
                    zlib.compress(np.packbits(seen.mask).tobytes(), 9)
                ).decode(),
            }
            for digest, seen in self.sets.items()
        ]
        values = {
            "schema": SCHEMA,
            "digest": self.digest,
            "sets": sets,
            "runs": list(self.runs),
            "unknown": list(self.unknown),
        }
        return json.dumps(values, indent=1).encode()

    @classmethod
    def from_json(cls, values: Any) -> SeenRows:
        """Raises DamagedError when the contents do not fit their digest."""
        try:
            sets = {
                str(entry["digest"]): SeenSet(
                    str(entry["name"]),
                    str(entry["path"]),
                    _unpack(entry["bitmap"], int(entry["rows"])),
                )
                for entry in values["sets"]
            }
            found = cls(sets, tuple(values["runs"]), tuple(values["unknown"]))
            if found.digest != values["digest"]:
                raise ValueError("its digest does not fit its contents")
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DamagedError(f"{FILE} is damaged ({error})") from None
        return found


def _unpack(bitmap: str, rows: int) -> np.ndarray:
    if rows < 0:
        raise ValueError(f"{rows} rows")
    unpacker = zlib.decompressobj()
    packed = unpacker.decompress(base64.b64decode(bitmap), (rows + 7) // 8 + 1)
    bits = np.frombuffer(packed, np.uint8)
    if len(bits) != (rows + 7) // 8:
        raise ValueError(f"a bitmap of {8 * len(bits)} bits for {rows} rows")
    return np.unpackbits(bits, count=rows).astype(bool)


def of_weights(
    source: InitialWeights | None,
    init_from: str,
    runs_root: str,
    dataset: Dataset | None = None,
    later: tuple[str, ...] = (),
) -> SeenRows:
    """What the starting weights of a run have seen.

    Args:
        init_from: the weights as the run names them.
        dataset: the data set at hand, which may have been moved since a run was trained on it.
        later: folders of runs that come from these weights.
    """
    if source is None:
        return SeenRows(unknown=() if init_from == "scratch" else (init_from,))
    candidates = [source.uri.rstrip("/").rsplit("/", 2)[0]]  # RUN/best/step-...
    if source.run_name:
        candidates.append(join(runs_root, source.run_name))
    for run_dir in candidates:
        if source.kind != "run" or run_dir in later:
            continue
        if (found := of_run(run_dir, runs_root, dataset, later)) is not None:
            return found
    return SeenRows(unknown=(source.label,))


def of_run(
    run_dir: str,
    runs_root: str,
    dataset: Dataset | None = None,
    later: tuple[str, ...] = (),
) -> SeenRows | None:
    """What the weights of the run in `run_dir` have seen; None where there is no run.

    Runs of earlier versions kept no bitmap. Theirs is computed from their settings, if their data
    set is the one at hand or still lies where it was. Arguments as of `of_weights`.
    """
    try:
        if (stored := read_json(join(run_dir, FILE))) is not None:
            return SeenRows.from_json(stored)
    except DamagedError:
        pass  # computed again below
    try:
        about = read_json(join(run_dir, "run.json"))
    except DamagedError:
        return None
    if about is None:
        return None
    name = run_dir.rstrip("/").rsplit("/", 1)[-1]
    try:
        run = from_dict(Run, about["run"])
        digest = about["data"]["digest"]
        own = dataset
        if own is None or own.digest != digest:
            own = Dataset.open(about["data"]["path"])
        if own.digest != digest:
            raise DataError(f"{own.path} holds another data set now")
    except (ConfigError, DataError, KeyError):
        return SeenRows(unknown=(name,))
    source = InitialWeights.from_dict(about["init"]) if about.get("init") else None
    before = of_weights(source, run.model.init_from, runs_root, dataset, (run_dir, *later))
    rows, _ = sampler.run_rows(own.split("train").labels, run.data)
    return before.trained(name, own, rows)


def record(
    run_dir: str, run: Run, dataset: Dataset, source: InitialWeights | None, runs_root: str
) -> SeenRows:
    """Write what the weights of `run` will have seen into its folder, unless it is there."""
    try:
        if (stored := read_json(join(run_dir, FILE))) is not None:
            return SeenRows.from_json(stored)
    except DamagedError:
        pass
    before = of_weights(source, run.model.init_from, runs_root, dataset)
    rows, _ = sampler.run_rows(dataset.split("train").labels, run.data)
    seen = before.trained(run.name, dataset, rows)
    write_file(join(run_dir, FILE), seen.to_json())
    return seen
