"""What preparation reports: progress, what was refused and repaired and why, and the verdict."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftlib import paths, storage
from ftlib.data.shards import DataError, Dataset
from ftlib.preparation.shard_task import ShardRecord
from ftlib.preparation.sources.listing import Listing
from ftlib.preparation.sources.naming import counted, listed, text_of
from ftlib.text import csv_bytes, csv_cell, printable, wrapped

ON_PURPOSE = ("reduced", "reencoded", "tiled")
"""Changes that were asked for, and are counted but not listed as repairs."""
EXAMPLES = 20
MEANING = {
    "wrong_extension": "the name says another kind than the bytes; the bytes are believed",
    "orientation": "EXIF orientation applied to the pixels",
    "grey": "gray, stored with three channels",
    "cmyk": "CMYK converted to RGB",
    "alpha": "transparent pixels laid over the background color",
    "palette": "palette converted to RGB",
    "16_bit": "more than 8 bits scaled to 8",
    "color_profile": "wide-gamut color profile converted to sRGB",
    "subsampling": "uncommon chroma subsampling, encoded again as 4:4:4",
    "decoder_warning": "decoded with a warning and encoded again (--accept-warnings)",
    "reduced": "made smaller (--max-side)",
    "reencoded": "encoded again (--quality)",
    "tiled": "stored as tiles, without loss (--tiles)",
}


def meaning(repair: str) -> str:
    """A repair's name in words."""
    return MEANING.get(repair) or f"was a {repair.removeprefix('from_').upper()}, encoded as JPEG"


class PreparationReport:
    """report.json and report.csv of a set, and the verdict on it."""

    def __init__(
        self,
        out: str,
        listing: Listing,
        records: Sequence[ShardRecord],
        max_bad_fraction: float,
    ) -> None:
        self.out = out
        self._limit = max_bad_fraction
        self._listing = listing
        self.refused = [
            [text_of(r.file), r.split, text_of(r.label), "link", text_of(r.why)]
            for r in listing.rejected
        ] + [row for record in records for row in record["refused"]]
        self.repaired: list[list[str]] = []
        self._on_purpose: Counter[str] = Counter()
        for record in records:
            for file, split, name, words in record["repaired"]:
                repairs = words.split()
                self._on_purpose.update(word for word in repairs if word in ON_PURPOSE)
                if kept := [word for word in repairs if word not in ON_PURPOSE]:
                    self.repaired.append([file, split, name, " ".join(kept)])
        self.files = len(listing.entries) + len(listing.rejected)
        self.warnings = list(listing.warnings)
        self.duplicates: dict[str, Any] = {}

    @property
    def counts(self) -> dict[str, Any]:
        """The part that the manifest carries."""
        changed = Counter(word for *_, words in self.repaired for word in words.split())
        return {
            "files": self.files,
            "refused": len(self.refused),
            "refused_by_reason": dict(Counter(row[3] for row in self.refused).most_common()),
            "repaired": len(self.repaired),
            "repaired_by_kind": dict(changed.most_common()),
            "on_purpose": dict(self._on_purpose),
            "left_aside": {text_of(why): n for why, n in self._listing.aside.items()},
            "warnings": [printable(warning) for warning in self.warnings],
        }

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of report.json."""
        refused, repaired = ("file", "split", "class", "reason", "detail"), ("file", "split")
        return {
            **self.counts,
            "identical": self.duplicates,
            "refused_files": [dict(zip(refused, row)) for row in self.refused],
            "repaired_files": [
                dict(zip((*repaired, "class", "repairs"), row)) for row in self.repaired
            ],
        }

    def write(self) -> None:
        """Write report.json and report.csv."""
        storage.write_file(
            storage.join(self.out, "report.json"),
            json.dumps(self.summary, indent=1, ensure_ascii=False).encode(),
        )
        rows: list[tuple[str, ...]] = [("action", "file", "split", "class", "why", "detail")]
        rows += [("refused", *map(csv_cell, row)) for row in self.refused]
        for row in self.repaired:
            detail = "; ".join(map(meaning, row[3].split()))
            rows.append(("repaired", *map(csv_cell, row), detail))
        storage.write_file(storage.join(self.out, "report.csv"), csv_bytes(rows))

    def check(self, per_class: Mapping[str, Sequence[int]]) -> None:
        """Raise DataError when too much was refused or a class has nothing left to train on; warn
        when another split has lost a class. `per_class` counts pictures by split and class."""
        classes = self._listing.classes
        first = "; ".join(
            f"{printable(file)}: {printable(why)}" for file, _, _, _, why in self.refused[:3]
        )
        where = f"All of them, with reasons: {storage.join(self.out, 'report.csv')}"
        lost = [name for name, n in zip(classes, per_class["train"]) if n == 0]
        if lost:
            raise DataError(
                f"no usable training picture is left of {len(lost)} of {len(classes)} classes "
                f"({listed(lost, 5)}). First refused: {first}. {where}"
            )
        share = len(self.refused) / max(1, self.files)
        if share > self._limit:
            links = sum("link leads out" in row[4] for row in self.refused)
            follow = f" {counted(links, 'link')} can be taken with --follow-links." if links else ""
            raise DataError(
                f"{len(self.refused):,} of {self.files:,} files were refused "
                f"({100 * share:.3g} %), "
                f"more than --max-bad-fraction {self._limit:g} allows. First: {first}. {where}."
                f"{follow} "
                "Repair or delete them, or raise --max-bad-fraction; the same command goes on "
                "where it stopped"
            )
        for split, words in (("val", "validation"), ("test", "test")):
            had = {e.label for e in self._listing.entries if e.split == split}
            gone = [classes[label] for label in sorted(had) if per_class[split][label] == 0]
            if gone:
                self.warnings.append(f"no usable {words} picture is left of {listed(gone, 5)}")

    def identical(self, indexes: Mapping[str, np.ndarray], dataset: Dataset | None) -> None:
        """Find pictures stored with the same bytes.

        Between splits they make scores flatter; under two labels, one of the labels is wrong.
        `indexes` holds the `PART` records of each split; names come from `dataset`.
        """
        splits = list(indexes)
        ids = np.concatenate([indexes[split]["id"] for split in splits])
        labels = np.concatenate([indexes[split]["label"] for split in splits])
        of_split = np.repeat(np.arange(len(splits)), [len(indexes[split]) for split in splits])
        starts = np.cumsum([0, *(len(indexes[split]) for split in splits)])
        order = np.lexsort((of_split, ids))
        same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        pairs = np.stack([order[same], order[same + 1]], axis=1)
        self.duplicates = {"pictures": len(pairs)}

        def named(found: np.ndarray) -> list[list[str]]:
            return [[name(int(i)) for i in pair] for pair in found[:EXAMPLES]]

        def name(position: int) -> str:
            split = splits[of_split[position]]
            row = position - int(starts[of_split[position]])
            return dataset.split(split).path(row) if dataset is not None else f"{split} row {row}"

        for one in range(len(splits)):
            for other in range(one + 1, len(splits)):
                first, second = splits[one], splits[other]
                between = (of_split[pairs[:, 0]] == one) & (of_split[pairs[:, 1]] == other)
                found = named(pairs[between])
                self.duplicates[f"in_{first}_and_{second}"] = int(between.sum())
                if found:
                    self.duplicates[f"examples_{first}_{second}"] = found
                    self.warnings.append(_leak(first, second, int(between.sum()), found))
        contradictory = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
        self.duplicates["under_two_labels"] = len(contradictory)
        if len(contradictory):
            found = named(contradictory)
            self.duplicates["examples_labels"] = found
            self.warnings.append(
                f"{counted(len(contradictory), 'picture')} in two classes, byte for byte (first: "
                f"{_pairs(found)}): one of the labels is wrong. report.json lists them"
            )


def _leak(first: str, second: str, n: int, found: list[list[str]]) -> str:
    return (
        f"{counted(n, 'picture')} of {second} also in {first}, byte for byte (first: "
        f"{_pairs(found)}): scores will flatter. report.json lists them"
    )


def _pairs(found: list[list[str]]) -> str:
    return ", ".join(f"{one} = {other}" for one, other in found[:3])


# --- the last words ---

LARGE = 50_000
"""Training pictures from which a model is trained from scratch in phases."""


def text(
    path: str, dataset: Dataset, report: dict[str, Any], seconds: float, already_done: bool
) -> str:
    """The last words of jobs/prepare.py: counts, refusals, repairs, where the report is, what is
    next."""
    done = "Already prepared, nothing to do" if already_done else "Prepared"
    took = "" if already_done else f" in {seconds:.1f} s"
    lines = [
        f"{done}: {printable(dataset.name)} ({dataset.digest[:12]}) at {printable(path)}{took}",
        *_counts(dataset),
    ]
    for title, total, kinds in (
        ("refused", report["refused"], report["refused_by_reason"]),
        ("repaired", report["repaired"], report["repaired_by_kind"]),
    ):
        reasons = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in kinds.items())
        line = f"  {title} {total:,} of {report['files']:,} files"
        lines.append(f"{line}: {reasons}" if total else line)
    for row in report["refused_files"][:5]:
        lines.append(f"    {printable(row['file'])}: {printable(row['detail'])}")
    if report["refused"] > 5:
        lines.append(f"    ... and {report['refused'] - 5:,} more")
    if before := dataset.manifest["made"].get("before"):
        lines.append(
            f"  added to {before['digest'][:12]}: runs on that set go on with a copy of it alone; "
            "new runs see all pictures"
        )
    if bits := dataset.manifest["made"].get("rules", {}).get("depth_bits"):
        lines.append(
            f"  pictures of more than 8 bits: {bits} bits are used, so 0 to {(1 << bits) - 1:,} "
            "become black to white (--depth-range chooses other values)"
        )
    lines += [f"  warning: {printable(warning)}" for warning in report["warnings"]]
    lines.append(f"  report: {storage.join(path, 'report.csv')} (and report.json)")
    return "\n".join([*(wrapped(line, "    ") for line in lines), *next_steps(path, dataset)])


def _counts(dataset: Dataset) -> list[str]:
    about = dataset.manifest
    size = sum(shard["bytes"] for split in about["splits"].values() for shard in split["shards"])
    per_class, spread = about["splits"]["train"]["per_class"], about["statistics"]
    low, high = min(per_class), max(per_class)
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    test = f", {len(dataset.split('test')):,} test" if "test" in dataset.splits else ""
    train, val = len(dataset.split("train")), len(dataset.split("val"))
    return [
        f"  {train:,} training and {val:,} validation{test} pictures of {len(dataset.classes)} "
        f"classes ({each} each in train), {_size(size)}",
        f"  median picture {spread['width']['median']} x {spread['height']['median']} pixels, "
        f"{_size(spread['bytes']['median'])}; mean {_floats(spread['mean'])}, std "
        f"{_floats(spread['std'])}",
    ]


def next_steps(path: str, dataset: Dataset) -> list[str]:
    """The commands that come after preparation, for a set of this size."""
    name = path.rpartition("/")[2]
    named = shlex.quote(name if paths.data_path(name) == path else path)
    small = [
        paths.job_command("probe", named),
        paths.job_command("finetune", f"--data.path {named}"),
    ]
    large = [paths.job_command("phase1", f"--data.path {named}")]
    commands = small if len(dataset.split("train")) < LARGE else large
    return [f"{'Next: ' if i == 0 else '      '}{command}" for i, command in enumerate(commands)]


def _floats(values: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def _size(n: float) -> str:
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        del units[0]
    return f"{n:.0f} {units[0]}" if units[0] == "bytes" or n >= 100 else f"{n:.1f} {units[0]}"
