"""Finished runs side by side: settings that differ, curves, and the paired difference of their
predictions for the same validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.config import NOT_IN_FINGERPRINT, Run
from ftlib.report import html
from ftlib.settings import ConfigError, flat, from_dict
from ftlib.storage import DamagedError, join, read_json, write_file
from ftlib.text import wrapped
from ftlib.tune import figures
from ftlib.tune.statistics import Difference, holm, paired_difference
from ftlib.tune.stored_predictions import ComparisonError, StoredPredictions, predictions

BUDGET = ("train.epochs", "data.subset", "data.subset_seed")
"""Settings that decide how long a run trains, and on which images."""
CURVES = ("val/top1", "train/top1", "val/loss", "tuning/top1")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read from its folder."""

    name: str
    run_dir: str
    run: Run
    data: Mapping[str, Any]
    """name, digest, classes and path of its data set."""
    init: Mapping[str, Any] | None
    """Its starting weights; None for scratch and imagenet."""
    result: Mapping[str, Any]
    """result.json."""

    @classmethod
    def read(cls, run_dir: str, name: str = "") -> FinishedRun:
        """Raises ComparisonError when there is no finished run in `run_dir`."""
        try:
            about = read_json(join(run_dir, "run.json"))
            result = read_json(join(run_dir, "result.json"))
        except DamagedError as error:
            raise ComparisonError(str(error)) from None
        if about is None:
            raise ComparisonError(
                f"{run_dir}: there is no run. Name runs of $FTLIB_HOME/runs, or give the path of a "
                "run's folder"
            )
        if (result or {}).get("status") != "completed":
            raise ComparisonError(
                f"{run_dir}: this run is not finished. Its own command goes on with it"
            )
        try:
            run = from_dict(Run, about["run"])
        except ConfigError as error:
            raise ComparisonError(
                f"{run_dir}: its recipe is of another version of ftlib ({error})"
            ) from None
        name = name or run_dir.rstrip("/").rsplit("/", 1)[-1]
        return cls(
            name=name,
            run_dir=run_dir,
            run=run,
            data=about["data"],
            init=about.get("init"),
            result=result or {},
        )

    @cached_property
    def predictions(self) -> StoredPredictions:
        return predictions(self.run_dir)

    @property
    def init_sha256(self) -> str:
        """What tells its starting weights from others: their digest, or scratch and imagenet."""
        return (self.init or {}).get("sha256", "") or self.run.model.init_from

    @property
    def init_name(self) -> str:
        """Its starting weights for a person: how they were named, and their digest."""
        digest = str((self.init or {}).get("sha256", ""))[:8]
        return f"{self.run.model.init_from} {digest}".rstrip()

    @property
    def data_name(self) -> str:
        return f"{self.data.get('name')}@{str(self.data.get('digest'))[:8]}"

    @property
    def history(self) -> Sequence[Mapping[str, float]]:
        """Metrics by epoch."""
        return self.result.get("history", [])


def settings(run: Run) -> dict[str, Any]:
    """The settings that decide a run's result, without its seed."""
    left_out = (*NOT_IN_FINGERPRINT, "stage", "promoted_from", "seed")
    return {
        path: value
        for path, value in flat(run).items()
        if not any(path == out or path.startswith(out + ".") for out in left_out)
    }


def require_same_images(runs: Sequence[FinishedRun]) -> None:
    """Raise ComparisonError unless all runs were evaluated on the same validation images."""
    first = runs[0]
    for other in runs[1:]:
        if other.data.get("digest") != first.data.get("digest"):
            raise ComparisonError(
                f"{first.name} and {other.name} are on different data ({first.data_name} and "
                f"{other.data_name}): their scores are of different images and cannot be paired. "
                "Evaluate both on one data set"
            )
        mine, theirs = first.predictions, other.predictions
        same_rows = np.array_equal(theirs.rows, mine.rows)
        if not same_rows or not np.array_equal(theirs.labels, mine.labels):
            raise ComparisonError(
                f"{first.name} and {other.name} kept predictions for different validation images. "
                "Delete predictions.npz in both folders; they are made again"
            )


def unfair(runs: Sequence[FinishedRun]) -> list[str]:
    """Why a difference between these runs would not come from their settings alone: other data,
    other starting weights or another budget than the first run's."""
    reasons, first = [], runs[0]
    for other in runs[1:]:
        pair = f"{other.name} against {first.name}"
        if other.data.get("digest") != first.data.get("digest"):
            reasons.append(f"{pair}: other data ({other.data_name} against {first.data_name})")
        if other.init_sha256 != first.init_sha256:
            weights = f"{other.init_name} against {first.init_name}"
            reasons.append(f"{pair}: other starting weights ({weights})")
        a, b = flat(other.run), flat(first.run)
        for path in BUDGET:
            if a.get(path) != b.get(path):
                values = f"{path} is {a.get(path)} against {b.get(path)}"
                reasons.append(f"{pair}: another budget ({values})")
    return list(dict.fromkeys(reasons))


def require_fair(runs: Sequence[FinishedRun]) -> None:
    """Raise ComparisonError with every reason of `unfair`."""
    if reasons := unfair(runs):
        raise ComparisonError(
            "these runs cannot be compared as recipes:\n  "
            + "\n  ".join(reasons)
            + "\nRun them from the same weights, on the same data, for as long"
        )


# --- groups ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunGroup:
    """Runs of the same settings that differ by their seed only."""

    name: str
    runs: tuple[FinishedRun, ...]
    """By seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(r.run.seed for r in self.runs)

    @property
    def mean_top1(self) -> float:
        """Mean validation top-1 over the seeds, in percent."""
        return float(np.mean([r.predictions.top1 for r in self.runs]))

    def correct(self, seeds: Sequence[int]) -> np.ndarray:
        """bool[seeds, images]."""
        by_seed = {r.run.seed: r for r in self.runs}
        return np.stack([by_seed[s].predictions.correct for s in seeds])


def group_runs(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """Runs of the same settings, data and starting weights together, in the order of `runs`.

    Of two runs of one seed the later one counts.
    """
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        values = sorted(settings(run.run).items())
        key = repr((values, run.data.get("digest"), run.init_sha256))
        found.setdefault(key, []).append(run)
    groups = []
    for members in found.values():
        by_seed = {r.run.seed: r for r in members}
        ordered = tuple(by_seed[s] for s in sorted(by_seed))
        suffix = f" x{len(ordered)}" if len(ordered) > 1 else ""
        groups.append(RunGroup(members[0].name + suffix, ordered))
    return groups


def differing_settings(groups: Sequence[RunGroup]) -> dict[str, list[Any]]:
    """Setting -> its value in each group, of the settings that differ; None where it is missing."""
    all_settings = [settings(g.runs[0].run) for g in groups]
    paths = dict.fromkeys(p for s in all_settings for p in s)
    found = {
        p: [s.get(p) for s in all_settings]
        for p in paths
        if any(s.get(p) != all_settings[0].get(p) for s in all_settings)
    }
    if len({g.runs[0].init_sha256 for g in groups}) > 1:
        found["starting weights"] = [g.runs[0].init_name for g in groups]
    return found


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, each compared with the first."""

    groups: tuple[RunGroup, ...]
    differences: tuple[Difference, ...]
    """Of each group but the first against the first."""
    adjusted: tuple[float, ...]
    """Two-sided p-values after Holm's correction."""
    settings: Mapping[str, list[Any]]
    """See `differing_settings`."""
    cautions: tuple[str, ...]
    """What makes the comparison unfair or uncertain."""

    def rows(self) -> list[tuple[str, Difference, bool]]:
        """(group, difference, whether it is significant)."""
        compared = zip(self.groups[1:], self.differences, self.adjusted)
        return [(g.name, d, p < 0.05) for g, d, p in compared]

    def sentences(self) -> list[str]:
        first = self.groups[0]
        out = [f"{first.name}: {first.mean_top1:.2f} % validation top-1"]
        for g, d, p in zip(self.groups[1:], self.differences, self.adjusted):
            verdict = "better" if d.points > 0 else "worse"
            if p >= 0.05:
                verdict = "no significant difference"
            out.append(
                f"{g.name}: {g.mean_top1:.2f} %, {d.points:+.2f} points (95 % interval "
                f"{d.low:+.2f} to {d.high:+.2f}, p = {p:.2g}): {verdict}"
            )
        return out


def compare(runs: Sequence[FinishedRun]) -> Comparison:
    """Compare two or more finished runs on the validation images.

    Raises ComparisonError when they were evaluated on different images. What else makes the
    comparison unfair is among its `cautions`.
    """
    if len(runs) < 2:
        raise ComparisonError("a comparison needs at least two runs")
    require_same_images(runs)
    groups = group_runs(runs)
    if len(groups) < 2:
        raise ComparisonError(
            "these runs have the same settings and differ by their seed only; there is nothing to "
            "compare"
        )
    cautions = unfair(runs)
    first = groups[0]
    found = []
    for other in groups[1:]:
        common = sorted(set(other.seeds) & set(first.seeds))
        if common:
            pair = other.correct(common), first.correct(common)
        else:  # no seed in common: one run each, paired over images only
            pair = other.runs[0].predictions.correct, first.runs[0].predictions.correct
        found.append(paired_difference(*pair))
        if found[-1].seeds == 1:
            cautions.append(
                f"{other.name} against {first.name}: one run each, so the interval covers the "
                "choice of images, not that of seeds; other seeds may differ by more"
            )
    return Comparison(
        groups=tuple(groups),
        differences=tuple(found),
        adjusted=tuple(holm([d.p_different for d in found])),
        settings=differing_settings(groups),
        cautions=tuple(cautions),
    )


def write(comparison: Comparison, folder: Path, title: str = "Comparison") -> list[Path]:
    """index.html, curves.png and differences.png."""
    folder.mkdir(parents=True, exist_ok=True)
    histories = {r.name: r.history for g in comparison.groups for r in g.runs}
    drawn = {
        "curves": figures.curves(histories, CURVES),
        "differences": figures.differences(comparison.rows(), comparison.groups[0].name),
    }
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        write_file(str(files[-1]), figures.png(figure))
    names = [g.name for g in comparison.groups]
    parts = [
        *[html.paragraph(s, "lead" if i else "") for i, s in enumerate(comparison.sentences())],
        *[html.paragraph("Note: " + c, "soft") for c in comparison.cautions],
        html.section(
            "Difference on the same validation images",
            figures.drawing(drawn["differences"], "d"),
            half=True,
        ),
        html.section(
            "Settings that differ",
            html.table(
                ["setting", *names],
                [[p, *map(html.value, v)] for p, v in comparison.settings.items()],
                text_columns=(0,),
            ),
            half=True,
        ),
        html.section("Curves", figures.drawing(drawn["curves"], "c")),
    ]
    index = folder / "index.html"
    write_file(str(index), html.page(title, parts).encode())
    return [index, *files]


def text(comparison: Comparison) -> str:
    """For the terminal."""
    names = [g.name for g in comparison.groups]
    rows = [
        ["setting", *names],
        *([p, *map(html.value, v)] for p, v in comparison.settings.items()),
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    prose = [*comparison.sentences(), *(f"note: {c}" for c in comparison.cautions)]
    return "\n".join([*lines, "", *map(wrapped, prose)])


def distinct_names(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Runs of the same name (from several folders), told apart by their parent folder."""
    names = [r.name for r in runs]

    def named(run: FinishedRun) -> FinishedRun:
        if names.count(run.name) == 1:
            return run
        return replace(run, name="/".join(run.run_dir.rstrip("/").split("/")[-3::2]))

    return [named(run) for run in runs]
