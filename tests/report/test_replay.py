"""A step done again is the step that was: against what the run itself logged."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from conftest import MemoryDataset
from worker import BASE

from ftlib.config import Run
from ftlib.report.replay import replay, sheet
from ftlib.settings import override
from ftlib.training import checkpoint
from ftlib.training.loop import WorkerContext, train

RUN = override(Run(), {**BASE, "checkpoint.every_steps": 3, "checkpoint.keep_last": 9})


class Recorder:
    def __init__(self):
        self.loss = {}

    def metrics(self, values, step, timestamp_ms=None):
        if "step/loss" in values:
            self.loss[step] = values["step/loss"]

    def image(self, image, key, step): ...


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    run_dir, recorder, data = tmp_path_factory.mktemp("run"), Recorder(), MemoryDataset(100, 37)
    train(WorkerContext(RUN, data, str(run_dir), tracking=recorder))
    return run_dir, recorder.loss, data


@pytest.mark.parametrize("step", [0, 4, 6, 7, 13])
def test_loss_and_images_of_any_step_come_back(trained, step):
    run_dir, logged, data = trained
    before = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    found = replay(RUN, data, str(run_dir), step, None)
    assert found.loss == pytest.approx(logged[step + 1], abs=2e-6)
    assert found.start == max(
        (s for s in checkpoint.steps(str(run_dir / "checkpoints")) if s <= step), default=None
    )
    assert [len(found.losses[k]) for k in found.losses] == [len(found.rows[k]) for k in found.rows]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == before


def test_the_steps_of_an_epoch_show_every_image_once(trained):
    run_dir, _, data = trained
    seen = [
        row
        for step in range(7, 14)
        for rows in replay(RUN, data, str(run_dir), step, None, with_loss=False).rows.values()
        for row in rows
    ]
    assert sorted(seen) == list(range(100))


def test_the_sheet_is_a_picture_with_a_tile_per_image(trained, tmp_path):
    from PIL import Image

    run_dir, _, data = trained
    found = replay(RUN, data, str(run_dir), 8, None)
    picture = np.asarray(Image.open(sheet(RUN, data, found, tmp_path / "x.png")))
    assert picture.shape[0] > 4 * 100 and picture.std() > 20


def test_a_step_that_is_not_there_is_refused(trained):
    with pytest.raises(ValueError, match="steps 0 to 13"):
        replay(RUN, trained[2], str(trained[0]), 14, None)
