import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ftlib.config import Data, Run
from ftlib.data import sampler
from ftlib.data.shards import Dataset
from ftlib.settings import to_dict
from ftlib.storage import DamagedError
from ftlib.training import seen_rows
from ftlib.training.initial_weights import InitialWeights
from ftlib.training.seen_rows import SeenRows


def run_on(dataset, name, subset=1.0, **data):
    return Run(name=name, data=Data(path=dataset.path, subset=subset, **data))


def weights_of(root, name):
    """Weights as a later run finds them: the best model in the folder of the run `name`."""
    return InitialWeights(f"{root}/{name}/best/step-00000001", "0" * 64, {"run": name})


def rows_of(dataset, run):
    return sampler.run_rows(dataset.split("train").labels, run.data)[0]


def test_a_run_records_its_own_rows_and_those_of_all_runs_before_it(shapes, tmp_path):
    root = str(tmp_path)
    first, second = run_on(shapes, "one", 0.25), run_on(shapes, "two", 0.5, subset_seed=7)
    third = run_on(shapes, "three", 0.25, subset_seed=9)
    seen_rows.record(f"{root}/one", first, shapes, None, root)
    seen_rows.record(f"{root}/two", second, shapes, weights_of(root, "one"), root)
    seen = seen_rows.record(f"{root}/three", third, shapes, weights_of(root, "two"), root)
    expected = set().union(*(rows_of(shapes, run).tolist() for run in (first, second, third)))
    assert set(np.flatnonzero(seen.mask(shapes)).tolist()) == expected
    assert seen.runs == ("three", "two", "one") and seen.count(shapes.digest) == len(expected)
    assert seen_rows.of_run(f"{root}/three", root).digest == seen.digest


def test_a_record_is_written_once_and_survives_its_ancestors(shapes, tmp_path):
    root = str(tmp_path)
    run = run_on(shapes, "one", 0.25)
    first = seen_rows.record(f"{root}/one", run, shapes, None, root)
    file = Path(root, "one", seen_rows.FILE)
    before = file.read_bytes()
    again = seen_rows.record(f"{root}/one", run, shapes, weights_of(root, "gone"), root)
    assert again.digest == first.digest and file.read_bytes() == before


def test_a_damaged_record_is_refused_and_made_again(shapes, tmp_path):
    root = str(tmp_path)
    run = run_on(shapes, "one", 0.25)
    seen = seen_rows.record(f"{root}/one", run, shapes, None, root)
    file = Path(root, "one", seen_rows.FILE)
    values = json.loads(file.read_text())
    with pytest.raises(DamagedError, match="damaged"):
        SeenRows.from_json({**values, "digest": "0"})
    for change in ({"rows": 10**9}, {"rows": -1}, {"bitmap": "eJwDAAAAAAE="}, {"bitmap": 7}):
        with pytest.raises(DamagedError, match="damaged"):
            SeenRows.from_json({**values, "sets": [{**values["sets"][0], **change}]})
    file.write_text(json.dumps({**values, "digest": "0"}))
    assert seen_rows.record(f"{root}/one", run, shapes, None, root).digest == seen.digest


def test_the_rows_of_a_run_without_a_record_come_from_its_settings(shapes, tmp_path):
    root = str(tmp_path)
    run = run_on(shapes, "old", 0.5, tuning_fraction=0.2)
    about = {
        "run": to_dict(run),
        "fingerprint": "f",
        "data": {"name": shapes.name, "digest": shapes.digest, "path": shapes.path},
        "init": {**weights_of(root, "older").to_dict()},
    }
    Path(root, "old").mkdir()
    Path(root, "old", "run.json").write_text(json.dumps(about))
    found = seen_rows.of_run(f"{root}/old", root)
    assert np.array_equal(np.flatnonzero(found.mask(shapes)), np.sort(rows_of(shapes, run)))
    assert found.unknown == ("older",), "its own ancestor is gone"
    about["data"]["path"] = "/moved"
    Path(root, "old", "run.json").write_text(json.dumps(about))
    assert seen_rows.of_run(f"{root}/old", root).unknown == ("old",)
    again = seen_rows.of_run(f"{root}/old", root, shapes)
    assert again.digest == found.digest, "the data set at hand is the one that was moved"
    about["data"]["digest"] = "other"
    Path(root, "old", "run.json").write_text(json.dumps(about))
    assert seen_rows.of_run(f"{root}/old", root).unknown == ("old",)


def test_weights_from_elsewhere_are_named_as_unknown(shapes, tmp_path):
    published = InitialWeights("/x/y.safetensors", "0", kind="file", name="y")
    found = seen_rows.of_weights(published, "file:/x/y.safetensors", str(tmp_path))
    assert found.unknown == ("y",) and not found.sets
    assert seen_rows.of_weights(None, "scratch", str(tmp_path)) == SeenRows()
    assert seen_rows.of_weights(None, "imagenet", str(tmp_path)).unknown == ("imagenet",)


def test_a_run_that_names_itself_as_its_origin_ends(shapes, tmp_path):
    root = str(tmp_path)
    about = {
        "run": to_dict(run_on(shapes, "a")),
        "data": {"name": shapes.name, "digest": shapes.digest, "path": shapes.path},
        "init": weights_of(root, "a").to_dict(),
    }
    Path(root, "a").mkdir()
    Path(root, "a", "run.json").write_text(json.dumps(about))
    assert seen_rows.of_run(f"{root}/a", root).unknown == ("a",)


def test_images_are_recognized_in_another_data_set(shapes, tmp_path):
    """A set that was prepared again with other validation images: its training images are known."""
    from ftlib.preparation.prepare import prepare
    from tests.deploy.made import folders

    other = prepare(
        folders(tmp_path / "pictures", train=9, val=6, seed=0),
        tmp_path / "again",
        engine="local",
        workers=1,
        progress=False,
    ).dataset
    seen = SeenRows().trained("one", other, np.arange(len(other.split("train"))))
    for split in ("train", "val"):
        theirs = set(other.split("train").sha256.tolist())
        expected = [digest in theirs for digest in shapes.split(split).sha256.tolist()]
        mask, unchecked = seen.in_split(shapes, split)
        assert mask.tolist() == expected and not unchecked
    assert mask.any() or seen.in_split(shapes, "train")[0].any(), "the sets share images"
    lost = replace(seen.sets[other.digest], path=str(tmp_path / "gone"))
    mask, unchecked = SeenRows({other.digest: lost}).in_split(shapes, "val")
    assert not mask.any() and unchecked == (f"{other.name}@{other.digest[:8]}",)


def test_the_record_of_a_million_rows_is_small():
    mask = np.random.default_rng(0).random(1_281_167) < 0.2
    seen = SeenRows({"d": seen_rows.SeenSet("imagenet", "/x", mask)}, ("phase1",))
    packed = seen.to_json()
    assert len(packed) < 200_000
    assert np.array_equal(SeenRows.from_json(json.loads(packed)).sets["d"].mask, mask)


def test_the_dataset_lists_the_sha256_of_its_pictures(shapes):
    import hashlib

    split = Dataset.open(shapes.path).split("val")
    digests = [hashlib.sha256(split.image(row)).hexdigest().encode() for row in range(len(split))]
    assert split.sha256.tolist() == digests
