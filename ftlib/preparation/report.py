"""What preparation tells: progress while it runs, what was refused and repaired and why, and whether the result can be used."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

import numpy as np

from ftlib import storage
from ftlib.data.shards import DataError, Dataset
from ftlib.preparation.sources import Found

ON_PURPOSE = ("reduced", "reencoded", "tiled")
"""Changes that were asked for, and are counted but not listed as repairs."""
EXAMPLES = 20
MEANING = {
    "wrong_extension": "the name says another kind than the bytes; the bytes are believed",
    "orientation": "EXIF orientation applied to the pixels",
    "grey": "grey, stored with three channels",
    "cmyk": "CMYK converted to RGB",
    "alpha": "transparent pixels laid over the background colour",
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
        self, out: str, found: Found, records: list[dict[str, Any]], max_bad_fraction: float
    ) -> None:
        self.out = out
        self._classes = found.classes
        self._limit = max_bad_fraction
        self._found = found
        self.refused = [
            [file, split, name, "link", why] for file, split, name, why in found.refused_links
        ] + [row for r in records for row in r["refused"]]
        self.repaired = [
            [file, split, name, kept]
            for r in records
            for file, split, name, all_ in r["repaired"]
            if (kept := " ".join(word for word in all_.split() if word not in ON_PURPOSE))
        ]
        self._on_purpose = Counter(
            word
            for r in records
            for *_, all_ in r["repaired"]
            for word in all_.split()
            if word in ON_PURPOSE
        )
        self.files = len(found.entries) + len(found.refused_links)
        self.warnings = list(found.warnings)
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
            "left_aside_by_extension": self._found.ignored,
            "warnings": self.warnings,
        }

    @property
    def summary(self) -> dict[str, Any]:
        return {
            **self.counts,
            "identical": self.duplicates,
            "refused_files": [
                dict(zip(("file", "split", "class", "reason", "detail"), row))
                for row in self.refused
            ],
            "repaired_files": [
                dict(zip(("file", "split", "class", "repairs"), row)) for row in self.repaired
            ],
        }

    def write(self) -> None:
        storage.write_file(
            storage.join(self.out, "report.json"),
            json.dumps(self.summary, indent=1, ensure_ascii=False).encode(),
        )
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(("action", "file", "split", "class", "why", "detail"))
        rows.writerows(("refused", *row) for row in self.refused)
        rows.writerows(
            ("repaired", *row, "; ".join(map(meaning, row[3].split()))) for row in self.repaired
        )
        storage.write_file(storage.join(self.out, "report.csv"), table.getvalue().encode())

    def check(self, train: list[int], val: list[int]) -> None:
        """Raise DataError when too much was refused or a class has nothing left; warn when val has lost a class."""
        first = "; ".join(f"{file}: {detail}" for file, _, _, _, detail in self.refused[:3])
        where = f"All of them, with reasons: {storage.join(self.out, 'report.csv')}"
        if lost := [name for name, n in zip(self._classes, train) if n == 0]:
            raise DataError(
                f"no usable training picture is left of {len(lost)} of {len(train)} classes ({', '.join(lost[:5])}). First refused: {first}. {where}"
            )
        share = len(self.refused) / self.files
        if share > self._limit:
            raise DataError(
                f"{len(self.refused):,} of {self.files:,} files were refused ({100 * share:.3g} %), more than --max-bad-fraction {self._limit:g} allows. First: {first}. {where}. "
                "Repair or delete them, or raise --max-bad-fraction; the same command goes on where it stopped"
            )
        had = {e.label for e in self._found.entries if e.split == "val"}
        if gone := [self._classes[label] for label in sorted(had) if val[label] == 0]:
            self.warnings.append(
                f"no usable validation picture is left of {', '.join(gone[:5])}{' ...' if len(gone) > 5 else ''}"
            )

    def identical(self, indexes: dict[str, np.ndarray], dataset: Dataset | None) -> None:
        """Find pictures stored with the same bytes: between the splits (scores would flatter), and under two labels (one is wrong)."""
        ids = np.concatenate([indexes[s]["id"] for s in ("train", "val")])
        labels = np.concatenate([indexes[s]["label"] for s in ("train", "val")])
        held_out = np.arange(len(ids)) >= len(indexes["train"])
        order = np.lexsort((held_out, ids))
        same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        pairs = np.stack([order[same], order[same + 1]], axis=1)
        across = pairs[held_out[pairs[:, 0]] != held_out[pairs[:, 1]]]
        contradictory = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
        self.duplicates = {
            "pictures": len(pairs),
            "in_train_and_val": len(across),
            "under_two_labels": len(contradictory),
        }
        for found, text in (
            (across, "in val is also in train, byte for byte: scores will flatter"),
            (contradictory, "lies in two classes: one of the labels is wrong"),
        ):
            if len(found):
                names = [
                    [self._name(dataset, indexes, int(i)) for i in pair]
                    for pair in found[:EXAMPLES]
                ]
                self.duplicates[f"examples_{'across' if found is across else 'labels'}"] = names
                self.warnings.append(
                    f"{names[0][0]} = {names[0][1]}: a picture {text}"
                    + (f" ({len(found):,} such pairs, see report.json)" if len(found) > 1 else "")
                )

    @staticmethod
    def _name(dataset: Dataset | None, indexes: dict[str, np.ndarray], position: int) -> str:
        split = "train" if position < len(indexes["train"]) else "val"
        row = position - (len(indexes["train"]) if split == "val" else 0)
        return dataset.split(split).path(row) if dataset is not None else f"{split} row {row}"


def text(
    path: str, dataset: Dataset, report: dict[str, Any], seconds: float, already_done: bool
) -> str:
    """The last words of jobs/prepare.py: counts, what was refused and repaired, where the report is, what to do next."""
    train, val = len(dataset.split("train")), len(dataset.split("val"))
    size = sum(
        shard["bytes"] for split in dataset.manifest["splits"].values() for shard in split["shards"]
    )
    counts, spread = (
        dataset.manifest["splits"]["train"]["per_class"],
        dataset.manifest["statistics"],
    )
    each = (
        f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    )
    lines = [
        f"{'Already prepared, nothing to do' if already_done else 'Prepared'}: {dataset.name} ({dataset.digest[:12]}) at {path}"
        + ("" if already_done else f" in {seconds:.1f} s"),
        f"  {train:,} training and {val:,} validation pictures of {len(dataset.classes)} classes ({each} each in train), {_size(size)}",
        f"  median picture {spread['width']['median']} x {spread['height']['median']} pixels, {_size(spread['bytes']['median'])}; mean {_floats(spread['mean'])}, std {_floats(spread['std'])}",
    ]
    for title, total, kinds in (
        ("refused", report["refused"], report["refused_by_reason"]),
        ("repaired", report["repaired"], report["repaired_by_kind"]),
    ):
        lines.append(
            f"  {title} {total:,} of {report['files']:,} files"
            + (
                ": " + ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in kinds.items())
                if total
                else ""
            )
        )
    for row in report["refused_files"][:5]:
        lines.append(f"    {row['file']}: {row['detail']}")
    if report["refused"] > 5:
        lines.append(f"    ... and {report['refused'] - 5:,} more")
    if bits := dataset.manifest["made"].get("rules", {}).get("depth_bits"):
        lines.append(
            f"  pictures of more than 8 bits: {bits} bits are used, so 0 to {(1 << bits) - 1:,} "
            "become black to white (--depth-range chooses other values)"
        )
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    lines.append(f"  report: {storage.join(path, 'report.csv')} (and report.json)")
    lines.append(f"Next: python jobs/phase1.py --data.path {shlex.quote(path)}")
    return "\n".join(lines)


def _floats(values: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def _size(n: float) -> str:
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        del units[0]
    return f"{n:.0f} {units[0]}" if units[0] == "bytes" or n >= 100 else f"{n:.1f} {units[0]}"


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds and at the end."""

    def __init__(self, total: int, title: str, shown: bool) -> None:
        self._total, self._title, self._shown = total, title, shown
        self._done, self._started, self._last = 0, time.monotonic(), time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, speed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def advance(self, n: int) -> None:
        self._done += n
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done, speed=f"{self._speed():,.0f} files/s"
            )
        elif self._shown and time.monotonic() - self._last >= 10:
            self._line()

    def _speed(self) -> float:
        return self._done / max(1e-3, time.monotonic() - self._started)

    def _line(self) -> None:
        self._last = time.monotonic()
        print(
            f"{self._title}: {self._done:,} of {self._total:,} files, {self._speed():,.0f} files/s",
            file=sys.stderr,
            flush=True,
        )
