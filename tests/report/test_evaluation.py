"""Scoring a finished run: weights, splits, sizes, temperature."""

import numpy as np
import pytest

from ftlib.data.shards import DataError
from ftlib.preparation.prepare import prepare
from ftlib.report import evaluation
from ftlib.report.metrics import softmax
from ftlib.training import seen_rows
from ftlib.training.seen_rows import SeenRows
from tests.deploy import made


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


def prepared_of(shapes, folder, **splits):
    """A set whose splits hold the pictures of those of `shapes`: new split -> theirs."""
    for split, source in splits.items():
        part = shapes.split(source)
        for row in range(len(part)):
            into = folder / "pictures" / split / shapes.classes[part.labels[row]]
            into.mkdir(parents=True, exist_ok=True)
            (into / f"{row}.jpg").write_bytes(part.image(row))
    return prepare(folder / "pictures", folder / "set", progress=False).dataset


def test_pictures_that_the_weights_have_seen_fit_no_temperature(shapes, tmp_path):
    """Here the tuning split, and the validation pictures of another division of the same set."""
    folder = made.run_folder(tmp_path, shapes, tuning_fraction=0.25)
    loaded = evaluation.load(str(folder))
    everything = SeenRows().trained("before", shapes, np.arange(len(shapes.split("train"))))
    (folder / seen_rows.FILE).write_bytes(everything.to_json())
    assert "cross-fitting" in evaluation.score(loaded, shapes).calibration.fitted_on

    other = prepared_of(shapes, tmp_path, train="val", val="train", test="val")
    folder = made.run_folder(tmp_path, shapes, name="plain")
    (folder / seen_rows.FILE).write_bytes(everything.to_json())
    plain = evaluation.load(str(folder))
    assert "cross-fitting" in evaluation.score(plain, other, "test").calibration.fitted_on


def test_a_test_split_is_scored_with_the_temperature_of_val(shapes, shapes_run, tmp_path):
    held = prepared_of(shapes, tmp_path, train="train", val="val", test="val")
    loaded = evaluation.load(str(shapes_run))
    scored = evaluation.score(loaded, held, "test")
    assert len(scored.rows) == len(shapes.split("val"))
    assert f"{len(shapes.split('val'))} images of the val split" in scored.calibration.fitted_on
    with pytest.raises(DataError, match=r"splits train and val, not 'test'"):
        evaluation.score(loaded, shapes, "test")


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
