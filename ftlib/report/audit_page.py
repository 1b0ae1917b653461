"""Run the audit of a prepared data set and write its page: counts, pictures, a list of all
findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftlib.data.decode import decode
from ftlib.data.shards import Dataset
from ftlib.preparation.sources.splits import TornGroup, guessed_groups, torn_groups
from ftlib.report import html
from ftlib.report.audit import (
    Fingerprint,
    Pair,
    Suspect,
    exact_pairs,
    near_pairs,
    odd_sizes,
    scan,
    suspects,
)
from ftlib.report.misclassified import BLUE, GREY, RED, axes, png
from ftlib.storage import write_file
from ftlib.text import csv_bytes, csv_cell, figure_text, percent

SHOWN = 24
"""Findings of a kind whose pictures are on the page; the CSV has all."""
SIDE = 192
"""Longer side of a shown picture, in pixels."""


@dataclass(frozen=True)
class Audit:
    """What was found. Positions count the training pictures first, then the validation pictures."""

    dataset: Dataset
    labels: np.ndarray
    """int64[n]"""
    train: int
    """Training pictures."""
    exact: list[Pair]
    near: list[Pair]
    flat: int
    """Pictures too uniform for perceptual hashes to compare."""
    odd: np.ndarray
    """int64[k]: pictures whose area or shape is far from the others'."""
    suspects: list[Suspect]
    checked: int
    """Pictures whose labels were checked."""
    agreement: float
    """Share of those on which the model that judges labels agrees with them, 0..1."""
    torn: list[TornGroup]
    """What look like groups by their names and lie in more than one split."""

    def crosses(self, pair: Pair) -> bool:
        """One picture is in train, the other in val."""
        return pair.a < self.train <= pair.b

    def disagrees(self, pair: Pair) -> bool:
        """The two pictures have different labels."""
        return bool(self.labels[pair.a] != self.labels[pair.b])

    @property
    def leaks(self) -> list[Pair]:
        return [p for p in (*self.exact, *self.near) if self.crosses(p)]

    @property
    def conflicts(self) -> list[Pair]:
        return [p for p in (*self.exact, *self.near) if self.disagrees(p)]

    @property
    def within(self) -> list[Pair]:
        return [p for p in (*self.exact, *self.near) if not self.crosses(p)]

    def where(self, position: int) -> tuple[str, int]:
        return ("train", position) if position < self.train else ("val", position - self.train)

    def file(self, position: int) -> str:
        split, row = self.where(position)
        return self.dataset.split(split).path(row)

    def image(self, position: int) -> np.ndarray:
        split, row = self.where(position)
        return decode(self.dataset.split(split).image(row))


def audit(
    dataset: Dataset,
    *,
    features: Callable[[Dataset], np.ndarray] | None = None,
    label_sample: int = 20_000,
    workers: int = 2,
    tick: Callable[[], None] = lambda: None,
) -> Audit:
    """Look at every picture of both splits.

    Args:
        features: gives float32[n, F] for all pictures (train, then val), such as a trained model's;
            small descriptors by default.
        label_sample: labels are checked on at most so many pictures, evenly spread.
        tick: called once per picture.
    """
    train, val = dataset.split("train"), dataset.split("val")
    labels = np.concatenate([train.labels, val.labels])
    prints: list[Fingerprint] = [
        *scan(len(train), lambda i: decode(train.image(i)), tick, workers),
        *scan(len(val), lambda i: decode(val.image(i)), tick, workers),
    ]
    exact = exact_pairs([p.exact for p in prints])
    lively = np.array([i for i, p in enumerate(prints) if not p.flat], dtype=np.int64)
    gradient, frequency = (
        np.array([getattr(prints[i], name) for i in lively], dtype=np.uint64)
        for name in ("gradient", "frequency")
    )
    place = {int(position): k for k, position in enumerate(lively)}
    repeats = [Pair(place[p.a], place[p.b], 0) for p in exact if p.a in place and p.b in place]
    same = {p.b for p in exact}
    near = [
        Pair(int(lively[p.a]), int(lively[p.b]), p.distance)
        for p in near_pairs(gradient, frequency, skip=repeats)
    ]
    # A repeat of a picture is near to everything that the picture is near to: name it once.
    near = [p for p in near if p.a not in same and p.b not in same]
    described = features(dataset) if features else np.stack([p.features for p in prints])
    chosen = np.unique(
        np.linspace(0, len(labels) - 1, min(len(labels), label_sample)).round().astype(np.int64)
    )
    doubtful, agreement = suspects(described[chosen], labels[chosen])
    doubtful = [Suspect(int(chosen[s.position]), s.said, s.own, s.confidence) for s in doubtful]
    sizes = np.concatenate([train.sizes, val.sizes])
    return Audit(
        dataset=dataset,
        labels=labels,
        train=len(train),
        exact=exact,
        near=near,
        flat=len(prints) - len(lively),
        odd=odd_sizes(sizes, 10 * SHOWN),
        suspects=doubtful,
        checked=len(chosen),
        agreement=agreement,
        torn=torn_by_names(dataset),
    )


def torn_by_names(dataset: Dataset) -> list[TornGroup]:
    """Groups torn apart between the splits, by the pictures' names; none where the set was prepared
    with groups, which are whole."""
    reading = dataset.manifest.get("made", {}).get("reading", {})
    if reading.get("group_column") or reading.get("group_pattern"):
        return []
    splits = [name for name in dataset.splits for _ in range(len(dataset.split(name)))]
    parts = [dataset.split(name) for name in dataset.splits]
    files = [part.path(row) for part in parts for row in range(len(part))]
    return torn_groups(guessed_groups(files, splits, len(dataset.classes))[1], splits)


def summary(found: Audit) -> list[tuple[str, int, str]]:
    """(what, how many, what to do) for the screen and the page."""
    across = found.leaks
    return [
        (
            "same picture in train and val",
            sum(p.distance == 0 for p in across),
            "the validation score counts them as known: delete one of each",
        ),
        (
            "nearly the same in train and val",
            sum(p.distance > 0 for p in across),
            "look at them: the same scene, or the same picture at another quality",
        ),
        (
            "same or nearly, but another label",
            len(found.conflicts),
            "one of the two labels is wrong",
        ),
        (
            "same picture twice in a split",
            sum(p.distance == 0 for p in found.within),
            "it weighs double: delete one",
        ),
        (
            "nearly the same twice in a split",
            sum(p.distance > 0 for p in found.within),
            "look at them",
        ),
        (
            "suspicious labels",
            len(found.suspects),
            f"of {found.checked:,} checked; {_label_model(found)}",
        ),
        ("odd sizes", len(found.odd), "far from the others in area or shape"),
        (
            "groups by name in more than one split",
            len(found.torn),
            "patients, videos or bursts? Keep them whole: prepare --group-pattern",
        ),
    ]


def _label_model(found: Audit) -> str:
    """How far the model that checks labels can be trusted."""
    text = (
        "a model trained on the other pictures is sure of another class; it agrees with "
        f"{percent(found.agreement)} of all labels"
    )
    if found.agreement < 0.8:
        text += ", so most of its doubts are its own mistakes: use --run with a trained run"
    return text


def write(found: Audit, out: Path) -> list[Path]:
    """Write audit.html, classes.png and findings.csv into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    page, figure_file, findings = (
        out / name for name in ("audit.html", "classes.png", "findings.csv")
    )
    figure = classes_figure(found)
    heads = ("finding", "file", "class", "other file", "other class", "detail")
    rows = [[csv_cell(cell) for cell in row] for row in _rows(found)]
    page.unlink(missing_ok=True)  # a page stands beside its own findings, or not at all
    write_file(str(figure_file), figure)
    write_file(str(findings), csv_bytes([heads, *rows]))
    title = f"Audit of {found.dataset.name}"
    write_file(str(page), html.page(title, _sections(found, figure), _lead(found)).encode())
    return [page, figure_file, findings]


def _lead(found: Audit) -> list[str]:
    """What stands under the title: how much was looked at, and the main counts."""
    uniform = f"; {found.flat:,} are too uniform to be compared" if found.flat else ""
    counts = [(f"{count:,}", what) for what, count, _ in summary(found)[:3]]
    return [
        html.paragraph(
            f"{found.train:,} training and {len(found.labels) - found.train:,} validation pictures "
            f"of {len(found.dataset.classes)} classes{uniform}",
            "soft",
        ),
        html.facts([*counts, (f"{len(found.suspects):,}", "suspicious labels")]),
    ]


def _sections(found: Audit, figure: bytes) -> list[str]:
    exact_within = [p for p in found.within if p.distance == 0]
    near_within = [p for p in found.within if p.distance > 0]
    findings = html.table(
        ("what", "pictures or pairs", "what to do"), summary(found), text_columns=(2,)
    )
    return [
        html.section("Findings", findings),
        *_pairs(
            found,
            "In train and in val",
            found.leaks,
            "The model has seen these validation pictures, or nearly the same, in training.",
        ),
        *_pairs(
            found,
            "One picture, two labels",
            found.conflicts,
            "The same picture, or nearly the same, in different classes.",
        ),
        *_suspects(found),
        *_pairs(found, "Twice in a split", exact_within, "Pixel for pixel the same."),
        *_pairs(
            found,
            "Nearly twice in a split",
            near_within,
            "Both perceptual hashes differ in a few bits of 64.",
        ),
        *_odd(found),
        *_torn(found),
        html.section("Classes", html.plot(figure, "pictures per class and split")),
    ]


def _rows(found: Audit) -> Iterator[tuple[str, str, str, str, str, str]]:
    """The rows of findings.csv."""
    classes = found.dataset.classes
    for p in (*found.exact, *found.near):
        kind = "same" if p.distance == 0 else "near"
        kind += " across splits" if found.crosses(p) else ""
        kind += ", labels differ" if found.disagrees(p) else ""
        yield (
            kind,
            found.file(p.a),
            classes[found.labels[p.a]],
            found.file(p.b),
            classes[found.labels[p.b]],
            f"{max(p.distance - 1, 0)} bits",
        )
    for s in found.suspects:
        own = classes[found.labels[s.position]]
        detail = f"{s.confidence:.3f} against {s.own:.3f}"
        yield "suspicious label", found.file(s.position), own, "", classes[s.said], detail
    for i in found.odd:
        height, width = found.image(int(i)).shape[:2]
        own = classes[found.labels[i]]
        yield "odd size", found.file(int(i)), own, "", "", f"{width} x {height}"
    for group in found.torn:
        yield "torn group", group.name, "", "", "", str(group)


def classes_figure(found: Audit) -> bytes:
    """PNG: pictures per class and split; of more than 60 classes the 30 smallest and 30 largest."""
    count = len(found.dataset.classes)
    train, val = (
        np.bincount(found.labels[: found.train], minlength=count),
        np.bincount(found.labels[found.train :], minlength=count),
    )
    order = np.argsort(train, kind="stable")
    shown = order if count <= 60 else np.concatenate([order[:30], order[-30:]])
    figure, (ax,) = axes(9, max(2.2, 0.8 + 0.22 * len(shown)))
    at = np.arange(len(shown))
    ax.barh(at + 0.2, train[shown], 0.4, color=BLUE, label="train")
    ax.barh(at - 0.2, val[shown], 0.4, color=RED, label="val")
    ax.set_yticks(
        at, [figure_text(found.dataset.classes[i], 28) for i in shown], fontsize=8, color=GREY
    )
    ax.set_xlabel("pictures", fontsize=9)
    ax.set_title(
        f"smallest class {train.min():,}, largest {train.max():,} training pictures"
        + ("" if count <= 60 else "; the 30 smallest and the 30 largest"),
        fontsize=10,
    )
    # Above the bars, of which the longest end at the right edge.
    ax.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
    )
    return png(figure)


def _picture(found: Audit, position: int, extra: str = "") -> str:
    image = found.image(position)
    step = max(image.shape[:2]) / SIDE
    if step > 1:
        import cv2

        image = cv2.resize(
            image,
            (max(1, round(image.shape[1] / step)), max(1, round(image.shape[0] / step))),
            interpolation=cv2.INTER_AREA,
        )
    return html.picture(image, f"{found.file(position)}{extra}")


def _pairs(found: Audit, title: str, pairs: Sequence[Pair], note: str) -> list[str]:
    """A section of pairs; none where there are none, as in the other sections."""
    if not pairs:
        return []
    classes = found.dataset.classes
    cards = []
    for p in pairs[:SHOWN]:
        a, b = classes[found.labels[p.a]], classes[found.labels[p.b]]
        names = a if a == b else f"{a} or {b}"
        apart = "the same pixels" if p.distance == 0 else f"{p.distance - 1} bits apart"
        cards.append(html.card(f"{names}, {apart}", [_picture(found, p.a), _picture(found, p.b)]))
    note += _more(len(pairs))
    return [html.section(f"{title}: {len(pairs):,}", html.grid(cards), note=note)]


def _suspects(found: Audit) -> list[str]:
    if not found.suspects:
        return []
    classes = found.dataset.classes
    cards = [
        html.card(
            f"{classes[found.labels[s.position]]}? Rather {classes[s.said]}",
            [_picture(found, s.position, f" ({percent(s.confidence)} against {percent(s.own)})")],
        )
        for s in found.suspects[:SHOWN]
    ]
    judged = _label_model(found)
    note = f"{judged[0].upper()}{judged[1:]}. The surest first.{_more(len(found.suspects))}"
    title = f"Suspicious labels: {len(found.suspects):,}"
    return [html.section(title, html.grid(cards), note=note)]


def _odd(found: Audit) -> list[str]:
    if not len(found.odd):
        return []
    cards = []
    for i in found.odd[:SHOWN]:
        height, width = found.image(int(i)).shape[:2]
        cards.append(html.card(f"{width} x {height}", [_picture(found, int(i))]))
    note = "Far from the others in area or shape." + _more(len(found.odd))
    return [html.section(f"Odd sizes: {len(found.odd):,}", html.grid(cards), note=note)]


def _torn(found: Audit) -> list[str]:
    if not found.torn:
        return []
    splits = found.dataset.splits
    rows = [(g.name, *(f"{g.counts.get(s, 0):,}" for s in splits)) for g in found.torn[:SHOWN]]
    note = (
        "Names that look like those of one patient, video or burst. If they are, the scores of "
        "val and test flatter. Prepare the set again with --group-pattern." + _more(len(found.torn))
    )
    title = f"Groups in more than one split: {len(found.torn):,}"
    return [html.section(title, html.table(("group", *splits), rows), note=note)]


def _more(count: int) -> str:
    return f" The first {SHOWN} are shown, all are in findings.csv." if count > SHOWN else ""
