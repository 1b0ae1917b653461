"""A package under a name in a real MLflow store, found again by its alias."""

import json

import pytest
import torch

from ftlib.checks import STORE_VARIABLES, check_model
from ftlib.config import Augment, Model, Run
from ftlib.packaging.package import PackageError, check, example, load, package
from ftlib.packaging.register import register
from ftlib.settings import ConfigError
from ftlib.track.store import client, ensure_store, sqlite_uri
from ftlib.training import models
from jobs import export

RUN = Run(name="named", model=Model(arch="resnet18"), augment=Augment(size=32))


def test_a_registered_package_is_found_by_its_alias_and_is_not_registered_twice(
    tmp_path, monkeypatch
):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ensure_store(uri)
    mlflow = client(uri)
    experiment = mlflow.create_experiment("zoo", artifact_location=str(tmp_path / "artifacts"))
    run = mlflow.create_run(experiment).info.run_id
    torch.manual_seed(0)
    folder = package(
        models.build(RUN.model, 3).eval(),
        RUN,
        ("a", "b", "c"),
        {"val/top1": 50.0},
        1.0,
        tmp_path / "model",
    )
    where = {"uri": uri, "run_id": run, "experiment_id": experiment}
    address = register(folder, "zoo", "candidate", **where)
    assert address == "models:/zoo@candidate"
    check(address, uri)
    assert load(address, uri).predict([example()]) == load(str(folder)).predict([example()])
    register(folder, "zoo", "champion", **where)
    versions = mlflow.search_model_versions("name = 'zoo'")
    assert len(versions) == 1 and sorted(mlflow.get_registered_model("zoo").aliases) == [
        "candidate",
        "champion",
    ]
    for name, alias, says in (
        ("a/b", "x", "name 'a/b'"),
        ("zoo", "latest", "alias 'latest'"),
        ("zoo", "v3", "alias 'v3'"),
    ):
        with pytest.raises(PackageError, match=says):
            register(folder, name, alias, **where)
    with pytest.raises(PackageError, match="is no package"):
        register(tmp_path, "zoo", "champion", **where)
    with pytest.raises(PackageError, match="is no packaged model"):
        check("models:/zoo@nobody", uri)
    monkeypatch.setenv("FTLIB_HOME", str(tmp_path))
    for name in STORE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for good in ("models:/zoo@champion", "models:/zoo/1"):
        check_model(good)
    with pytest.raises(ConfigError, match=r"no model zo is registered.*Did you mean zoo\?"):
        check_model("models:/zo@champion")
    with pytest.raises(ConfigError, match=r"no alias champoin. Did you mean champion\?"):
        check_model("models:/zoo@champoin")
    check_model("models:/zo@champion", "http://another.store")

    recorded = {"uri": uri, "run_id": run, "experiment_id": experiment}
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"mlflow": recorded}))
    asked = export.Options(run="r", out="x", formats=("mlflow",), register="zoo", alias="best")
    address = "models:/zoo@best"
    assert export.register(asked, str(run_dir), folder) == (address, address)
    monkeypatch.setenv("FTLIB_HOME", str(tmp_path / "another"))
    words = f"{address} --tracking-uri {sqlite_uri(tmp_path / 'mlflow.db')}"
    assert export.register(asked, str(run_dir), folder) == (address, words)
