"""Validation pictures split off train: a share of each class, or whole groups of pictures."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from ftlib.data.shards import DataError
from ftlib.preparation.sources.layout import Labelled
from ftlib.preparation.sources.naming import counted, listed
from ftlib.preparation.sources.options import SourceOptions
from ftlib.text import printable


def split_off(files: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The files of one class that become validation: a share of them, at least one.

    They are chosen by a hash of seed and name, so that the choice for one file depends little on
    which others there are. A single file stays in train.
    """
    if len(files) < 2:
        return set()
    ordered = sorted(files, key=lambda file: _hash(seed, file))
    return set(ordered[: min(len(files) - 1, max(1, round(len(files) * fraction)))])


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def groups_split_off(rows: Sequence[Labelled], fraction: float, seed: int) -> set[str]:
    """The groups that become validation: about a share of each class, never all of one.

    Groups are tried in the order of a hash of seed and name. One is taken where the counts per
    class come nearer to the share by it (least squares).
    """
    of_group: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        of_group[row.group][row.label] += 1
    total = Counter(row.label for row in rows)
    held: Counter[str] = Counter()
    chosen: set[str] = set()
    for group in sorted(of_group, key=lambda name: _hash(seed, name)):
        counts = of_group[group]
        better = 0.0
        for label, n in counts.items():
            want = max(1.0, fraction * total[label]) - held[label]
            better += (want**2 - (want - n) ** 2) / total[label]
        if better > 0 and all(held[label] + n < total[label] for label, n in counts.items()):
            chosen.add(group)
            held += counts
    return chosen


def with_groups(rows: list[Labelled], options: SourceOptions) -> tuple[list[Labelled], int]:
    """(rows with their groups by `group_pattern`, how many names it did not match).

    A picture that belongs to no group is a group of its own.
    """
    unmatched = 0
    pattern = re.compile(options.group_pattern) if options.group_pattern else None
    found = []
    for row in rows:
        group = row.group
        if pattern and (match := pattern.search(row.file.path)):
            group = match[1] if match.groups() else match[0]
        if not group:
            unmatched += 1
            group = f"file {row.file.path}"
        found.append(row._replace(group=group))
    return found, unmatched


def refuse_torn_groups(rows: Sequence[Labelled]) -> None:
    """Raise DataError where a group has pictures in two splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.group].add(row.split or "train")
    if torn := sorted(group for group, found in splits.items() if len(found) > 1):
        first = torn[0]
        raise DataError(
            f"{counted(len(torn), 'group')} of {len(splits):,} have pictures in more than one "
            f"split (first: {printable(first)}, in {listed(sorted(splits[first]))}): scores would "
            "flatter. Move each group into one split, or give one folder of classes and "
            "--val-fraction"
        )
