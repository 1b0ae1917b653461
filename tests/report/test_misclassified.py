"""Which mistakes a report shows, its figures, and the whole report of a run."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, recall_score

from ftlib.report import evaluation, misclassified, page, report
from ftlib.report.metrics import reliability, softmax
from tests.deploy import made


def test_the_worst_are_the_most_confident_mistakes():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    assert misclassified.worst(probabilities, np.array([1, 0, 1, 1]), 5).tolist() == [0, 1, 3]
    assert misclassified.worst(probabilities, np.array([0, 1, 1, 0]), 5).tolist() == []


def test_examples_of_a_pair_come_surest_first():
    probabilities = np.array([[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]])
    assert misclassified.examples(
        probabilities.argmax(1), np.array([0, 0, 0, 1]), probabilities, 0, 1, 4
    ).tolist() == [0, 1]


@pytest.mark.parametrize("classes", [3, 60])
def test_figures_are_pictures_of_a_readable_size(classes):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 9, (classes, classes))
    image = Image.open(
        io.BytesIO(
            misclassified.confusion_figure(matrix, [f"class number {i}" for i in range(classes)])
        )
    )
    assert 400 <= image.width <= 1700 and 400 <= image.height <= 1700
    confidence = rng.random(300)
    right = rng.random(300) < confidence
    drawn = reliability(confidence, right)
    assert (
        Image.open(
            io.BytesIO(misclassified.calibration_figure(drawn, drawn, confidence, right))
        ).width
        > 900
    )
    tile = ("a title", [np.zeros((32, 32, 3), np.uint8)] * 3)
    assert Image.open(io.BytesIO(misclassified.sheet([tile] * 5, ("a", "b", "c")))).height > 300


def test_names_are_escaped():
    text = page.document(
        "<script>",
        "",
        [
            page.table(["a"], [["<b>"]]),
            page.card("x<y", [page.picture(np.zeros((8, 8, 3), np.uint8), '"><script>')]),
        ],
    )
    assert "<script>" not in text and "<b>&lt;" not in text and "x&lt;y" in text


@pytest.fixture(scope="module")
def written(shapes, shapes_run):
    return report.report_run(str(shapes_run), shapes)


def test_a_report_holds_all_it_shows(written, shapes):
    html = written.html.read_text()
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    for word in (
        "Scores",
        "What is taken for what",
        "The worst mistakes",
        "Confidence",
        "Classes",
        "disc",
        "resnet18",
        "calibrated",
    ):
        assert word in html
    assert all(file.stat().st_size > 100 for file in written.files)
    assert {file.name for file in written.files} >= {
        "report.html",
        "confusion.png",
        "calibration.png",
        "classes.csv",
        "scores.json",
    }


def test_its_numbers_are_scikit_learns(written):
    scored = written.scored
    predicted = scored.logits.argmax(1)
    entry = json.loads((written.html.parent / "scores.json").read_text())[0]
    assert entry["top1"][0] == pytest.approx(100 * accuracy_score(scored.labels, predicted))
    assert entry["top1"][1] <= entry["top1"][0] <= entry["top1"][2]
    rows = list(csv.DictReader((written.html.parent / "classes.csv").read_text().splitlines()))
    np.testing.assert_allclose(
        [float(r["recall"]) for r in rows],
        recall_score(scored.labels, predicted, average=None),
        atol=1e-6,
    )
    assert sum(int(r["pictures"]) for r in rows) == len(scored.rows) == 30


def test_a_model_without_mistakes_is_reported_too(shapes, shapes_run, tmp_path):
    loaded = evaluation.load(str(shapes_run))
    scored = evaluation.score(loaded, shapes)
    perfect = np.eye(3, dtype=np.float32)[scored.labels] * 5
    import dataclasses

    scored = dataclasses.replace(
        scored, logits=perfect, calibration=dataclasses.replace(scored.calibration, scaled=perfect)
    )
    written = report.write(loaded, [scored], shapes, tmp_path, "val")
    assert (
        "every picture was classified correctly" in written.html.read_text()
        and not (tmp_path / "worst.png").exists()
    )


# --- evaluation -------------------------------------------------------------------------------------------------------------------


def test_mirroring_averages_the_logits(shapes, shapes_run):
    loaded = evaluation.load(str(shapes_run))
    plain, mirrored = evaluation.score(loaded, shapes), evaluation.score(loaded, shapes, flip=True)
    assert (
        mirrored.flip
        and not np.allclose(plain.logits, mirrored.logits)
        and plain.logits.shape == mirrored.logits.shape
    )
    assert (plain.rows == mirrored.rows).all()


def test_another_size_and_a_limit(shapes, shapes_run):
    loaded = evaluation.load(str(shapes_run))
    scored = evaluation.score(loaded, shapes, size=48, limit=9)
    assert scored.size == 48 and len(scored.rows) == 9 and np.bincount(scored.labels).min() >= 2


def test_which_weights(shapes, shapes_run):
    best, raw, last = (evaluation.load(str(shapes_run), w) for w in ("best", "raw", "last"))
    assert last.about["ema"] and not raw.about["ema"]
    assert all(
        (a == b).all()
        for a, b in zip(best.model.state_dict().values(), raw.model.state_dict().values())
    )
    assert all((p == 0).all() for p in last.model.parameters())


def test_the_temperature_comes_from_the_tuning_split_where_there_is_one(shapes, tmp_path):
    folder = made.run_folder(tmp_path, shapes, tuning_fraction=0.25)
    loaded = evaluation.load(str(folder))
    scored = evaluation.score(loaded, shapes)
    assert "of the tuning split" in scored.calibration.fitted_on
    tuning, train = (
        evaluation.score(loaded, shapes, "tuning"),
        evaluation.score(loaded, shapes, "train"),
    )
    assert (
        len(tuning.rows) == 9 and len(train.rows) == 27 and not set(tuning.rows) & set(train.rows)
    )
    np.testing.assert_allclose(
        softmax(scored.calibration.scaled),
        softmax(scored.logits / scored.calibration.temperature),
        rtol=1e-5,
    )


def test_what_cannot_be_evaluated_is_said_so(shapes, shapes_run, tmp_path):
    loaded = evaluation.load(str(shapes_run))
    with pytest.raises(evaluation.EvaluationError, match="kept no tuning split"):
        evaluation.score(loaded, shapes, "tuning")
    with pytest.raises(evaluation.EvaluationError, match="is not a run"):
        evaluation.load(str(tmp_path))
    other = shapes.__class__.open(shapes.path)
    other.classes = ("disc", "ring", "stripes")
    with pytest.raises(evaluation.EvaluationError, match="the data have no 'frame'"):
        evaluation.score(loaded, other)
