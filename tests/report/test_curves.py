"""Curves show what the history holds, whatever it lacks."""

import math

import pytest
from PIL import Image

from ftlib.report.curves import compared, curves, gap, series, split_of


def course(epochs, top, split="val"):
    return [
        {
            "epoch": float(e),
            "train/loss": 4 / e,
            "train/top1": top * e / epochs,
            "train/lr": 1e-4 * (1 - e / (epochs + 1)),
            "train/images_per_s": 280.0,
            f"{split}/loss": 4.2 / e,
            f"{split}/top1": top * e / epochs - 1.5,
        }
        for e in range(1, epochs + 1)
    ]


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_every_panel_shows_its_metric(tmp_path):
    history = course(20, 68)
    figure = curves(
        history,
        tmp_path / "deep" / "curves.png",
        title="phase2",
        expected={10: (35, 30), 20: (52, 48)},
    )
    with Image.open(tmp_path / "deep" / "curves.png") as image:
        assert image.size == (1650, 900)
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert set(panels) == {
        "Top-1 (%): best 66.50 in epoch 20",
        "Loss",
        "Learning rate",
        "Gap: training - validation (points)",
        "Images per second",
    }
    top1 = panels["Top-1 (%): best 66.50 in epoch 20"]
    assert lines(top1)["validation"] == [[r["epoch"], r["val/top1"]] for r in history]
    assert lines(top1)["training"] == [[r["epoch"], r["train/top1"]] for r in history]
    assert {t.get_text() for t in top1.get_legend().get_texts()} == {
        "training",
        "validation",
        "expected training",
        "expected validation",
    }
    assert panels["Learning rate"].get_yscale() == "log"
    assert all(
        abs(y - 1.5) < 1e-9
        for _, y in panels["Gap: training - validation (points)"].get_lines()[1].get_xydata()
    )


@pytest.mark.parametrize(
    "history",
    [
        [],
        course(1, 50),
        [{"epoch": 1.0, "train/loss": 2.0}],
        [
            {
                "epoch": 1.0,
                "train/loss": math.nan,
                "val/top1": math.nan,
                "train/top1": 1.0,
                "train/lr": 0.0,
            }
        ],
        [
            {k: v for k, v in row.items() if int(row["epoch"]) % 3 == 0 or not k.startswith("val/")}
            for row in course(9, 60)
        ],
    ],
)
def test_short_and_holey_histories_are_drawn(tmp_path, history):
    curves(history, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_phases_share_the_scale_of_each_column(tmp_path):
    figure = compared(
        {"phase1": course(30, 55), "phase2": course(50, 68, "tuning")}, tmp_path / "c.png"
    )
    first, second = figure.axes[0], figure.axes[5]
    assert (
        first.get_ylim() == second.get_ylim()
        and first.get_ylabel() == "phase1"
        and second.get_ylabel() == "phase2"
    )
    assert "tuning split" in lines(second) and "validation" in lines(first)
    with pytest.raises(ValueError, match="at least one"):
        compared({}, tmp_path / "d.png")


def test_series_skip_what_is_missing():
    history = [
        {"epoch": 1.0, "a": 1.0},
        {"epoch": 2.0},
        {"epoch": 3.0, "a": 3.0, "train/top1": 5.0, "val/top1": 4.0},
    ]
    assert series(history, "a") == ([1.0, 3.0], [1.0, 3.0])
    assert gap(history, "val") == ([3.0], [1.0])
    assert split_of(history) == "val" and split_of([{"tuning/top1": 1.0}]) == "tuning"
