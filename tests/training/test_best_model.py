"""The best model on disk is the one that the scores name, whatever fails to be written:
`checkpoint.CheckpointWriter` and `loop.Training` together."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save

from ftlib import storage
from ftlib.config import Run
from ftlib.data.augment import EvalTransform
from ftlib.settings import override
from ftlib.storage import StorageError
from ftlib.training import checkpoint, loop, scoring
from ftlib.training.checkpoint import CheckpointWriter, steps
from ftlib.training.evaluate import normalize
from ftlib.training.loop import InterruptedTrainingError, WorkerContext, train
from tests.failing_writes import FailingWrites
from tests.training.conftest import MemoryDataset

BASE = {
    "model.arch": "squeezenet1_1",
    "augment.size": 17,
    "augment.crop_scale": [0.9, 1.0],
    "optimizer": "SGD",
    "optimizer.lr": 0.02,
    "train.epochs": 3,
    "train.batch_size": 8,
    "train.microbatch_size": 8,
    "train.log_every": 1,
    "checkpoint.every_seconds": 0,
    "evaluate.batch_size": 16,
}
SCORES = {1: 20.0, 2: 30.0, 3: 25.0}
"""Validation top-1 of each epoch, so that the best one is the second."""


@pytest.fixture(scope="module")
def few():
    """16 training and 4 validation pictures: two steps an epoch."""
    return MemoryDataset(16, 4, classes=3)


def fix_scores(patch):
    """Real losses, with the accuracies of SCORES."""
    patch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    score = loop.Training.score

    def fixed(training, *_):
        top1 = round(SCORES[training.state.step // training.steps_per_epoch] * 100)
        counts = score(training)
        return dataclasses.replace(counts, top1=top1, top5=top1, images=10_000)

    patch.setattr(loop.Training, "score", fixed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    fix_scores(monkeypatch)


def recipe():
    return override(Run(), BASE)


def run_in(folder, data, **more):
    return train(WorkerContext(recipe(), data, str(folder), **more))


def check_law(folder, result):
    """Scores, state and weights on disk are of the same epoch."""
    state = checkpoint.latest(str(folder / "checkpoints"))[1]
    epoch = int(result["metrics"]["best/epoch"])
    assert (state["best_epoch"], result["best_epoch"]) == (epoch, epoch)
    newest = folder / "best" / checkpoint.step_name(steps(str(folder / "best"))[0])
    about = json.loads((newest / "model.json").read_text())
    assert (about["epoch"], about["step"]) == (epoch, state["best_step"])
    assert about["scores"]["val/top1"] == result["metrics"]["best/val_top1"] == state["best"]
    return load_file(newest / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    """(weights of the best model, writes, renames and syncs of a whole run)."""
    with pytest.MonkeyPatch.context() as patch:
        faults = FailingWrites(patch)
        folder = tmp_path_factory.mktemp("undisturbed")
        fix_scores(patch)
        result = run_in(folder, few)
        assert result["best_epoch"] == 2
        return check_law(folder, result), faults.count


@pytest.mark.parametrize("length", [1, 2, 4], ids=["once", "both tries", "for a while"])
def test_every_write_rename_and_sync_of_a_run_may_fail(
    few, undisturbed, tmp_path, monkeypatch, length
):
    """Each of the run fails in turn, once or for a while. The run ends with the best model that it
    names, or stops with an error; then the same command ends it with the same model."""
    best, writes = undisturbed
    assert writes >= 25
    faults = FailingWrites(monkeypatch)
    for first in range(writes):
        folder = tmp_path / str(first)
        faults.count, faults.wanted = 0, lambda n, path, k=first: k <= n < k + length
        try:
            result = run_in(folder, few)
        except StorageError:
            faults.wanted = lambda n, path: False
            result = run_in(folder, few)
        found = check_law(folder, result)
        assert result["best_epoch"] == 2, first
        assert all(torch.equal(v, best[k]) for k, v in found.items()), first


def test_a_best_model_that_could_not_be_written_is_tried_again(few, tmp_path, monkeypatch):
    """Both tries fail, and the checkpoint after it succeeds: today's silent case."""
    tries = []

    def wanted(number, path):
        second = "best" in path and "step-00000004" in path
        tries.append(second)
        return second and sum(tries) <= 2

    FailingWrites(monkeypatch, wanted)
    result = run_in(tmp_path, few)
    check_law(tmp_path, result)
    assert result["best_epoch"] == 2 and sum(tries) > 2


def test_a_best_model_that_can_never_be_written_stops_the_run(few, tmp_path, monkeypatch):
    FailingWrites(monkeypatch, lambda number, path: "best" in path and "step-00000004" in path)
    with pytest.raises(StorageError, match="the disk is full"):
        run_in(tmp_path, few)
    assert steps(str(tmp_path / "checkpoints"))[0] == 6


def test_weights_lost_before_a_restart_are_not_named_any_more(few, tmp_path, monkeypatch, caplog):
    """The best model was never written, and the state has gone on: the best one left counts."""
    faults = FailingWrites(
        monkeypatch, lambda number, path: "best" in path and "step-00000004" in path
    )
    asked = []

    def notice():
        asked.append(0)
        return "stop" if len(asked) == 5 else ""

    with pytest.raises((InterruptedTrainingError, StorageError)):
        run_in(tmp_path, few, notice=notice)
    assert checkpoint.latest(str(tmp_path / "checkpoints"))[1]["best_epoch"] == 2
    faults.wanted = lambda number, path: False
    result = run_in(tmp_path, few)
    assert "the best model, of epoch 2 (30.00 %)" in caplog.text
    assert result["best_epoch"] == 3 and result["metrics"]["best/val_top1"] == 25.0
    check_law(tmp_path, result)


def test_a_damaged_best_model_is_not_handed_over(few, tmp_path):
    result = run_in(tmp_path, few)
    weights = tmp_path / "best" / "step-00000004" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StorageError, match="should hold the best model, of epoch 2"):
        checkpoint.verify_best(str(tmp_path), result["best_step"], result["best_epoch"])


def test_a_run_does_not_finish_with_weights_that_do_not_score_as_its_scores_say(
    few, tmp_path, monkeypatch
):
    """The folder says epoch 2, and every byte of it has the sha256 of its manifest: but the weights
    are others. Without that folder the same command finishes with the best model that is left."""
    write = storage.write_folder

    def swap(uri, files, info):
        if uri.endswith("best/step-00000004"):
            weights = {k: -v for k, v in load(files["model.safetensors"]).items()}
            files = {**files, "model.safetensors": save(weights)}
        write(uri, files, info)

    monkeypatch.setattr(storage, "write_folder", swap)
    with pytest.raises(StorageError, match=r"do not score as its scores say: 4 images .* epoch 2"):
        run_in(tmp_path, few)
    monkeypatch.setattr(storage, "write_folder", write)
    with pytest.raises(StorageError, match="do not score as its scores say"):
        run_in(tmp_path, few)
    storage.delete_folder(str(tmp_path / "best" / "step-00000004"))
    result = run_in(tmp_path, few)
    assert result["best_epoch"] == 3 and result["metrics"]["best/val_top1"] == 25.0
    assert steps(str(tmp_path / "best")) == [result["best_step"]] == [6]


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 100, 3_669])
def test_the_sample_is_spread_over_all_rows(rows):
    taken = scoring.sample(np.arange(rows))
    assert min(rows, 17) <= len(taken) <= 32
    gaps = np.diff([*taken, rows])
    assert len(set(gaps[:-1])) <= 1 and all(gaps <= max(rows / 16, 1))


def test_every_kept_model_scores_its_sample_again(digits, tmp_path):
    """With averaged weights: the losses on disk are those of the file's weights, row by row."""
    run = override(recipe(), {"train.ema_decay": 0.5, "train.batch_size": 48})
    context = WorkerContext(run, digits, str(tmp_path))
    result = train(context)
    stored = checkpoint.verify_best(str(tmp_path), result["best_step"], result["best_epoch"])
    kept = json.loads(stored.files["sample.json"])
    assert kept["rows"] == list(range(0, 37, 2))
    model = loop.Training(context).state.model
    model.load_state_dict(load(stored.files["model.safetensors"]))
    model.eval()
    pixels = EvalTransform(run.eval_size, run.evaluate.crop)
    split = digits.split("val")
    for row, loss in zip(kept["rows"], kept["losses"], strict=True):
        image = torch.from_numpy(pixels(split.image(row)))[None]
        with torch.no_grad():
            logits = model(normalize(image, run.data.mean, run.data.std))
        label = torch.tensor([split.labels[row]])
        assert torch.nn.functional.cross_entropy(logits, label).item() == pytest.approx(loss, 1e-4)


def test_an_earlier_best_model_stays_until_a_checkpoint_names_the_new_one(tmp_path):
    writer = CheckpointWriter(str(tmp_path), keep_last=2, keep_best=1)
    for step in (1, 2):
        writer.save_best(step, {"w": torch.ones(2)}, {"epoch": step, "step": step})
        if step == 1:
            writer.save(1, {"step": 1})
    writer.wait()
    assert steps(str(tmp_path / "best")) == [2, 1]
    writer.save(2, {"step": 2})
    writer.wait()
    writer.close()
    assert steps(str(tmp_path / "best")) == [2]


def test_a_best_model_of_an_earlier_life_is_not_taken_for_the_present_one(
    few, tmp_path, monkeypatch
):
    """The run crashed after the best model of epoch 2 was written, goes on from epoch 1, and epoch
    2 comes out worse, as it may on other hardware. The best model is the one of epoch 1."""
    asked = []

    def notice():
        asked.append(0)
        return "stop" if len(asked) == 3 else ""

    with pytest.raises(InterruptedTrainingError):
        run_in(tmp_path / "run", few, notice=notice)
    assert checkpoint.latest(str(tmp_path / "run" / "checkpoints"))[0] == 3
    shutil.copytree(tmp_path / "run", tmp_path / "went on")
    run_in(tmp_path / "went on", few)
    late = "best/step-00000004"
    shutil.copytree(tmp_path / "went on" / late, tmp_path / "run" / late)
    for epoch in (2, 3):
        monkeypatch.setitem(SCORES, epoch, 10.0)
    result = run_in(tmp_path / "run", few)
    assert result["best_epoch"] == 1 and steps(str(tmp_path / "run" / "best")) == [2]
    check_law(tmp_path / "run", result)
