"""Training curves: loss, top-1, learning rate, gap and speed over the epochs.

Several runs are drawn beside each other, and an expected course as bands. Colors are Okabe and
Ito's, which people with any color vision tell apart; validation is solid and training dashed as
well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ftlib.report.misclassified import png
from ftlib.storage import write_file

Row = Mapping[str, float]
"""One epoch: `epoch` (1-based) and metrics such as `train/loss`, `val/top1`, `train/lr`,
`train/images_per_s`."""

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
BAND_POINTS = 3.0
"""Half width, in points of top-1, of the band around an expected course."""


def curves(
    history: Sequence[Row],
    path: str | Path,
    *,
    title: str = "",
    expected: Mapping[int, tuple[float, float]] | None = None,
) -> Figure:
    """One run's curves as a picture.

    Args:
        history: a row per epoch. Rows may lack metrics (an epoch that was not evaluated), and
            values may be NaN.
        path: the PNG to write.
        expected: epoch -> (training top-1, validation top-1) in percent, drawn as bands around
            the straight lines between them.

    Returns:
        The figure, 1650 x 900 pixels in the file.
    """
    return _save(_figure({title: history}, {title: expected or {}}), path)


def compared(
    histories: Mapping[str, Sequence[Row]],
    path: str | Path,
    *,
    expected: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> Figure:
    """Several runs, a row of panels each. The panels of a column share a scale.

    Args:
        histories: name -> rows, as in `curves`.
        expected: name -> expected course.
    """
    if not histories:
        raise ValueError("no run to draw: give at least one history")
    return _save(_figure(histories, expected or {}), path)


def split_of(history: Sequence[Row]) -> str:
    """The split that was scored in training: `tuning` where there is one, else `val`."""
    return "tuning" if any(key.startswith("tuning/") for row in history for key in row) else "val"


def series(history: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of the rows that have the metric. Rows without `epoch` count from 1."""
    points = [
        (float(row.get("epoch", number)), float(row[key]))
        for number, row in enumerate(history, 1)
        if row.get(key) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]


def gap(history: Sequence[Row], split: str) -> tuple[list[float], list[float]]:
    """(epochs, training top-1 minus `split`'s) in points."""
    points = [
        (float(row.get("epoch", number)), row["train/top1"] - row[f"{split}/top1"])
        for number, row in enumerate(history, 1)
        if "train/top1" in row and f"{split}/top1" in row
    ]
    return [x for x, _ in points], [y for _, y in points]


def _figure(
    histories: Mapping[str, Sequence[Row]],
    expected: Mapping[str, Mapping[int, tuple[float, float]]],
) -> Figure:
    alone = len(histories) == 1
    figure = Figure(
        figsize=(11, 6) if alone else (18, 3.1 * len(histories) + 0.3),
        dpi=150 if alone else 110,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    if alone:
        ((name, history),) = histories.items()
        axes = figure.subplot_mosaic(
            [["top1", "top1", "loss"], ["lr", "gap", "speed"]], height_ratios=[3, 2]
        )
        _draw(axes, history, expected.get(name, {}))
        if name:
            figure.suptitle(name, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return figure
    grid = figure.subplots(
        len(histories), 5, squeeze=False, sharey="col", width_ratios=[1.5, 1.2, 1, 1, 1]
    )
    for panels, (name, history) in zip(grid, histories.items()):
        axes = dict(zip(("top1", "loss", "gap", "lr", "speed"), panels))
        _draw(axes, history, expected.get(name, {}))
        for panel in panels:
            panel.tick_params(labelleft=True)
        axes["top1"].set_ylabel(name, fontsize=11, fontweight="bold")
    return figure


def _draw(
    axes: Mapping[str, Axes], history: Sequence[Row], expected: Mapping[int, tuple[float, float]]
) -> None:
    split = split_of(history)
    scored = {"val": "validation", "tuning": "tuning split"}[split]
    _top1(axes["top1"], history, split, scored, expected)
    for key, color, style, label in (
        ("train/loss", ORANGE, "--", "training"),
        (f"{split}/loss", BLUE, "-", scored),
    ):
        _line(axes["loss"], *series(history, key), color=color, linestyle=style, label=label)
    _finish(axes["loss"], "Loss", legend=True)
    _line(axes["lr"], *series(history, "train/lr"), color=PURPLE)
    if any(y > 0 for y in series(history, "train/lr")[1]):
        axes["lr"].set_yscale("log")
    _finish(axes["lr"], "Learning rate")
    axes["gap"].axhline(0, color=GREY, linewidth=0.8)
    _line(axes["gap"], *gap(history, split), color=GREEN)
    _finish(axes["gap"], f"Gap: training - {scored.split()[0]} (points)")
    _line(axes["speed"], *series(history, "train/images_per_s"), color=GREY)
    axes["speed"].set_ylim(bottom=0)
    axes["speed"].margins(y=0.15)
    _finish(axes["speed"], "Images per second")


def _top1(
    axis: Axes,
    history: Sequence[Row],
    split: str,
    scored: str,
    expected: Mapping[int, tuple[float, float]],
) -> None:
    epochs = sorted(expected)
    for which, color, label in ((1, BLUE, f"expected {scored}"), (0, ORANGE, "expected training")):
        if epochs:
            middle = [expected[e][which] for e in epochs]
            axis.fill_between(
                epochs,
                [m - BAND_POINTS for m in middle],
                [m + BAND_POINTS for m in middle],
                color=color,
                alpha=0.15,
                linewidth=0,
                label=label,
            )
    _line(axis, *series(history, "train/top1"), color=ORANGE, linestyle="--", label="training")
    x, y = series(history, f"{split}/top1")
    _line(axis, x, y, color=BLUE, label=scored)
    known = [(v, e) for e, v in zip(x, y) if v == v]
    title = "Top-1 (%)"
    if known:
        best, epoch = max(known, key=lambda pair: (pair[0], -pair[1]))
        axis.plot([epoch], [best], "o", color=BLUE, markersize=6, markeredgecolor="white", zorder=5)
        title += f": best {best:.2f} in epoch {epoch:g}"
    _finish(axis, title, legend=True)


def _line(axis: Axes, x: list[float], y: list[float], **style: Any) -> None:
    if x:
        axis.plot(x, y, linewidth=1.8, marker="." if len(x) <= 15 else "", **style)
    else:
        axis.text(
            0.5,
            0.5,
            "not recorded",
            transform=axis.transAxes,
            ha="center",
            va="center",
            color=GREY,
            fontsize=9,
        )


def _finish(axis: Axes, title: str, legend: bool = False) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("epoch", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(True, color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, loc="best")


def _save(figure: Figure, path: str | Path) -> Figure:
    write_file(str(path), png(figure))
    return figure
