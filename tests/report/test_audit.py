"""The audit finds what was planted, and nothing in clean data.

Modules: audit, audit_page.
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ftlib.preparation.prepare import prepare
from ftlib.report import audit as A
from ftlib.report import audit_page
from tests.deploy import made

JOB = Path(__file__).parents[2] / "jobs" / "audit.py"


def scene(seed, side=64):
    """Coloured blobs: pictures that no two seeds share."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(
        rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC
    )
    return image


def hashes(images):
    prints = [A.fingerprint(i) for i in images]
    return np.array([p.gradient for p in prints], np.uint64), np.array(
        [p.frequency for p in prints], np.uint64
    )


def test_the_banded_search_finds_every_pair_that_comparing_all_with_all_finds():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = np.zeros(300, np.uint64)
    for i in range(300):
        for bit in rng.choice(64, rng.integers(0, 8), replace=False):
            flips[i] |= np.uint64(1) << np.uint64(bit)
    both = np.concatenate([base, base ^ flips])
    for near in (0, 3, 4, 7):
        found = {(p.a, p.b) for p in A.near_pairs(both, both, near)}
        wanted = {
            (a, b)
            for a in range(600)
            for b in range(a + 1, 600)
            if int(both[a] ^ both[b]).bit_count() <= near
        }
        assert found == wanted and len(wanted) > 20
    with pytest.raises(ValueError, match="pairs would be missed"):
        A.near_pairs(both, both, 8)


@pytest.mark.parametrize("change", ["quality", "smaller", "brighter"])
def test_the_hashes_survive_what_makes_near_duplicates_and_tell_others_apart(change):
    originals = [scene(i) for i in range(40)]
    if change == "quality":
        changed = [
            cv2.imdecode(
                cv2.imencode(".jpg", i, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR
            )
            for i in originals
        ]
    elif change == "smaller":
        changed = [cv2.resize(i, (40, 40), interpolation=cv2.INTER_AREA) for i in originals]
    else:
        changed = [np.clip(i.astype(int) * 0.9 + 20, 0, 255).astype(np.uint8) for i in originals]
    found = A.near_pairs(*hashes(originals + changed))
    right = sum(p.b == p.a + 40 for p in found)
    assert right >= 36 and right == len(found), (
        "missed too many, or took different pictures for the same"
    )


def test_exact_repeats_point_to_the_first():
    assert A.exact_pairs([b"a", b"b", b"a", b"a"]) == [A.Pair(0, 2, 0), A.Pair(0, 3, 0)]


def test_planted_wrong_labels_come_first_and_right_ones_are_let_be():
    rng = np.random.default_rng(0)
    pictures = [made.drawing(kind, rng) for kind in ("disc", "stripes") for _ in range(80)]
    labels = np.repeat([0, 1], 80)
    wrong = [3, 17, 90, 121]
    labels[wrong] = 1 - labels[wrong]
    found, agreement = A.suspects(np.stack([A.features(p) for p in pictures]), labels)
    assert set(wrong) <= {s.position for s in found[:6]} and len(found) <= 8
    assert 0.9 < agreement < 1 and all(
        s.said == 1 - labels[s.position] and s.confidence > s.own for s in found
    )


def test_labels_of_tiny_or_single_classes_are_not_judged():
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    assert A.suspects(x, np.zeros(20, np.int64)) == ([], 0.0)
    assert A.suspects(x, np.array([0] * 18 + [1, 1])) == ([], 0.0)


def test_odd_sizes():
    usual = np.random.default_rng(0).integers(300, 500, (200, 2)).astype(np.int32)
    sizes = np.concatenate([usual, [[20, 20], [90, 5000], [8000, 8000]]]).astype(np.int32)
    assert set(A.odd_sizes(sizes, 10)) == {200, 201, 202}
    assert len(A.odd_sizes(np.full((50, 2), 32, np.int32), 10)) == 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A data set with one leak, one leak at lower quality, one repeat, one picture under two
    labels, one flat pair."""
    root = tmp_path_factory.mktemp("planted")
    for split, start, n in (("train", 0, 8), ("val", 100, 4)):
        for c, kind in enumerate(("left", "right")):
            (root / "pictures" / split / kind).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(scene(start + 1000 * c + i)).save(
                    root / "pictures" / split / kind / f"{i}.jpg", quality=95
                )
    p = root / "pictures"
    copy = lambda a, b: (p / b).write_bytes((p / a).read_bytes())  # noqa: E731
    copy("train/left/0.jpg", "val/left/leak.jpg")
    with Image.open(p / "train/right/1.jpg") as image:
        image.save(p / "val/right/again.jpg", quality=70)
    copy("train/left/2.jpg", "train/left/twice.jpg")
    copy("train/left/3.jpg", "train/right/both.jpg")
    for split in ("train", "val"):
        Image.fromarray(np.full((64, 64, 3), 200 if split == "train" else 190, np.uint8)).save(
            p / split / "left" / "blank.jpg"
        )
    return prepare(p, root / "set", engine="local", workers=1, progress=False).dataset


@pytest.fixture(scope="module")
def found(planted):
    return audit_page.audit(planted)


def test_planted_duplicates_are_found_and_nothing_else(found):
    named = lambda pairs: {tuple(sorted((found.file(p.a), found.file(p.b)))) for p in pairs}  # noqa: E731
    assert named(p for p in found.leaks if p.distance == 0) == {
        ("train/left/0.jpg", "val/left/leak.jpg")
    }
    assert named(p for p in found.leaks if p.distance) == {
        ("train/right/1.jpg", "val/right/again.jpg")
    }
    assert named(found.conflicts) == {("train/left/3.jpg", "train/right/both.jpg")}
    assert named(found.within) == {
        ("train/left/2.jpg", "train/left/twice.jpg"),
        ("train/left/3.jpg", "train/right/both.jpg"),
    }
    assert found.flat == 2


def test_the_page_shows_them_and_the_list_names_them(found, tmp_path):
    files = audit_page.write(found, tmp_path)
    html = files[0].read_text()
    for word in (
        "val/left/leak.jpg",
        "val/right/again.jpg",
        "train/right/both.jpg",
        "left or right",
        "In train and in val: 2",
        "2 are too uniform",
    ):
        assert word in html
    rows = list(csv.DictReader((tmp_path / "findings.csv").read_text().splitlines()))
    assert {r["finding"] for r in rows} >= {
        "same across splits",
        "near across splits",
        "same",
        "same, labels differ",
    }
    with Image.open(tmp_path / "classes.png") as image:
        assert image.width > 800


def test_features_of_a_trained_model_can_judge(planted):
    asked = []

    def features(dataset):
        asked.append(dataset)
        return np.zeros((len(dataset.split("train")) + len(dataset.split("val")), 3), np.float32)

    assert audit_page.audit(planted, features=features).suspects == [] and asked == [planted]


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({}, []),
        ({"max_leaks": 2}, []),
        ({"max_leaks": 1}, ["leaks"]),
        ({"max_conflicts": 0, "max_duplicates": 0.5}, ["conflicts"]),
        ({"max_duplicates": 0.01}, ["duplicates"]),
    ],
)
def test_thresholds(found, limits, passed):
    spec = importlib.util.spec_from_file_location("audit_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = argparse.Namespace(
        **{
            "max_leaks": None,
            "max_conflicts": None,
            "max_duplicates": None,
            "max_suspects": None,
            **limits,
        }
    )
    assert [line.split()[0] for line in module.exceeded(found, arguments)] == passed


def test_the_job_ends_with_1_where_a_threshold_is_passed(planted, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("audit_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ended:
        module.main([planted.path, "--out", str(tmp_path / "a"), "--max-leaks", "0"])
    assert ended.value.code == 1 and "leaks 2, more than --max-leaks 0" in capsys.readouterr().err
    module.main([planted.path, "--out", str(tmp_path / "b"), "--max-leaks", "2"])
    assert (tmp_path / "b" / "audit.html").exists()


def test_patients_in_train_and_test_are_named(tmp_path):
    for split, patients in (("train", range(4)), ("val", (4,)), ("test", (2, 3, 5))):
        for patient in patients:
            for shot in range(2):
                name = f"{split}/{'ab'[patient % 2]}/p{patient}_{shot}{len(split)}.png"
                made_picture = tmp_path / "pictures" / name
                made_picture.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scene(100 * patient + 10 * shot + len(split))).save(made_picture)
    prepared = prepare(tmp_path / "pictures", tmp_path / "set", progress=False)
    torn = ["p2: 2 train, 2 test", "p3: 2 train, 2 test"]
    assert any(torn[0] in warning for warning in prepared.report["warnings"])
    found = audit_page.audit(prepared.dataset)
    assert [str(group) for group in found.torn] == torn
    page, _, table = audit_page.write(found, tmp_path)
    assert "Groups in more than one split: 2" in page.read_text()
    with open(table) as file:
        kept = [row["detail"] for row in csv.DictReader(file) if row["finding"] == "torn group"]
    assert kept == torn
