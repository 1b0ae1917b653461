"""The evaluation report of a run: scores, confusions, worst mistakes with Grad-CAM, calibration.

It is one HTML file that needs nothing else, with its figures as PNG and scores per class as CSV.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ftlib.data.augment import EvalTransform
from ftlib.data.shards import Dataset
from ftlib.report import html, misclassified
from ftlib.report.evaluation import CHOSEN_HERE, Scored, score
from ftlib.report.gradcam import grad_cam, overlay, target_layer
from ftlib.report.metrics import (
    Floats,
    Ints,
    PerClass,
    TestSplit,
    confused_pairs,
    confusion,
    per_class,
    reliability,
    softmax,
)
from ftlib.report.run_facts import RunFacts, run_facts
from ftlib.storage import write_file
from ftlib.text import csv_bytes, csv_cell, percent
from ftlib.training.evaluate import normalize
from ftlib.training.initial_weights import LoadedModel

PAIRS, EXAMPLES, WORST = 8, 4, 12
"""Confused pairs shown, example pictures of each, and worst mistakes shown."""
SIDE = 128
"""Pictures smaller than this are enlarged to it under a Grad-CAM, in pixels."""
WIDE = 20
"""Classes from which on a confusion matrix takes the page's whole width."""


@dataclass(frozen=True)
class EvaluationReport:
    """What was written, and what it says in numbers."""

    page: Path
    """report.html"""
    figures: tuple[Path, ...]
    """PNG files."""
    tables: tuple[Path, ...]
    """classes.csv and scores.json."""
    scored: Scored

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.page, *self.figures, *self.tables)


def report_run(
    loaded: LoadedModel,
    run_dir: str,
    dataset: Dataset,
    *,
    out: Path,
    split: str,
    limit: int = 0,
    test: TestSplit | None = None,
) -> EvaluationReport:
    """Score a run's model and write its report.

    Args:
        run_dir: the run's folder or address.
        dataset: the pictures, in the classes of the run.
        out: folder of the report.
        limit: score at most so many pictures, evenly spread; 0: all.
        test: scores on the `test` split, to stand beside these.
    """
    scored = score(loaded, dataset, split, limit=limit)
    facts = run_facts(loaded.run, run_dir)
    return write(loaded, [scored], dataset, out, split, facts=facts, test=test)


def write(
    loaded: LoadedModel,
    all_scored: Sequence[Scored],
    dataset: Dataset,
    out: Path,
    split: str,
    *,
    facts: RunFacts | None = None,
    test: TestSplit | None = None,
) -> EvaluationReport:
    """Write the report of predictions that were made before.

    The first entry of `all_scored` is analyzed; the others only stand in the table of scores.
    """
    out.mkdir(parents=True, exist_ok=True)
    first, classes = all_scored[0], loaded.classes
    # Of a single picture: what the packaged model says. The calibration figure, like the scores,
    # divides by temperatures that were fitted on other pictures.
    probabilities = softmax(first.logits.astype(np.float64) / first.calibration.temperature)
    predicted = probabilities.argmax(axis=1)
    matrix = confusion(predicted, first.labels, len(classes))
    by_class = per_class(matrix)
    pixels = _Pixels(first, loaded)
    cards, tiles = _worst_cards(loaded, first, probabilities, pixels)
    drawn = _figures(first, softmax(first.calibration.scaled), matrix, classes)
    if tiles:
        drawn["worst.png"] = misclassified.sheet(
            tiles, ("picture", "for the true class", "for the prediction")
        )
    facts = facts or RunFacts()
    sections = [
        html.section("Scores", _score_table(all_scored), note=_score_note(first), half=True),
        *_test_split(test),
        *_curves(facts),
        *_confusions(drawn, len(classes)),
        *_pairs(matrix, first, probabilities, classes, pixels),
        _worst_section(cards),
        html.section(
            "Classes", _class_table(by_class, classes), note="The weakest first.", half=True
        ),
        *_changed(facts),
    ]
    name = str(loaded.about.get("run") or loaded.run.name)
    page = out / "report.html"
    page.unlink(missing_ok=True)  # a page stands beside its own figures and tables, or not at all
    if not tiles:
        (out / "worst.png").unlink(missing_ok=True)
    for file, data in drawn.items():
        write_file(str(out / file), data)
    tables = _write_tables(out, by_class, classes, all_scored)
    lead = _lead(loaded, dataset, first, split, facts.mlflow)
    write_file(str(page), html.page(f"{name}: report", sections, lead).encode())
    return EvaluationReport(page, tuple(out / file for file in drawn), tables, first)


def _figures(
    scored: Scored, probabilities: Floats, matrix: Ints, classes: Sequence[str]
) -> dict[str, bytes]:
    """File name -> PNG of the confusion matrix and of the calibration."""
    right = probabilities.argmax(axis=1) == scored.labels
    confidence = probabilities.max(axis=1)
    return {
        "confusion.png": misclassified.confusion_figure(matrix, classes),
        "calibration.png": misclassified.calibration_figure(
            reliability(softmax(scored.logits).max(axis=1), right),
            reliability(confidence, right),
            confidence,
            right,
        ),
    }


def _test_split(test: TestSplit | None) -> list[str]:
    if test is None:
        return []
    heads = {"top1": "top-1 %", "top5": "top-5 %", "nll": "NLL", "ece": "ECE"}
    shown = [e.show(2 if k.startswith("top") else 3) for k, e in test.scores.items()]
    note = (
        "Scored once, by the final model. The split chose nothing: no epoch, no setting and no "
        "temperature. In brackets: 95 % bootstrap intervals over the pictures."
    )
    table = html.table(
        ["pictures", *(heads[k] for k in test.scores)], [(f"{test.images:,}", *shown)]
    )
    return [html.section("Test split", table, note=note, half=True)]


def _curves(facts: RunFacts) -> list[str]:
    if not facts.curves:
        return []
    return [html.section("Training", html.plot(facts.curves, "training curves"), half=True)]


def _confusions(drawn: Mapping[str, bytes], classes: int) -> list[str]:
    """The sections of the two figures."""
    matrix = html.plot(drawn["confusion.png"], "confusion matrix")
    calibration = html.plot(
        drawn["calibration.png"],
        "accuracy against confidence, and confidence of right and wrong predictions",
    )
    note = "A calibrated model is right as often as it is confident."
    return [
        html.section("Confusion matrix", matrix, half=classes <= WIDE),
        html.section("Calibration", calibration, note=note, half=True),
    ]


def _changed(facts: RunFacts) -> list[str]:
    if not facts.changed:
        return []
    table = html.table(("setting", "recipe", "this run"), facts.changed, text_columns=(1, 2))
    return [html.section("Settings that differ from the recipe", table, half=True)]


def _lead(
    loaded: LoadedModel, dataset: Dataset, scored: Scored, split: str, mlflow: str
) -> list[str]:
    """What stands under the title: which model on which pictures, and what came out."""
    about = loaded.about
    averaged = " (exponential moving average)" if about.get("ema") else ""
    weights = f"weights of epoch {about.get('epoch', '?')}{averaged}"
    if loaded.run.stage == "probe":
        weights = "a classifier fitted on pretrained features"
    mistakes = int((scored.logits.argmax(axis=1) != scored.labels).sum())
    facts = [(f"{scored.before['top1'].value:.2f} %", "top-1")]
    if "top5" in scored.before:
        facts.append((f"{scored.before['top5'].value:.2f} %", "top-5"))
    facts += [
        (f"{mistakes:,}", "mistakes"),
        (f"{scored.after['ece'].value:.3f}", "calibration error after scaling"),
    ]
    page = html.link("This run in MLflow, once its UI is open", mlflow)
    return [
        html.paragraph(
            f"{loaded.run.model.arch} on {dataset.name}, {len(scored.labels):,} pictures of its "
            f"{split} split, {weights}",
            "soft",
        ),
        html.facts(facts),
        html.paragraph(_headline(scored, loaded.classes), "lead"),
        *([page] if mlflow else []),
    ]


def _headline(scored: Scored, classes: Sequence[str]) -> str:
    """What the score says about other pictures, and what is mistaken most."""
    top1, n = scored.before["top1"], len(scored.labels)
    text = (
        f"Of other pictures like these, {top1.low:.1f} to {top1.high:.1f} % would be classified "
        f"correctly (95 % interval from {n:,} pictures)."
    )
    if scored.chose:
        text += f" {CHOSEN_HERE}"
    matrix = confusion(scored.logits.argmax(axis=1), scored.labels, len(classes))
    for true, said, count in confused_pairs(matrix, 1):
        if count < 2:  # every mistake is the most frequent one
            break
        text += (
            f" The most frequent mistake: {classes[true]} taken for {classes[said]}, "
            f"{count:,} of {matrix[true].sum():,}."
        )
    return text


class _Pixels:
    """What the network sees of a scored picture, by its position: uint8[S, S, 3]."""

    def __init__(self, scored: Scored, loaded: LoadedModel) -> None:
        self.scored = scored
        evaluate = loaded.run.evaluate
        self.transform = EvalTransform(scored.size, evaluate.crop, evaluate.interpolation)

    def __call__(self, position: int) -> np.ndarray:
        return self.transform(self.scored.split.image(int(self.scored.rows[position])))

    def file(self, position: int) -> str:
        return self.scored.split.path(int(self.scored.rows[position]))


def _score_table(all_scored: Sequence[Scored]) -> str:
    """A row for each score, so that it fits a phone; a column for each way of scoring."""
    heads = [f"{s.size} px{', with mirror' if s.flip else ''}" for s in all_scored]
    names = all_scored[0].cells
    rows = [(name, *(s.cells[name] for s in all_scored)) for name in names]
    return html.table(["", *heads], rows)


def _score_note(scored: Scored) -> str:
    return (
        "In brackets: 95 % bootstrap intervals over the pictures. The temperature was fitted on "
        f"{scored.calibration.fitted_on}. ECE: expected calibration error, 15 bins of equal mass."
    )


def _pairs(
    matrix: Ints, scored: Scored, probabilities: Floats, classes: Sequence[str], pixels: _Pixels
) -> list[str]:
    """The section with the most confused pairs of classes; empty where nothing was confused."""
    predicted = probabilities.argmax(axis=1)
    cards = []
    for true, said, count in confused_pairs(matrix, PAIRS):
        found = misclassified.examples(
            predicted,
            scored.labels,
            probabilities[:, said],
            true=true,
            said=said,
            limit=EXAMPLES,
        )
        pictures = [
            html.picture(pixels(i), f"{percent(probabilities[i, said])} sure") for i in found
        ]
        title = f"{classes[true]} predicted as {classes[said]}: {count} of {matrix[true].sum()}"
        cards.append(html.card(title, pictures, small=True))
    return [html.section("Most confused pairs", html.grid(cards))] if cards else []


def _worst_section(cards: Sequence[str]) -> str:
    title = "Worst mistakes"
    if not cards:
        return html.section(
            title, html.paragraph("There are none: every picture was classified correctly.")
        )
    note = (
        "The most confident mistakes. Red marks what speaks for the true class (middle) and for "
        "the prediction (right), by Grad-CAM."
    )
    return html.section(title, html.grid(cards), note=note)


def _worst_cards(
    loaded: LoadedModel, scored: Scored, probabilities: Floats, pixels: _Pixels
) -> tuple[list[str], list[tuple[str, list[np.ndarray]]]]:
    """(cards of the page, tiles of the contact sheet) of the most confident mistakes."""
    positions = misclassified.worst(probabilities, scored.labels, WORST)
    if not len(positions):
        return [], []
    model = loaded.model.float()
    device = next(model.parameters()).device
    images = np.stack([pixels(i) for i in positions])
    x = normalize(torch.from_numpy(images).to(device), loaded.run.data.mean, loaded.run.data.std)
    layer = target_layer(model, x)
    answers = probabilities[positions].argmax(axis=1)
    maps = [grad_cam(model, x, chosen, layer) for chosen in (scored.labels[positions], answers)]
    cards: list[str] = []
    tiles: list[tuple[str, list[np.ndarray]]] = []
    for k, i in enumerate(positions):
        true, said = loaded.classes[scored.labels[i]], loaded.classes[answers[k]]
        own, best = probabilities[i, scored.labels[i]], probabilities[i, answers[k]]
        shown = [overlay(images[k], cam[k], SIDE) for cam in maps]
        cards.append(
            html.card(
                f"{true}, predicted as {said}",
                [
                    html.picture(images[k], pixels.file(int(i))),
                    html.picture(shown[0], f"{true}: {percent(own, 1)}"),
                    html.picture(shown[1], f"{said}: {percent(best, 1)}"),
                ],
            )
        )
        tiles.append((f"{true} predicted as {said} ({percent(best)})", [images[k], *shown]))
    return cards, tiles


def _class_table(by_class: PerClass, classes: Sequence[str]) -> str:
    """The weakest first; classes without pictures have no scores and stand last."""
    columns = (by_class.recall, by_class.precision, by_class.f1)
    rows = (
        (
            classes[i],
            f"{by_class.support[i]:,}",
            *(f"{100 * v[i]:.1f}" if by_class.support[i] else "-" for v in columns),
        )
        for i in np.lexsort((by_class.f1, by_class.support == 0))
    )
    return html.table(("class", "pictures", "recall %", "precision %", "F1 %"), rows)


def _write_tables(
    out: Path, by_class: PerClass, classes: Sequence[str], all_scored: Sequence[Scored]
) -> tuple[Path, Path]:
    """classes.csv and scores.json in `out`."""
    columns = (by_class.recall, by_class.precision, by_class.f1)
    rows = (
        (csv_cell(name), int(by_class.support[i]), *(round(float(v[i]), 6) for v in columns))
        for i, name in enumerate(classes)
    )
    heads = ("class", "pictures", "recall", "precision", "f1")
    write_file(str(out / "classes.csv"), csv_bytes([heads, *rows]))
    entries = [
        {
            "size": s.size,
            "flip": s.flip,
            "images": len(s.rows),
            "temperature": s.calibration.temperature,
            "temperature_fitted_on": s.calibration.fitted_on,
            **{
                f"{name}{suffix}": [e.value, e.low, e.high]
                for suffix, found in (("", s.before), ("_calibrated", s.after))
                for name, e in found.items()
            },
        }
        for s in all_scored
    ]
    write_file(str(out / "scores.json"), json.dumps(entries, indent=1).encode())
    return out / "classes.csv", out / "scores.json"
