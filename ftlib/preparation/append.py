"""Adding pictures to a prepared set: old rows, shards, labels and splits stay as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ftlib import storage
from ftlib.data.shards import INDEX, SPLITS, DataError, Dataset
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.shard_task import PART
from ftlib.preparation.sources.layout import Entry
from ftlib.preparation.sources.listing import Listing, check_names
from ftlib.preparation.sources.naming import counted, listed, text_of
from ftlib.preparation.sources.options import SourceOptions


@dataclass(frozen=True)
class Addition:
    """What a source adds to a set."""

    dataset: Dataset
    """The set as it is."""
    listing: Listing
    """The source's pictures that the set does not have; the set's classes come first."""

    @staticmethod
    def of(out: str, listing: Listing, reading: SourceOptions) -> Addition:
        """Compare a source with the set at `out`, by names. Raises DataError."""
        dataset = Dataset.open(out)
        old = _paths(dataset)
        classes = [*dataset.classes, *(c for c in listing.classes if c not in dataset.classes)]
        check_names(listing.root, tuple(classes), reading)
        number = {name: i for i, name in enumerate(classes)}
        new = tuple(
            replace(entry, label=number[listing.classes[entry.label]])
            for entry in listing.entries
            if text_of(entry.file) not in old
        )
        _check_classes(dataset, classes, new)
        notes, known = list(listing.notes), len(listing.entries) - len(new)
        if known:
            notes.append(
                f"{counted(known, 'picture')} of that name in the set already: passed over"
            )
        if added := classes[len(dataset.classes) :]:
            notes.append(f"{counted(len(added), 'new class', 'new classes')}: {listed(added)}")
        folder = dataset.manifest["made"].get("folder")
        warnings = list(listing.warnings)
        if known and folder != listing.root:
            warnings.append(
                f"the set was made from {folder}: pictures of the same name are taken for the same "
                "ones. Rename a folder if they are others"
            )
        return Addition(
            dataset,
            replace(
                listing,
                classes=tuple(classes),
                entries=new,
                notes=tuple(notes),
                warnings=tuple(warnings),
            ),
        )

    def rules(self, asked: PrepareOptions | None) -> PrepareOptions:
        """The rules that the set was made with. Raises DataError where others are asked for."""
        made = dict(self.dataset.manifest["made"]["rules"])
        for name in ("background", "depth_range"):
            if made.get(name) is not None:
                made[name] = tuple(made[name])
        rules = PrepareOptions(**made)
        if asked not in (None, PrepareOptions()) and asked != replace(
            rules, depth_bits=asked.depth_bits if asked else None
        ):
            raise DataError(
                f"--append: {self.dataset.path} was made with other options ({made}). Leave them "
                "out, or prepare a set of its own"
            )
        return rules

    @property
    def first_shards(self) -> dict[str, int]:
        """The number of each split's first new shard."""
        found = {}
        for split, about in self.dataset.manifest["splits"].items():
            numbers = [int(re.findall(r"\d+", shard["file"])[-1]) for shard in about["shards"]]
            found[split] = max(numbers, default=-1) + 1
        return found

    @property
    def index_suffix(self) -> str:
        """Put behind the split in the names of the indexes: the old ones stay until the end."""
        file = self.dataset.manifest["splits"]["train"]["index"]["file"]
        before = re.fullmatch(r"train-(\d+)\.index\.npy", file)
        return f"-{int(before[1]) + 1 if before else 2}"

    def shards(self, split: str) -> int:
        """How many shards of a split the set has."""
        return len(self._split(split).get("shards", ()))

    def unchanged(self) -> Dataset | None:
        """The set, where the source adds nothing to it.

        Raises DataError where it is no longer the set that was read; call it under the set's lock.
        """
        if Dataset.open(self.dataset.path).digest != self.dataset.digest:
            raise DataError(
                f"{self.dataset.path} was changed by another process meanwhile. Give the same "
                "command again"
            )
        return None if self.listing.entries else self.dataset

    def add_per_class(self, per_class: dict[str, list[int]]) -> dict[str, list[int]]:
        """Counts of each split by class, old and new ones together."""
        return {split: self._sum(split, counts) for split, counts in per_class.items()}

    def _sum(self, split: str, counts: list[int]) -> list[int]:
        old = self._split(split).get("per_class", [])
        return [n + (old[i] if i < len(old) else 0) for i, n in enumerate(counts)]

    def _split(self, split: str) -> dict[str, Any]:
        found: dict[str, Any] = self.dataset.manifest["splits"].get(split, {})
        return found

    def with_old_parts(self, indexes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`PART` records of old and new pictures; new ones alone for a set at an address."""
        if storage.is_remote(self.dataset.path):
            return indexes
        found = {}
        for split in SPLITS:
            parts = [indexes[split]] if split in indexes else []
            if split in self.dataset.splits:
                parts.insert(0, self._old_parts(split))
            if parts:
                found[split] = np.concatenate(parts)
        return found

    def _old_parts(self, split: str) -> np.ndarray:
        index = _index(self.dataset, split)
        parts = np.zeros(len(index), PART)
        for name in INDEX.names or ():
            parts[name] = index[name]
        ids: list[int] = []
        for shard in self._split(split)["shards"]:
            file = self.dataset.file(shard)
            column = pq.read_table(file, columns=["sha256"], memory_map=True)["sha256"]
            ids += [int(value[:16], 16) for value in column.to_pylist()]
        parts["id"] = ids
        return parts


def merged(
    addition: Addition,
    splits: dict[str, dict[str, Any]],
    indexes: dict[str, np.ndarray],
    statistics: dict[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray], dict[str, Any]]:
    """(splits, indexes, mean and std) of the set with what is added to it."""
    old = addition.dataset
    all_splits, all_indexes = {}, {}
    n_classes = len(addition.listing.classes)
    for split in SPLITS:
        if split not in splits and split not in old.splits:
            continue
        new = splits.get(split, {"rows": 0, "per_class": [0] * n_classes, "shards": []})
        before = old.manifest["splits"].get(split, {"rows": 0, "shards": []})
        all_splits[split] = {
            "rows": before["rows"] + new["rows"],
            "per_class": addition.add_per_class({split: new["per_class"]})[split],
            "shards": [*before["shards"], *new["shards"]],
        }
        parts = [_index(old, split)] if split in old.splits else []
        if split in indexes:
            parts.append(_as_index(indexes[split]))
        all_indexes[split] = np.concatenate(parts)
    return all_splits, all_indexes, _mixed(old, splits, statistics)


def _mixed(
    old: Dataset, splits: dict[str, dict[str, Any]], statistics: dict[str, Any]
) -> dict[str, Any]:
    """Mean and std of train's pixels over old and new pictures, each counting the same."""
    weights = np.array([old.manifest["splits"]["train"]["rows"], splits["train"]["rows"]])
    parts = [old.manifest["statistics"], statistics]
    means = np.array([part["mean"] for part in parts])
    squares = np.array([part["std"] for part in parts]) ** 2 + means**2
    mean = np.average(means, axis=0, weights=weights)
    std = np.sqrt(np.maximum(np.average(squares, axis=0, weights=weights) - mean**2, 0))
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


def _index(dataset: Dataset, split: str) -> np.ndarray:
    about = dataset.manifest["splits"][split]["index"]
    index: np.ndarray = np.load(dataset.file(about), allow_pickle=False)
    return index


def _as_index(parts: np.ndarray) -> np.ndarray:
    index = np.zeros(len(parts), INDEX)
    for name in INDEX.names or ():
        index[name] = parts[name]
    return index


def _paths(dataset: Dataset) -> set[str]:
    """Names of all pictures of a set."""
    found: set[str] = set()
    for split in dataset.splits:
        for shard in dataset.manifest["splits"][split]["shards"]:
            table = pq.read_table(dataset.file(shard), columns=["path"], memory_map=True)
            found.update(table["path"].to_pylist())
    return found


def _check_classes(dataset: Dataset, classes: list[str], new: tuple[Entry, ...]) -> None:
    """Raise DataError where a new class has no picture to train on."""
    old = dataset.manifest["splits"]["train"]["per_class"]
    trained = {i for i, n in enumerate(old) if n} | {e.label for e in new if e.split == "train"}
    lost = sorted({classes[e.label] for e in new} - {classes[i] for i in trained})
    if lost:
        raise DataError(
            f"--append: no training pictures of {counted(len(lost), 'class', 'classes')} "
            f"({listed(lost)}). Add some to train"
        )
