import errno
import json
import logging
import os

import pytest
import torch

from ftlib import storage
from ftlib.storage import StorageError, join
from ftlib.training import checkpoint
from ftlib.training.checkpoint import CheckpointWriter, latest, snapshot, steps


def state(step):
    return {
        "step": step,
        "model": {"w": torch.full((3, 3), float(step))},
        "history": [{"epoch": 1.0}],
        "list": [torch.tensor(step), None, "x"],
    }


def written(tmp_path, *numbers, **keep):
    writer = CheckpointWriter(str(tmp_path), keep.get("keep_last", 9), keep.get("keep_best", 1))
    for n in numbers:
        writer.save(n, state(n))
    writer.wait()
    writer.close()
    return str(tmp_path / "checkpoints")


def test_the_newest_by_step_is_found_whatever_the_clocks_say(tmp_path):
    uri = written(tmp_path, 1, 20, 3)
    os.utime(tmp_path / "checkpoints" / "step-00000020", (0, 0))
    step, found = latest(uri)
    assert (
        step == 20
        and torch.equal(found["model"]["w"], torch.full((3, 3), 20.0))
        and found["list"][1:] == [None, "x"]
    )


@pytest.mark.parametrize("harm", ["truncate", "flip", "zero tail", "no manifest", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, harm, caplog):
    uri = written(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "zero tail":
        path.write_bytes(bytes(data[:-100]) + bytes(100))
    elif harm == "no manifest":
        (path.parent / "manifest.json").unlink()
    else:
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert latest(uri)[0] == 1
    assert "step-00000002" in caplog.text and "going back" in caplog.text


def test_a_hostile_checkpoint_runs_nothing(tmp_path, caplog):
    """A pickle that would run code, with a manifest that fits it, is refused by the loader."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    import io

    buffer = io.BytesIO()
    torch.save({"step": Evil()}, buffer)
    storage.write_folder(
        str(tmp_path / "checkpoints" / "step-00000009"),
        {"state.pt": buffer.getvalue()},
        {"step": 9},
    )
    assert latest(str(tmp_path / "checkpoints")) is None
    assert not canary.exists()


def test_old_ones_go_and_the_best_stay(tmp_path):
    writer = CheckpointWriter(str(tmp_path), keep_last=2, keep_best=1)
    for n in (1, 2, 3, 4):
        if n in (1, 3):
            writer.save_best(n, {"w": torch.full((2,), float(n))}, {"epoch": n})
        writer.save(n, state(n))
    writer.wait()
    writer.close()
    assert steps(join(str(tmp_path), "checkpoints")) == [4, 3] and steps(
        join(str(tmp_path), "best")
    ) == [3]


def test_a_snapshot_does_not_follow_training():
    w = torch.zeros(2)
    copy = snapshot({"w": w, "l": [w]})
    w += 1
    assert copy["w"].tolist() == [0, 0] and copy["l"][0].tolist() == [0, 0]


def test_what_a_crash_left_behind_is_cleared(tmp_path):
    (tmp_path / "checkpoints" / ".tmp-step-1-x").mkdir(parents=True)
    written(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_full_disk_is_survived_for_a_while_then_said_clearly(tmp_path, monkeypatch):
    writer = CheckpointWriter(str(tmp_path), 9, 1)
    writer.save(1, state(1))
    writer.wait()

    def full(path, data):
        raise OSError(errno.ENOSPC, "x")

    real = storage._write_durably
    monkeypatch.setattr(storage, "_write_durably", full)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda s: None)
    writer.save(2, state(2))
    with pytest.raises(StorageError, match="disk is full"):
        writer.wait()
    monkeypatch.setattr(
        storage, "_write_durably", real
    )  # space again: training was never stopped, and the next one is fine
    writer.save(3, state(3))
    writer.wait()
    assert steps(str(tmp_path / "checkpoints")) == [3, 1]
    monkeypatch.setattr(storage, "_write_durably", full)
    with pytest.raises(StorageError, match="3 checkpoints in a row"):
        for n in range(4, 12):
            writer.save(n, state(n))
            while any(not f.done() for f in writer._pending):
                pass
    writer.close()
    assert latest(str(tmp_path / "checkpoints"))[0] == 3


class LostError(RuntimeError):
    """Stands for the error of a launch that lost its run."""


def test_a_writer_whose_run_was_taken_over_writes_and_deletes_nothing(tmp_path):
    """The fence is asked before each write, and again before old checkpoints are deleted."""
    lost = []

    def fence():
        if lost:
            raise LostError("taken over")

    writer = CheckpointWriter(str(tmp_path), 2, 1, fence=fence, owner="me")
    for step in (1, 2):
        writer.save(step, state(step))
    writer.wait()
    manifest = json.loads(
        (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").read_text()
    )
    assert manifest["owner"] == "me"
    real = storage.write_folder

    def lose_while_writing(*given):
        real(*given)
        lost.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_folder", lose_while_writing)
        writer.save(3, state(3))
        with pytest.raises(LostError):
            writer.wait()
    assert steps(str(tmp_path / "checkpoints")) == [3, 2, 1], "nothing was deleted"
    writer.save_best(4, {"w": torch.zeros(2)}, {})
    with pytest.raises(LostError):
        writer.wait()
    assert steps(str(tmp_path / "best")) == []
    writer.close()
