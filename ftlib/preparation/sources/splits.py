"""Validation pictures split off train: a share of each class, or whole groups of pictures.

Groups are pictures of one patient, video or burst. Torn apart between splits, they make scores
flatter: the model has seen nearly the same picture.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ftlib.data.shards import SPLITS, DataError
from ftlib.preparation.sources.layout import Labelled
from ftlib.preparation.sources.naming import counted
from ftlib.preparation.sources.options import SourceOptions
from ftlib.text import printable

GROUP_PATTERNS = (
    r"([^/]*[0-9][^/]*?)[-_. (]+(?:[A-Za-z]{0,8}[0-9]+|left|right)[)]?[.][^./]+$",
    r"([^/]*[0-9][^/]*)/[^/]+$",
)
"""Names that look like those of groups: patient03_07.png, 12_left.jpeg, video3/0007.jpg."""
FEWEST_GROUPS = 3
LARGEST_GROUP = 1 / 3
"""Share of all pictures. A larger group is a word that all names have."""


class TornGroup(NamedTuple):
    """A group with pictures in more than one split."""

    name: str
    counts: dict[str, int]
    """Split -> pictures."""

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {split}" for split, n in self.counts.items())
        return f"{printable(self.name)}: {counts}"


def torn_groups(groups: Iterable[str], splits: Iterable[str]) -> list[TornGroup]:
    """The groups (a name for each picture, empty for none) that lie in more than one split, the one
    with the most pictures outside train first."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for group, split in zip(groups, splits):
        if group:
            found[group][split or "train"] += 1
    torn = [
        TornGroup(name, {split: counts[split] for split in SPLITS if counts[split]})
        for name, counts in found.items()
        if len(counts) > 1
    ]
    return sorted(torn, key=lambda g: (g.counts.get("train", 0) - sum(g.counts.values()), g.name))


def guessed_groups(
    files: Sequence[str], splits: Sequence[str], classes: int
) -> tuple[str, list[str]]:
    """(pattern, a group for each file name, empty where it fits none), for names that look like
    those of groups: several in each class, and most pictures in a group of which one split has at
    least two (numbers that start anew in each split are no groups).

    Without such names: ("", [])
    """
    for pattern in GROUP_PATTERNS:
        compiled = re.compile(pattern)
        groups = [match[1] if (match := compiled.search(file)) else "" for file in files]
        sizes = Counter(group for group in groups if group)
        together = Counter((g, split) for g, split in zip(groups, splits) if g)
        repeated = [sizes[g] for g in {g for (g, _), n in together.items() if n > 1}]
        if (
            len(repeated) >= max(FEWEST_GROUPS, 2 * classes)
            and sum(repeated) >= len(files) / 2
            and max(repeated) <= LARGEST_GROUP * len(files)
        ):
            return pattern, groups
    return "", []


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
    if torn := torn_groups((row.group for row in rows), (row.split for row in rows)):
        groups = len({row.group for row in rows})
        raise DataError(
            f"{counted(len(torn), 'group')} of {groups:,} have pictures in more than one split "
            f"({said(torn)}): scores would flatter. Move each group into one split, or give one "
            "folder of classes and --val-fraction"
        )


def warning_of_torn_groups(rows: Sequence[Labelled], column: str, fraction: float | None) -> str:
    """What to say where pictures that look like groups, by a table's column or by their names, lie
    in two splits; empty where none do.

    `fraction`: the share that was split off, which --group-column and --group-pattern would keep
    groups whole in.
    """
    option, groups = f"--group-column {column}", [row.group for row in rows]
    if not column:
        files = [row.file.path for row in rows]
        splits = [row.split for row in rows]
        pattern, groups = guessed_groups(files, splits, len({row.label for row in rows}))
        option = f"--group-pattern '{pattern}'"
    torn = torn_groups(groups, (row.split for row in rows))
    if not torn:
        return ""
    by = f"column {column!r}" if column else "their names"
    remedy = f"add {option}"
    if not fraction:
        remedy = (
            "move each into one split, or give one folder of classes with --val-fraction 0.1 "
            f"{option}"
        )
    held = sum(sum(group.counts.values()) - group.counts.get("train", 0) for group in torn)
    return (
        f"what {by} may group is in more than one split: {counted(len(torn), 'group')} of "
        f"{len(set(groups) - {''}):,}, with {counted(held, 'picture')} outside train "
        f"({said(torn)}). If these are patients, videos or bursts, scores will flatter: {remedy}"
    )


def said(torn: Sequence[TornGroup], most: int = 5) -> str:
    """The first groups, with their pictures in each split."""
    return "; ".join(map(str, torn[:most])) + (" ..." if len(torn) > most else "")
