"""The command that scores a run: its table, its report, and what it says to mistakes."""

import importlib.util
import json
from pathlib import Path

import pytest

from ftlib.track.store import client, ensure_experiment, ensure_store, sqlite_uri
from tests.columns import too_wide
from tests.deploy import made

JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("evaluate_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(shapes_run, monkeypatch):
    monkeypatch.setenv("FTLIB_HOME", str(shapes_run.parent.parent))
    return shapes_run


def test_a_run_by_its_name(job, here, capsys, tmp_path):
    job.main(["shapes-run", "--sizes", "32,40", "--workers", "0", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    entries = json.loads((tmp_path / "scores.json").read_text())
    assert [e["size"] for e in entries] == [32, 40]
    top1, low, high = entries[0]["top1"]
    assert (
        f"{top1:.2f} [{low:.2f}, {high:.2f}]" in out
        and "30 pictures of" in out
        and "not averaged" in out
    )
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["input", "32", "px", "40", "px"] and max(map(len, table)) <= 60
    assert f"report      {tmp_path / 'report.html'}" in out and not too_wide(out)
    assert "Next: " in out and "export.py shapes-run --out model --formats mlflow" in out
    assert (tmp_path / "report.html").exists()


def test_other_pictures_of_the_same_classes(job, here, capsys, tmp_path):
    other = made.dataset(tmp_path, train=2, val=6, seed=9)
    job.main(
        [
            str(here),
            "--data",
            other.path,
            "--split",
            "val",
            "--no-report",
            "--workers",
            "0",
            "--flip",
        ]
    )
    out = capsys.readouterr().out
    assert "18 pictures" in out and "32 px + mirror" in out and "report  " not in out


def test_mistakes(job, here, tmp_path, capsys):
    with pytest.raises(ValueError, match="there is no run no-such-run"):
        job.main(["no-such-run", "--workers", "0"])
    with pytest.raises(ValueError, match="kept no tuning split"):
        job.main(["shapes-run", "--split", "tuning", "--workers", "0"])
    for wrong in (
        ["shapes-run", "--sizes", "big"],
        ["shapes-run", "--limit", "-1"],
        ["shapes-run", "--split", "held"],
    ):
        with pytest.raises(SystemExit) as ended:
            job.main(wrong)
        assert ended.value.code == 2


def test_a_report_goes_to_the_store_of_a_home_that_was_moved(job, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    uri = sqlite_uri(old / "mlflow.db")
    ensure_store(uri)
    mlflow = client(uri)
    experiment = ensure_experiment(mlflow, "pets", uri)
    recorded = {"uri": uri, "run_id": mlflow.create_run(experiment).info.run_id}
    old.rename(new)
    page = tmp_path / "report.html"
    page.write_text("<h1>Report</h1>")
    record = {"mlflow": {**recorded, "experiment_id": experiment}}
    address, command = job.attach(str(new / "runs" / "r"), record, [page], "report/pets-val")
    assert list((new / "mlflow-artifacts").rglob("report/pets-val/report.html"))
    assert not old.exists()
    assert "/artifacts/report/pets-val/report.html?" in address and " ui --uri " in command
