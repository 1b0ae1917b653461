"""Batch prediction: a row per picture whatever the picture, and no work done twice."""

import csv
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ftlib.config import Augment, Model, Run
from ftlib.deploy import batch_predict as B
from ftlib.packaging.package import load, package
from ftlib.training import models
from tests.picture_files import TAKEN

RUN = Run(name="tiny", model=Model(arch="resnet18"), augment=Augment(size=32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return package(
        models.build(RUN.model, 3).eval(),
        RUN,
        ("a", "b", "c"),
        {},
        1.0,
        tmp_path_factory.mktemp("p") / "model",
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(9):
        (tmp_path / "pictures" / f"sub{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / f"sub{i % 2}" / f"{i}.{'png' if i % 3 else 'jpg'}"
        )
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_a_row_per_picture_with_errors_as_rows(model, folder, tmp_path):
    told = []
    table = B.predict_folder(
        str(model),
        folder,
        tmp_path / "out.parquet",
        B.PredictOptions(top_k=2),
        tick=lambda done, total: told.append((done, total)),
    )
    assert table.num_rows == 10 and told[0] == (0, 10) and told[-1] == (10, 10)
    rows = {r["path"]: r for r in table.to_pylist()}
    assert list(rows) == sorted(rows)
    assert "its end is missing" in rows["broken.jpg"]["error"]
    assert rows["broken.jpg"]["class"] is None
    direct = load(str(model)).predict([folder / "sub1" / "1.png"], params={"top_k": 2})[0]
    row = rows["sub1/1.png"]
    assert (
        row["class"] == direct["class"]
        and row["error"] is None
        and row["top_classes"] == [t["class"] for t in direct["top"]]
    )
    assert row["probability"] == pytest.approx(direct["probability"], abs=1e-6)
    assert (
        pq.read_table(tmp_path / "out.parquet").equals(table)
        and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    )


def test_a_killed_job_goes_on_where_it_stopped(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "PART", 3)
    real, seen = B.Classifier.rows, []

    def rows(self, paths):
        if len(seen) == 2 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        seen.append(list(paths))
        return real(self, paths)

    monkeypatch.setattr(B.Classifier, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        B.predict_folder(str(model), folder, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    (tmp_path / "go").touch()
    table = B.predict_folder(str(model), folder, tmp_path / "out.parquet")
    assert (
        sorted(name for part in seen for name in part) == B.pictures_of(folder).files
        and table.num_rows == 10
    ), "a picture was done twice or not at all"
    monkeypatch.setattr(
        B.Classifier, "__init__", lambda *a: pytest.fail("a finished job loaded the model")
    )
    assert B.predict_folder(str(model), folder, tmp_path / "out.parquet").equals(table)


def test_impossible_requests_are_explained(model, folder, tmp_path):
    with pytest.raises(B.PredictError, match="no such folder"):
        B.predict_folder(str(model), tmp_path / "nowhere", tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(B.PredictError, match="holds no pictures"):
        B.predict_folder(str(model), tmp_path / "empty", tmp_path / "a.parquet")
    with pytest.raises(B.PredictError, match=r"must end in \.parquet or \.csv"):
        B.predict_folder(str(model), folder, tmp_path / "a.txt")
    B.predict_folder(str(model), folder / "sub0", tmp_path / "a.parquet")
    with pytest.raises(B.PredictError, match="is there already"):
        B.predict_folder(str(model), folder, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="cannot be loaded as a packaged model"):
        B.predict_folder(str(tmp_path / "empty"), folder, tmp_path / "b.parquet")


def test_csv_has_the_same_rows_and_no_formulas(model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("=HYPERLINK(1).png", "@a.png", "plain.png"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(pictures / name)
    (pictures / "bad.jpg").write_bytes(b"no picture")
    options = B.PredictOptions(top_k=2)
    table = B.predict_folder(str(model), pictures, tmp_path / "out.csv", options)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        "'=HYPERLINK(1).png",
        "'@a.png",
        "bad.jpg",
        "plain.png",
    ]
    for row, whole in zip(rows, table.to_pylist()):
        assert row["class"] == (whole["class"] or "")
        if whole["error"]:
            assert row["error"] == whole["error"] and row["class_2"] == row["probability"] == ""
        else:
            assert float(row["probability"]) == whole["probability"]
            assert row["class_2"] == whole["top_classes"][1]
            assert float(row["probability_2"]) == whole["top_probabilities"][1]
    again = B.predict_folder(str(model), pictures, tmp_path / "out.csv", options)
    assert again.equals(table), "a finished file is returned as it is"


def test_file_names_that_are_no_text_get_a_row(model, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / name)
    table = B.predict_folder(str(model), tmp_path, tmp_path / "out.parquet")
    assert table["path"].to_pylist() == ["caf\\xe9.png"] and table["error"].null_count == 1


def test_one_file_is_one_row(model, folder):
    row = B.predict_file(str(model), folder / "sub1" / "1.png", B.PredictOptions(top_k=3))
    assert row["path"] == "1.png" and row["error"] is None and len(row["top_classes"]) == 3


def test_every_kind_of_file_is_read_as_the_package_does(model, tmp_path):
    for number, make in enumerate(TAKEN.values()):
        (tmp_path / f"{number:02d}.jpg").write_bytes(make())
    rows = B.predict_folder(str(model), tmp_path, tmp_path / "out.parquet").to_pylist()
    direct = load(str(model)).predict([make() for make in TAKEN.values()])
    assert [row["error"] for row in rows] == [None] * len(TAKEN)
    for row, answer in zip(rows, direct):
        assert row["probability"] == pytest.approx(answer["probability"], abs=1e-6)


@pytest.fixture
def predict_job(model):
    """Run jobs/predict.py with the model and further arguments."""
    path = Path(__file__).parents[2] / "jobs" / "predict.py"
    module = runpy.run_path(str(path))
    return lambda *words: module["main"](["--model", str(model), *map(str, words)])


def test_the_job_prints_the_classes_of_one_picture(predict_job, folder, capsys):
    predict_job("--source", folder / "sub1" / "1.png", "--top-k", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].endswith("%") and "1.png: " in lines[0]
    assert lines[0].split(": ")[1].split(",")[0] == lines[1].split()[0]
    with pytest.raises(ValueError, match="its end is missing"):
        predict_job("--source", folder / "broken.jpg")
    with pytest.raises(ValueError, match="--out is missing"):
        predict_job("--source", folder)


def test_the_job_counts_what_it_leaves_aside(predict_job, folder, tmp_path, capsys):
    (folder / ".hidden").write_text("")
    predict_job("--source", folder, "--out", tmp_path / "out.csv")
    printed = capsys.readouterr().out
    assert "10 pictures, 1 of which could not be read" in printed
    assert "left aside 2 files that are no pictures (" in printed
    assert "1 .txt" in printed and "1 hidden" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray.data warns about its own settings
def test_ray_data_gives_the_same_rows(model, folder, tmp_path, monkeypatch):
    import tempfile

    import ray

    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setattr(B, "PART", 4)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temporary,
    )
    try:
        by_ray = B.predict_folder(
            str(model), folder, tmp_path / "ray.parquet", B.PredictOptions(engine="ray")
        )
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
    here = B.predict_folder(
        str(model), folder, tmp_path / "here.parquet", B.PredictOptions(engine="local")
    )
    assert (
        by_ray["path"].equals(here["path"])
        and by_ray["class"].equals(here["class"])
        and by_ray["error"].equals(here["error"])
    )
