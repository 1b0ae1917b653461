"""What a run says and what it holds agree, of every pair at once, whatever write of its end fails.

The writes of training, preparation, report, package, sweep and promotion by themselves fail in the
tests of those modules.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ftlib.data.shards import Dataset
from ftlib.launch import finalize
from ftlib.launch.errors import StoppedError
from ftlib.launch.launch import launch
from ftlib.packaging import package
from ftlib.report import curves, evaluation, misclassified
from ftlib.settings import override
from ftlib.storage import StorageError, read_json
from ftlib.training.checkpoint import verify_best
from ftlib.tune.stored_predictions import predictions
from tests.failing_writes import FailingWrites
from tests.launch.test_launch import Recorder

PAIRS = {
    "manifest and shards",
    "scores and weights",
    "promotion and predictions",
    "report and weights",
    "package and run",
}


def agreeing(folder, data):
    """Checks each pair of which both sides are there. Returns their names."""
    dataset = Dataset.open(data)
    dataset.verify(deep=True)
    found = {"manifest and shards"}
    scored = evaluation.score(evaluation.load(str(folder)), dataset)
    if (result := read_json(f"{folder}/result.json")) is not None:
        metrics = result["metrics"]
        assert metrics["best/val_top1"] == scored.plain["top1"]
        step = int(result["best"].rpartition("-")[2])
        verify_best(str(folder), step, int(metrics["best/epoch"]))
        found.add("scores and weights")
        right = scored.logits.argmax(1) == scored.labels
        assert (predictions(str(folder)).correct == right[np.argsort(scored.rows)]).all()
        found.add("promotion and predictions")
    if (folder / "report" / "report.html").exists():
        (entry,) = json.loads((folder / "report" / "scores.json").read_text())
        assert entry["top1"][0] == scored.before["top1"].value
        found.add("report and weights")
    if (folder / "model" / "MLmodel").exists():
        split = dataset.split("val")
        pictures = [bytes(split.image(int(row))) for row in scored.rows]
        answers = package.load(str(folder / "model")).predict(pictures)
        expected = torch.tensor(scored.calibration.scaled).softmax(1).max(1)
        classes = [dataset.classes[i] for i in expected.indices]
        assert [a["class"] for a in answers] == classes
        given = [a["probability"] for a in answers]
        assert given == pytest.approx(expected.values.tolist(), abs=2e-3)
        found.add("package and run")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_write_of_a_run_s_end_may_fail(tiny, shapes, home, tmp_path, monkeypatch):
    """Each in turn (of report and package, whose own tests try all, each fourth), over a run that
    was stopped after its last step. It ends with an error, which the same command mends, or with
    warnings of what is missing. What is there agrees each time."""
    for module in (curves, misclassified):
        monkeypatch.setattr(module, "png", lambda figure: b"a picture")  # most of the time
    programs, export = [], package.export

    def exported(*given):  # of the same weights each time
        programs[:] = programs or [export(*given)]
        return programs[0]

    monkeypatch.setattr(package, "export", exported)
    run = override(tiny, {"name": "run", "track.log_model": True})
    folder, trained = home / "runs" / "run", tmp_path / "trained"
    log_end = finalize.log_end

    def stop(*_):
        raise StoppedError(15, "stopped")

    def go():
        tracking = Recorder()
        tracking.log_model = lambda *_, **__: None
        launch(run, local=True, tracking=tracking, quiet=True)

    monkeypatch.setattr(finalize, "log_end", stop)
    with pytest.raises(StoppedError):
        go()
    monkeypatch.setattr(finalize, "log_end", log_end)
    shutil.copytree(folder, trained)
    faults, paths = FailingWrites(monkeypatch, opens=folder), []

    def fail(wanted):
        """Let the write of that number fail; those of the lease's heartbeat do not count."""
        paths.clear()

        def fails(_, path):
            paths.extend([path] * (".lease-" not in path))
            return len(paths) - 1 == wanted and paths[-1] == path

        faults.wanted = fails

    fail(None)
    go()
    names = list(paths)
    assert len(names) > 40 and agreeing(folder, shapes) == PAIRS
    own = [n for n, path in enumerate(names) if Path(path).parent == folder]
    for first in sorted({*own, *range(0, len(names), 4)}):
        shutil.rmtree(folder)
        shutil.copytree(trained, folder)
        fail(first)
        with contextlib.suppress(StorageError):
            go()
        fail(None)
        found = agreeing(folder, shapes)
        if "scores and weights" not in found:
            go()
            assert agreeing(folder, shapes) == PAIRS, names[first]
