"""Batch prediction: a row per picture whatever the picture, the same answers by every engine, no work done twice."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ftlib.config import Augment, Model, Run
from ftlib.deploy import batch_predict as B
from ftlib.packaging.package import load, package
from ftlib.training import models

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
        top_k=2,
        tick=lambda done, total: told.append((done, total)),
    )
    assert table.num_rows == 10 and told[0] == (0, 10) and told[-1] == (10, 10)
    rows = {r["path"]: r for r in table.to_pylist()}
    assert list(rows) == sorted(rows)
    assert "no picture of a known kind" in rows["broken.jpg"]["error"]
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
        sorted(name for part in seen for name in part) == B.pictures(folder)
        and table.num_rows == 10
    ), "a picture was done twice or not at all"
    monkeypatch.setattr(
        B.Classifier, "__init__", lambda *a: pytest.fail("a finished job loaded the model")
    )
    assert B.predict_folder(str(model), folder, tmp_path / "out.parquet").equals(table)


def test_what_cannot_be_done_is_said_so(model, folder, tmp_path):
    with pytest.raises(B.PredictError, match="no such folder"):
        B.predict_folder(str(model), tmp_path / "nowhere", tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(B.PredictError, match="holds no pictures"):
        B.predict_folder(str(model), tmp_path / "empty", tmp_path / "a.parquet")
    with pytest.raises(B.PredictError, match=r"must end in \.parquet"):
        B.predict_folder(str(model), folder, tmp_path / "a.csv")
    B.predict_folder(str(model), folder / "sub0", tmp_path / "a.parquet")
    with pytest.raises(B.PredictError, match="is there already"):
        B.predict_folder(str(model), folder, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="cannot be loaded as a packaged model"):
        B.predict_folder(str(tmp_path / "empty"), folder, tmp_path / "b.parquet")


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
        by_ray = B.predict_folder(str(model), folder, tmp_path / "ray.parquet", engine="ray")
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
    here = B.predict_folder(str(model), folder, tmp_path / "here.parquet", engine="here")
    assert (
        by_ray["path"].equals(here["path"])
        and by_ray["class"].equals(here["class"])
        and by_ray["error"].equals(here["error"])
    )
