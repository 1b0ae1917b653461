"""What a model gets wrong: which mistakes to look at, and the figures of a report (PNG bytes)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ftlib.lettering import fit, font
from ftlib.report.metrics import Floats, Ints, Reliability, most_confused_classes
from ftlib.text import figure_text, printable

MANY = 50
"""Classes that a confusion matrix shows; of more, the most confused ones."""
SIDE, GAP, LINE = 114, 8, 14
"""Pixels in the contact sheet: a picture's side, the space around it, a line of text."""
BLUE, RED, GREY = "#2563a8", "#c2410c", "#8a94a3"


def worst(probabilities: Floats, labels: Ints, limit: int) -> Ints:
    """Positions of the most confident mistakes, the least probability of the true class first.

    Args:
        probabilities: float[n, classes]
        labels: int64[n], the true classes.
    """
    own = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(own[wrong], kind="stable")][:limit]


def examples(
    predicted: Ints, labels: Ints, confidence: Floats, *, true: int, said: int, limit: int
) -> Ints:
    """Positions of images of class `true` that were predicted as `said`, the surest first.

    `confidence`, float[n], is the probability of `said`.
    """
    found = np.flatnonzero((labels == true) & (predicted == said))
    return found[np.argsort(-confidence[found], kind="stable")][:limit]


def png(figure: Figure) -> bytes:
    """The figure in 256 colors: a third of the bytes, which figures and small pictures bear."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def _png(drawn: Image.Image) -> bytes:
    buffer = io.BytesIO()
    drawn.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A white figure of `width` x `height` inches with quiet axes."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    made = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in made:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8, color=GREY)
    return figure, made


def confusion_figure(matrix: Ints, classes: Sequence[str]) -> bytes:
    """Rows are true classes, columns predicted ones; the color is the share of the row.

    Counts are written where there is room. Of more than 50 classes the most confused are shown.
    """
    shown = most_confused_classes(matrix, MANY) if len(classes) > MANY else np.arange(len(classes))
    part, names = matrix[np.ix_(shown, shown)], [figure_text(classes[int(i)], 22) for i in shown]
    shares = part / np.maximum(matrix.sum(axis=1)[shown], 1)[:, None]
    side = max(4.2, min(13.0, 1.8 + 0.3 * len(shown)))
    figure, (ax,) = axes(side + 1.4, side)
    drawn = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(shown)), names, rotation=90, fontsize=8 if len(shown) <= 30 else 6)
    ax.set_yticks(range(len(shown)), names, fontsize=8 if len(shown) <= 30 else 6)
    ax.set_xlabel("predicted", fontsize=9)
    ax.set_ylabel("true", fontsize=9)
    if len(shown) <= 30:
        for i, j in zip(*np.nonzero(part)):
            ax.text(
                j,
                i,
                str(part[i, j]),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if shares[i, j] > 0.55 else "#1c2430",
            )
    figure.colorbar(drawn, ax=ax, fraction=0.04, pad=0.02).set_label(
        "share of the true class", fontsize=8
    )
    ax.spines[:].set_visible(False)
    if len(classes) > MANY:
        ax.set_title(f"the {MANY} most confused of {len(classes):,} classes", fontsize=10)
    return png(figure)


def calibration_figure(
    before: Reliability, after: Reliability, confidence: Floats, right: np.ndarray
) -> bytes:
    """Left: accuracy against confidence per bin, before and after temperature scaling.

    Right: the distribution of the calibrated confidence, where the model was right and wrong.
    """
    figure, (left, hist) = axes(10, 4, columns=2)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    left.plot(
        before.confidence,
        before.accuracy,
        "o-",
        color=GREY,
        markersize=4,
        linewidth=1.2,
        label=f"as trained, ECE {before.error:.3f}",
    )
    left.plot(
        after.confidence,
        after.accuracy,
        "o-",
        color=BLUE,
        markersize=4,
        linewidth=1.6,
        label=f"calibrated, ECE {after.error:.3f}",
    )
    left.set(xlim=(0, 1.02), ylim=(0, 1.03), aspect="equal")
    left.set_xlabel("confidence", fontsize=9)
    left.set_ylabel("accuracy", fontsize=9)
    left.set_title("Accuracy against confidence", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="best")
    bins = np.linspace(0, 1, 26)
    hist.hist(
        [confidence[right], confidence[~right]],
        bins=bins.tolist(),
        stacked=True,
        color=[BLUE, RED],
        label=[f"right ({right.sum():,})", f"wrong ({(~right).sum():,})"],
    )
    hist.set_xlabel("confidence (calibrated)", fontsize=9)
    hist.set_ylabel("images", fontsize=9)
    hist.set_yscale("symlog", linthresh=10)
    hist.set_ylim(0, hist.get_ylim()[1] * 8)  # room for the legend
    hist.set_title("Confidence of right and wrong", fontsize=10)
    hist.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    return png(figure)


def sheet(tiles: Sequence[tuple[str, Sequence[np.ndarray]]], heads: Sequence[str]) -> bytes:
    """A contact sheet: per tile a title over pictures, uint8[S, S, 3], side by side.

    `heads` name the pictures.
    """
    across = 2 if len(tiles) > 1 else 1
    width, height = len(heads) * (SIDE + GAP) + GAP, SIDE + 2 * LINE + 2 * GAP
    page = Image.new("RGB", (across * width, -(-len(tiles) // across) * height), "white")
    pen, letters = ImageDraw.Draw(page), font(10)
    for i, (title, pictures) in enumerate(tiles):
        left, top = GAP + i % across * width, GAP + i // across * height
        pen.text((left, top), fit(printable(title), width - 2 * GAP, letters), "black", letters)
        for j, (head, image) in enumerate(zip(heads, pictures, strict=True)):
            x, y = left + j * (SIDE + GAP), top + LINE
            pen.text((x, y), fit(head, SIDE, letters), "black", letters)
            shown = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            page.paste(shown, (x, y + LINE))
    return _png(page)
