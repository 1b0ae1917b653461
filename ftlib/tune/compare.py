"""Finished runs side by side: what differs, their curves, and the paired difference of their answers to the same validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.config import NOT_IN_FINGERPRINT, Run
from ftlib.settings import ConfigError, flat, from_dict
from ftlib.storage import DamagedError, join, read_json
from ftlib.tune import figures, page
from ftlib.tune.statistics import Difference, holm, paired_difference
from ftlib.tune.stored_predictions import ComparisonError, StoredPredictions, answers

BUDGET = ("train.epochs", "data.subset", "data.subset_seed")
"""Settings that decide how much training a run gets, and on which images."""
CURVES = ("val/top1", "train/top1", "val/loss", "tuning/top1")


@dataclass(frozen=True)
class Finished:
    """A finished run, as its folder tells."""

    name: str
    run_dir: str
    run: Run
    data: Mapping[str, Any]
    init: Mapping[str, Any] | None
    result: Mapping[str, Any]

    @classmethod
    def read(cls, run_dir: str, name: str = "") -> Finished:
        """Raises ComparisonError when there is no finished run in `run_dir`."""
        try:
            about, result = (
                read_json(join(run_dir, "run.json")),
                read_json(join(run_dir, "result.json")),
            )
        except DamagedError as error:
            raise ComparisonError(str(error)) from None
        if about is None:
            raise ComparisonError(
                f"{run_dir}: there is no run. Name runs of $FTLIB_HOME/runs, or give the path of a run's folder"
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
        return cls(
            name or run_dir.rstrip("/").rsplit("/", 1)[-1],
            run_dir,
            run,
            about["data"],
            about.get("init"),
            result or {},
        )

    @cached_property
    def answers(self) -> StoredPredictions:
        return answers(self.run_dir)

    @property
    def init_sha256(self) -> str:
        return (self.init or {}).get("sha256", "") or self.run.model.init_from

    @property
    def history(self) -> Sequence[Mapping[str, float]]:
        return self.result.get("history", [])


def settings(run: Run) -> dict[str, Any]:
    """The settings that decide a run's result, less its seed."""
    return {
        p: v
        for p, v in flat(run).items()
        if p != "seed"
        and not any(
            p == o or p.startswith(o + ".") for o in (*NOT_IN_FINGERPRINT, "stage", "promoted_from")
        )
    }


def same_images(runs: Sequence[Finished]) -> None:
    """Raise ComparisonError unless all runs answered the same validation images."""
    first = runs[0]
    for other in runs[1:]:
        if other.data.get("digest") != first.data.get("digest"):
            raise ComparisonError(
                f"{first.name} and {other.name} are on different data ({first.data.get('name')}@{str(first.data.get('digest'))[:8]} and "
                f"{other.data.get('name')}@{str(other.data.get('digest'))[:8]}): their scores are of other images and cannot be paired. Evaluate both on one data set"
            )
        if not np.array_equal(other.answers.rows, first.answers.rows) or not np.array_equal(
            other.answers.labels, first.answers.labels
        ):
            raise ComparisonError(
                f"{first.name} and {other.name} kept answers to different validation images. Delete predictions.npz in both folders; they are made again"
            )


def unfair(runs: Sequence[Finished]) -> list[str]:
    """Why a difference between these runs would not be the settings' doing: other data, other starting weights or another budget."""
    reasons, first = [], runs[0]
    for other in runs[1:]:
        pair = f"{other.name} against {first.name}"
        if other.data.get("digest") != first.data.get("digest"):
            reasons.append(
                f"{pair}: other data ({other.data.get('name')}@{str(other.data.get('digest'))[:8]} against {first.data.get('name')}@{str(first.data.get('digest'))[:8]})"
            )
        if other.init_sha256 != first.init_sha256:
            reasons.append(
                f"{pair}: other starting weights ({_init(other)} against {_init(first)})"
            )
        a, b = flat(other.run), flat(first.run)
        for path in BUDGET:
            if a.get(path) != b.get(path):
                reasons.append(
                    f"{pair}: another budget ({path} is {a.get(path)} against {b.get(path)})"
                )
    return list(dict.fromkeys(reasons))


def _init(run: Finished) -> str:
    init = run.init or {}
    return f"{run.run.model.init_from}{' ' + str(init['sha256'])[:8] if init.get('sha256') else ''}"


def fair(runs: Sequence[Finished]) -> None:
    """Raise ComparisonError with every reason of `unfair`."""
    if reasons := unfair(runs):
        raise ComparisonError(
            "these runs cannot be compared as recipes:\n  "
            + "\n  ".join(reasons)
            + "\nRun them from the same weights, on the same data, for as long"
        )


# --- groups -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs of the same settings that differ by their seed only."""

    name: str
    runs: tuple[Finished, ...]
    """By seed."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(r.run.seed for r in self.runs)

    @property
    def mean_top1(self) -> float:
        return float(np.mean([r.answers.top1 for r in self.runs]))

    def correct(self, seeds: Sequence[int]) -> np.ndarray:
        """bool[seeds, images]."""
        of = {r.run.seed: r for r in self.runs}
        return np.stack([of[s].answers.correct for s in seeds])


def group(runs: Sequence[Finished]) -> list[Group]:
    """Runs of the same settings, data and starting weights together, in the order in which they came; of two of one seed the later."""
    found: dict[str, list[Finished]] = {}
    for run in runs:
        found.setdefault(
            repr((sorted(settings(run.run).items()), run.data.get("digest"), run.init_sha256)), []
        ).append(run)
    groups = []
    for members in found.values():
        by_seed = {r.run.seed: r for r in members}
        ordered = tuple(by_seed[s] for s in sorted(by_seed))
        groups.append(
            Group(members[0].name + (f" x{len(ordered)}" if len(ordered) > 1 else ""), ordered)
        )
    return groups


def differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Setting -> its value in each group, of the settings that are not the same in all; None where a group has no such setting."""
    all_settings = [settings(g.runs[0].run) for g in groups]
    paths = dict.fromkeys(p for s in all_settings for p in s)
    found = {
        p: [s.get(p) for s in all_settings]
        for p in paths
        if any(s.get(p) != all_settings[0].get(p) for s in all_settings)
    }
    if any(g.runs[0].init_sha256 != groups[0].runs[0].init_sha256 for g in groups):
        found["starting weights"] = [_init(g.runs[0]) for g in groups]
    return found


@dataclass(frozen=True)
class Comparison:
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    """Of each group but the first against the first."""
    adjusted: tuple[float, ...]
    """Two-sided p-values after Holm's correction."""
    settings: Mapping[str, list[Any]]
    cautions: tuple[str, ...]

    def rows(self) -> list[tuple[str, Difference, bool]]:
        return [
            (g.name, d, p < 0.05)
            for g, d, p in zip(self.groups[1:], self.differences, self.adjusted)
        ]

    def sentences(self) -> list[str]:
        first = self.groups[0]
        out = [f"{first.name}: {first.mean_top1:.2f} % validation top-1"]
        for g, d, p in zip(self.groups[1:], self.differences, self.adjusted):
            verdict = (
                "no difference can be told" if p >= 0.05 else "better" if d.points > 0 else "worse"
            )
            out.append(
                f"{g.name}: {g.mean_top1:.2f} %, {d.points:+.2f} points (95 % interval {d.low:+.2f} to {d.high:+.2f}, p = {p:.2g}): {verdict}"
            )
        return out


def compare(runs: Sequence[Finished]) -> Comparison:
    """Compare two or more finished runs on the validation images. Raises ComparisonError when they answered other images; what else makes the
    comparison unfair is among its `cautions`."""
    if len(runs) < 2:
        raise ComparisonError("a comparison needs two runs at least")
    same_images(runs)
    groups = group(runs)
    if len(groups) < 2:
        raise ComparisonError(
            "these runs have the same settings and differ by their seed only; there is nothing to compare"
        )
    cautions = unfair(runs)
    found = []
    for other in groups[1:]:
        common = sorted(set(other.seeds) & set(groups[0].seeds))
        if not common:  # one run each of other seeds: paired over images only
            common_pair = other.runs[0].answers.correct, groups[0].runs[0].answers.correct
        else:
            common_pair = other.correct(common), groups[0].correct(common)
        difference = paired_difference(*common_pair)
        found.append(difference)
        if difference.seeds == 1:
            cautions.append(
                f"{other.name} against {groups[0].name}: one run each, so the interval covers the choice of images, not that of seeds; other seeds may differ by more"
            )
    return Comparison(
        tuple(groups),
        tuple(found),
        tuple(holm([d.p_different for d in found])),
        differing(groups),
        tuple(cautions),
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
        files[-1].write_bytes(figures.png(figure))
    names = [g.name for g in comparison.groups]
    parts = [
        *[page.paragraph(s, "lead" if i else "") for i, s in enumerate(comparison.sentences())],
        *[page.paragraph("Mind: " + c, "muted") for c in comparison.cautions],
        page.heading("Difference on the same validation images"),
        figures.svg(drawn["differences"], "d"),
        page.heading("Curves"),
        figures.svg(drawn["curves"], "c"),
        page.heading("Settings that differ"),
        page.table(
            ["setting", *names],
            [[p, *map(page.value, v)] for p, v in comparison.settings.items()],
            text_columns=(0,),
        ),
    ]
    index = folder / "index.html"
    index.write_text(page.page(title, parts), encoding="utf-8")
    return [index, *files]


def text(comparison: Comparison) -> str:
    """For the terminal."""
    names = [g.name for g in comparison.groups]
    rows = [
        ["setting", *names],
        *([p, *map(page.value, v)] for p, v in comparison.settings.items()),
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    return "\n".join(
        [*lines, "", *comparison.sentences(), *(f"mind: {c}" for c in comparison.cautions)]
    )


def renamed(runs: Sequence[Finished]) -> list[Finished]:
    """Runs of the same name (from several folders) told apart by their parent folder."""
    names = [r.name for r in runs]
    return [
        r
        if names.count(r.name) == 1
        else replace(r, name="/".join(r.run_dir.rstrip("/").split("/")[-3::2]))
        for r in runs
    ]
