"""The figure of a learning-rate range test."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ftlib.report.misclassified import BLUE, GREY, RED, axes, png


class Curve(Protocol):
    """`ftlib.training.lr_finder.Curve`: rates and losses of equal length."""

    @property
    def rates(self) -> np.ndarray: ...

    @property
    def losses(self) -> np.ndarray: ...

    @property
    def smooth(self) -> np.ndarray: ...


def lr_figure(
    curve: Curve, steepest: float, minimum: float, suggestion: float, recipe: str
) -> bytes:
    """PNG: loss against rate, as measured and smoothed.

    The steepest point, the minimum and the suggestion are marked.
    """
    figure, (ax,) = axes(7.5, 4.2)
    smooth = curve.smooth

    def at(rate: float) -> float:
        return float(np.interp(np.log(rate), np.log(curve.rates), smooth))

    ax.plot(curve.rates, curve.losses, color=GREY, linewidth=0.8, alpha=0.6, label="loss")
    ax.plot(curve.rates, smooth, color=BLUE, linewidth=2, label="smoothed")
    ax.axvline(
        suggestion, color=GREY, linewidth=1, linestyle="--", label=f"suggestion {suggestion:.1e}"
    )
    ax.plot(steepest, at(steepest), "v", color=BLUE, markersize=9, label=f"steepest {steepest:.1e}")
    ax.plot(minimum, at(minimum), "o", color=RED, markersize=8, label=f"minimum {minimum:.1e}")
    ax.set_xscale("log")
    low, high = smooth.min(), max(smooth[0], np.median(smooth))
    ax.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low))
    ax.set_xlabel("learning rate", fontsize=9)
    ax.set_ylabel("training loss", fontsize=9)
    ax.set_title(f"Learning-rate range test: {recipe}", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="lower left")  # below the flat start
    return png(figure)
