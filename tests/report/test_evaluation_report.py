"""The evaluation report of a run: the page, its figures and tables."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from ftlib.report import evaluation, evaluation_report, metrics, misclassified
from ftlib.report.run_facts import RunFacts
from ftlib.storage import StorageError
from tests.failing_writes import FailingWrites, whole


@pytest.fixture(scope="module")
def written(shapes, shapes_run):
    run_dir = str(shapes_run)
    return evaluation_report.report_run(
        evaluation.load(run_dir), run_dir, shapes, out=shapes_run / "report", split="val"
    )


def test_a_report_holds_all_it_shows(written, shapes):
    text = written.page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text
    for word in (
        "Scores",
        "Confusion matrix",
        "Worst mistakes",
        "Calibration",
        "Classes",
        "disc",
        "resnet18",
        "calibrated",
    ):
        assert word in text
    assert all(file.stat().st_size > 100 for file in written.files)
    assert {file.name for file in written.files} >= {
        "report.html",
        "confusion.png",
        "calibration.png",
        "classes.csv",
        "scores.json",
    }


def test_the_first_sentence_gives_the_interval_and_the_most_frequent_mistake(written):
    scored, text = written.scored, written.page.read_text()
    interval = scored.before["top1"]
    assert f"{interval.low:.1f} to {interval.high:.1f} % would be classified correctly" in text
    predicted = scored.logits.argmax(1)
    wrong = [(t, p) for t, p in zip(scored.labels, predicted) if t != p]
    most = max(wrong.count(pair) for pair in wrong)
    found = re.search(r"(\w+) taken for (\w+), (\d+) of (\d+)", text)
    classes = ("disc", "frame", "stripes")
    true, said = classes.index(found[1]), classes.index(found[2])
    assert wrong.count((true, said)) == most == int(found[3])
    assert int(found[4]) == (scored.labels == true).sum()


def test_a_class_without_pictures_has_no_scores_and_stands_last():
    classes = ["never seen", "good", "bad"]
    found = metrics.per_class(np.array([[0, 0, 0], [0, 5, 0], [0, 1, 1]]))
    table = str(evaluation_report._class_table(found, classes))
    cells = re.findall(r"<td[^>]*>\s*([^<>]*?)\s*</td>", table)
    assert cells[::5] == ["bad", "good", "never seen"] and cells[10:] == ["never seen", "0", *"---"]


def test_top5_is_no_headline_where_there_are_at_most_five_classes(written):
    facts = re.search(r'<div class="facts">.*?</div></div>', written.page.read_text())[0]
    assert "top-1" in facts and "top-5" not in facts
    assert "<td>top-5 %</td>" not in written.page.read_text()


def test_a_score_says_that_its_pictures_chose_the_epoch(shapes, shapes_run, tmp_path):
    loaded = evaluation.load(str(shapes_run))

    def says_so(epochs, split):
        train = dataclasses.replace(loaded.run.train, epochs=epochs)
        run = dataclasses.replace(loaded.run, train=train)
        of = dataclasses.replace(loaded, run=run)
        scored = [evaluation.score(of, shapes, split)]
        page = evaluation_report.write(of, scored, shapes, tmp_path, split).page
        return evaluation.CHOSEN_HERE in page.read_text()

    assert says_so(9, "val") and not says_so(1, "val") and not says_so(9, "train")


def test_curves_changed_settings_and_the_mlflow_page_are_shown(shapes, shapes_run, tmp_path):
    loaded = evaluation.load(str(shapes_run))
    facts = RunFacts(
        curves=b"\x89PNG drawn",
        changed=(("optimizer.lr", "0.001", "0.0042"),),
        mlflow="http://127.0.0.1:5000/#/experiments/1/runs/abc?workflowType=machine_learning",
    )
    scored = [evaluation.score(loaded, shapes)]
    page = evaluation_report.write(loaded, scored, shapes, tmp_path, "val", facts=facts).page
    text = page.read_text()
    assert f'href="{facts.mlflow}"' in text and 'alt="training curves"' in text
    assert "<td>optimizer.lr</td>" in text and "0.0042</td>" in text


def test_the_sheet_of_mistakes_stays_below_half_a_megabyte():
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 255, (224, 224, 3), np.uint8) for _ in range(3)]
    tile = ("one predicted as another (99%)", photos)
    sheet = evaluation_report.misclassified.sheet([tile] * evaluation_report.WORST, "abc")
    assert len(sheet) < 500_000  # of noise, which compresses worse than any photo


def test_its_numbers_are_scikit_learns(written):
    scored = written.scored
    predicted = scored.logits.argmax(1)
    entry = json.loads((written.page.parent / "scores.json").read_text())[0]
    assert entry["top1"][0] == pytest.approx(100 * accuracy_score(scored.labels, predicted))
    assert entry["top1"][1] <= entry["top1"][0] <= entry["top1"][2]
    rows = list(csv.DictReader((written.page.parent / "classes.csv").read_text().splitlines()))
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
    scored = dataclasses.replace(
        scored, logits=perfect, calibration=dataclasses.replace(scored.calibration, scaled=perfect)
    )
    written = evaluation_report.write(loaded, [scored], shapes, tmp_path, "val")
    assert (
        "every picture was classified correctly" in written.page.read_text()
        and not (tmp_path / "worst.png").exists()
    )


def test_it_shows_the_probabilities_that_the_packaged_model_gives(
    written, shapes, shapes_run, tmp_path
):
    from ftlib.packaging.package import load, package

    loaded = evaluation.load(str(shapes_run))
    temperature = written.scored.calibration.temperature
    folder = package(
        loaded.model.cpu(), loaded.run, loaded.classes, {}, temperature, tmp_path / "model"
    )
    split = shapes.split("val")
    pictures = [bytes(split.image(int(row))) for row in written.scored.rows]
    answers = load(str(folder)).predict(pictures, params={"top_k": 3})
    wrong = [
        answer
        for answer, label in zip(answers, written.scored.labels)
        if answer["class"] != loaded.classes[label]
    ]
    packaged = {
        f"{t['class']}: {100 * t['probability']:.1f} %" for answer in wrong for t in answer["top"]
    }
    shown = set(re.findall(r"\b(?:disc|frame|stripes): \d+\.\d %", written.page.read_text()))
    assert wrong and shown and shown <= packaged


@pytest.mark.parametrize(
    "length", [1, pytest.param(5, marks=pytest.mark.slow)], ids=["once", "for a while"]
)
def test_every_write_of_a_report_may_fail(shapes, shapes_run, tmp_path, monkeypatch, length):
    """Each in turn, over the report of another scoring: a page that stands is whole, and so are
    the tables and figures beside it, which are its own."""
    loaded = evaluation.load(str(shapes_run))
    monkeypatch.setattr(misclassified, "png", lambda figure: b"a picture")  # most of the time
    faults = FailingWrites(monkeypatch)
    scored = {limit: [evaluation.score(loaded, shapes, limit=limit)] for limit in (0, 8)}

    def write(name, limit=0):
        evaluation_report.write(loaded, scored[limit], shapes, tmp_path / name, "val")
        return whole(tmp_path / name)

    earlier, faults.count = write("earlier", limit=8), 0
    expected, writes = write("whole"), faults.count
    assert writes >= 15 and earlier["report.html"] != expected["report.html"]
    for first in range(writes):
        write("torn", limit=8)
        faults.count, faults.wanted = 0, lambda number, _, k=first: k <= number < k + length
        with pytest.raises(StorageError, match="the disk is full"):
            write("torn")
        found = whole(tmp_path / "torn")
        assert all(data in (earlier.get(f), expected.get(f)) for f, data in found.items()), first
        assert "report.html" not in found or found == expected, f"write {first} of {writes} failed"
        faults.wanted = lambda number, _: False
    assert write("torn") == expected
