"""Figures of a sweep, a promotion and a comparison.

Each function draws into a new matplotlib Figure and changes nothing global.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ftlib.report import html
from ftlib.tune.importance import Importance
from ftlib.tune.spaces import Axis, Space
from ftlib.tune.statistics import Difference
from ftlib.tune.trial_store import Trial

BEST, OWN, REST, STOPPED = "#c8102e", "#111111", "#3b6ea5", "#b9c3cf"
SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "ftlib",
}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def learning_curves(trials: Sequence[Trial], best: Trial | None, split: str) -> Figure:
    """Score by epoch: stopped trials gray up to a cross, the best red, the recipe's own black."""
    with matplotlib.rc_context(SETTINGS):
        figure, ((axes,),) = _figure(7.2, 3.6)
        for trial in sorted(
            (t for t in trials if t.history),
            key=lambda t: (t is best, t.number == 0, t.outcome == "completed"),
        ):
            x, y = [p["epoch"] for p in trial.history], [p["score"] for p in trial.history]
            stopped = trial.outcome != "completed"
            color, label = _line_style(trial, best)
            axes.plot(
                x,
                y,
                color=color,
                lw=2.2 if label else 1,
                label=label,
                marker="o" if len(x) == 1 else None,
                ms=3,
            )
            if stopped:
                axes.plot(x[-1:], y[-1:], "x", color="#8594a5", ms=5)
        # First epochs, and trials that were stopped for their scores, would flatten the contest.
        floor = min(contest_floor(trials, spreads=3), _early_score(trials, best))
        below = sum(t.outcome != "completed" and (t.score or 0.0) < floor for t in trials)
        remark = f" ({below} below this figure)" if below else ""
        axes.plot([], [], "x-", color=STOPPED, label=f"stopped early{remark}")
        axes.plot([], [], color=REST, label="ran to the end")
        axes.set(xlabel="epoch", ylabel=f"top-1 of the {split} split, %")
        axes.set_ylim(floor, min(axes.get_ylim()[1], 100.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
        return figure


def _early_score(trials: Sequence[Trial], best: Trial | None) -> float:
    """The lowest score, in percent, of the best trial and the recipe after a quarter of their
    epochs. So figures of a few epochs show all of them."""
    late = [
        point["score"]
        for trial in trials
        if trial is best or trial.number == 0
        for point in trial.history[max(math.ceil(len(trial.history) / 4), 1) - 1 :]
    ]
    return min(late, default=100.0) - 1


def contest_floor(trials: Sequence[Trial], spreads: float = 1) -> float:
    """The score, in percent, from which on figures show the contest between completed trials.

    It lies below the lowest of their best scores by `spreads` times as much as the highest lies
    above it, counted as 3 points at least. Without completed trials it is the lowest score.
    """
    scores = [t.score for t in trials if t.score is not None]
    completed = [t.score for t in trials if t.score is not None and t.outcome == "completed"]
    if not completed:
        return min(scores, default=0.0)
    return max(min(completed) - spreads * max(max(completed) - min(completed), 3.0), 0.0)


def _line_style(trial: Trial, best: Trial | None) -> tuple[str, str | None]:
    """(color, label) of a learning curve."""
    if trial is best:
        return BEST, f"best: {trial.name}" + (" (the recipe)" if trial.number == 0 else "")
    if trial.number == 0:
        return OWN, "the recipe"
    return (REST if trial.outcome == "completed" else STOPPED), None


def slices(
    space: Space, names: Mapping[str, str], trials: Sequence[Trial], best: Trial | None, split: str
) -> Figure:
    """Score against each setting, shaded by order; stopped trials hollow."""
    with matplotlib.rc_context(SETTINGS):
        columns = min(len(space.axes), 3)
        rows = math.ceil(len(space.axes) / columns)
        figure, grid = _figure(3.1 * columns, 2.7 * rows, rows, columns)
        scored = [t for t in trials if t.score is not None and t.outcome in ("completed", "pruned")]
        floor = contest_floor(scored)
        for axis, axes in zip(space.axes, grid.flat):
            _slice(axes, axis, scored, best, floor)
            axes.set(xlabel=names[axis.path])
        for axes in list(grid.flat)[len(space.axes) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel(f"best top-1 ({split}), %")
        return figure


def _slice(
    axes: Any, axis: Axis, scored: Sequence[Trial], best: Trial | None, floor: float
) -> None:
    """One panel of `slices`. Trials below `floor` are triangles at the lower edge."""
    newest = max((t.number for t in scored), default=1) or 1
    with_it = [t for t in scored if axis.path in t.values]
    places: dict[Any, int] | None = None
    if axis.kind == "choice":
        values = dict.fromkeys([*axis.choices, *(t.values[axis.path] for t in with_it)])
        places = {value: place for place, value in enumerate(values)}
    shade = matplotlib.colormaps["Blues"]
    for trial in with_it:
        value = trial.values[axis.path]
        x = places[value] if places is not None else value
        if trial is best:
            axes.plot(x, trial.score, "*", color=BEST, ms=11, zorder=4, clip_on=False)
        if trial.number == 0:
            axes.plot(x, trial.score, "D", color=OWN, mec="white", ms=6, zorder=5)
        elif trial is not best:
            color = shade(0.35 + 0.6 * trial.number / newest)
            fill = "none" if trial.outcome == "pruned" else color
            _point(axes, x, trial.score or 0.0, floor=floor, ms=5, mec=color, mfc=fill)
    if places is not None:
        rotation = 20 if len(places) > 3 else 0
        axes.set_xticks(range(len(places)), [str(c) for c in places], rotation=rotation)
    elif axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=30)


def _point(axes: Any, x: float, score: float, *, floor: float, **style: Any) -> None:
    """A trial's score; a triangle at the lower edge where it is below `floor`."""
    axes.plot(x, max(score, floor), "o" if score >= floor else "v", **style)


def importances(found: Importance, names: Mapping[str, str]) -> Figure:
    with matplotlib.rc_context(SETTINGS):
        figure, ((axes,),) = _figure(6, 0.9 + 0.42 * max(len(found.shares), 2))
        if not found.shares:
            axes.text(
                0.5,
                0.5,
                found.remark,
                ha="center",
                va="center",
                wrap=True,
                transform=axes.transAxes,
            )
            axes.set_axis_off()
            return figure
        labels = [names[p] for p in found.shares][::-1]
        share, low, high = (np.array([v[i] for v in found.shares.values()])[::-1] for i in range(3))
        axes.barh(labels, 100 * share, color=REST, height=0.6)
        axes.errorbar(
            100 * share,
            labels,
            xerr=100 * np.vstack([np.maximum(share - low, 0), np.maximum(high - share, 0)]),
            fmt="none",
            ecolor=OWN,
            capsize=3,
            lw=1,
        )
        axes.set(
            xlabel=f"share of the effect on the score after epoch {found.at_epoch}, %\n"
            f"(lines: 90 % of resamples of {found.trials} trials)",
            xlim=(0, None),
        )
        axes.grid(axis="y", visible=False)
        return figure


def best_so_far(trials: Sequence[Trial], split: str) -> Figure:
    with matplotlib.rc_context(SETTINGS):
        figure, ((axes,),) = _figure(7.2, 2.6)
        scored = sorted(
            (t for t in trials if t.score is not None and t.outcome in ("completed", "pruned")),
            key=lambda t: t.number,
        )
        x, y = [t.number for t in scored], [t.score or 0.0 for t in scored]
        floor = contest_floor(scored)
        for trial in scored:
            fill = "none" if trial.outcome == "pruned" else REST
            score = trial.score or 0.0
            _point(axes, trial.number, score, floor=floor, ms=4, mec=REST, mfc=fill)
        if scored:
            axes.step(
                x, np.maximum.accumulate(y), where="post", color=BEST, lw=1.8, label="best so far"
            )
            axes.axhline(
                y[0],
                color=OWN,
                lw=1,
                ls=":",
                label="the recipe" if scored[0].number == 0 else "first trial",
            )
            axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel="trial", ylabel=f"best top-1 ({split}), %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        return figure


def differences(rows: Sequence[tuple[str, Difference, bool]], against: str) -> Figure:
    """Intervals of (name, difference, whether it is significant) around zero."""
    with matplotlib.rc_context(SETTINGS):
        figure, ((axes,),) = _figure(7.2, 0.9 + 0.45 * len(rows))
        for place, (_, d, significant) in enumerate(reversed(rows)):
            color = BEST if significant and d.points > 0 else REST
            axes.plot([d.low, d.high], [place, place], color=color, lw=2.5, solid_capstyle="round")
            axes.plot(d.points, place, "o", color=color, ms=7)
            axes.annotate(
                f"{d.points:+.2f}",
                (d.points, place),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
            )
        axes.axvline(0, color=OWN, lw=1)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
        axes.set(
            xlabel=f"points of validation top-1 against {against}, with 95 % interval",
            ylim=(-0.6, len(rows) - 0.3),
        )
        axes.grid(axis="y", visible=False)
        return figure


def curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]
) -> Figure:
    """Histories of runs over each other, a panel per metric that any of them has."""
    with matplotlib.rc_context(SETTINGS):
        shown = [
            m for m in metrics if any(m in row for h in histories.values() for row in h)
        ] or list(metrics[:1])
        figure, grid = _figure(4.2 * len(shown), 3.3, 1, len(shown))
        for metric, axes in zip(shown, grid.flat):
            for index, (name, history) in enumerate(histories.items()):
                rows = [r for r in history if metric in r]
                axes.plot(
                    [r["epoch"] for r in rows],
                    [r[metric] for r in rows],
                    color=matplotlib.colormaps["tab10"](index % 10),
                    label=name,
                    lw=1.6,
                )
            axes.set(xlabel="epoch", title=metric)
            axes.xaxis.get_major_locator().set_params(integer=True)
        next(iter(grid.flat)).legend(frameon=False, fontsize=8)
        return figure


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def drawing(figure: Figure, key: str) -> Markup:
    """The figure as SVG inside a page: ids made unique by `key`, scaled with the page."""
    out = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'id="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    width, height = re.search(r'width="([\d.]+)pt"', text), re.search(r'height="([\d.]+)pt"', text)
    assert width and height
    pixels = float(width[1]) * 4 / 3
    text = text.replace(f'height="{height[1]}pt"', "", 1)
    text = text.replace(f'width="{width[1]}pt"', f'style="max-width:{pixels:.0f}px;width:100%"', 1)
    return html.drawing(text)
