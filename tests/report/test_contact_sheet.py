import importlib.util
import io
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from ftlib import config
from ftlib.data import ops
from ftlib.data.augment import TrainTransform
from ftlib.data.rng import MIX, key
from ftlib.data.sampler import step_plan
from ftlib.data.shards import DataError
from ftlib.report.contact_sheet import (
    contact_sheet,
    epochs_section,
    mixing_section,
    network_section,
    ops_section,
    pipeline_section,
    training_rows,
)
from ftlib.training import losses, mixing

RUN = config.Run(
    stage="phase2",
    seed=3,
    augment=config.Augment(size=32, randaugment_n=2, randaugment_m=9, randaugment_p=0.5),
    mix=config.Mix(mixup_alpha=0.4, cutmix_alpha=1.0),
    train=config.Train(epochs=4, batch_size=16, microbatch_size=8),
)


class Memory:
    """The part of a data set that a sheet reads: 24 pictures of 3 classes cut out of a
    photograph."""

    name, classes = "photo", ("sky", "roof", "a class with a very long name, longer than its tile")

    def __init__(self):
        photo = load_sample_image("china.jpg")
        self.labels = np.arange(24) % 3
        self.jpegs = []
        for i in range(24):
            out = io.BytesIO()
            Image.fromarray(photo[10 * i : 10 * i + 90, 20 * i : 20 * i + 120]).save(out, "JPEG")
            self.jpegs.append(out.getvalue())

    def split(self, name):
        return self

    def __len__(self):
        return 24

    def labels_of(self, rows):
        return self.labels[rows]

    def image(self, row):
        return self.jpegs[row]

    def path(self, row):
        return f"train/{row}.jpg"


@pytest.fixture(scope="module")
def dataset():
    return Memory()


def test_the_network_section_is_what_training_makes(dataset):
    """Rebuilt here from its parts: plan, transform, mixing."""
    section = network_section(dataset, RUN, step=3)
    plan = step_plan(RUN.seed, 3, training_rows(dataset, RUN), 16, 8)
    assert len(section.rows) == len(plan)
    transform = TrainTransform(RUN.augment, RUN.seed)
    for row, mb in zip(section.rows, plan):
        images = torch.from_numpy(
            np.stack([transform(dataset.image(r), mb.epoch, int(r)) for r in mb.rows])
        ).permute(0, 3, 1, 2)
        targets = losses.soft_targets(torch.from_numpy(dataset.labels[mb.rows]), 3, 0.1)
        mixed, mixed_targets = mixing.apply(
            mixing.draw(RUN.mix, key(MIX, RUN.seed, 3, mb.index), len(mb.rows), 32, 32),
            images,
            targets,
        )
        for i, tile in enumerate(row.tiles):
            assert np.array_equal(tile.image, mixed[i].permute(1, 2, 0).numpy())
            shown = dict(reversed(line.split(" ", 1)) for line in tile.caption.split("\n"))
            assert shown and all(
                abs(float(v) - mixed_targets[i, dataset.classes.index(c)]) < 0.006
                for c, v in shown.items()
            )
            assert sum(map(float, shown.values())) > 0.9


def test_mixing_that_is_off_for_the_last_epochs_is_off_in_the_picture(dataset):
    run = config.Run(
        seed=3, augment=RUN.augment, mix=config.Mix(mixup_alpha=0.4, off_epochs=4), train=RUN.train
    )
    assert [row.note for row in network_section(dataset, run, 0).rows] == ["not mixed", "not mixed"]


def test_mixing_rows_say_when_the_recipe_has_it_off(dataset):
    on, off = (
        mixing_section(dataset, RUN),
        mixing_section(dataset, config.Run(augment=config.Augment(size=32))),
    )
    assert [r.title for r in on.rows] == ["Mixup", "CutMix"] and all(
        "off" not in r.note for r in on.rows
    )
    assert all("off in this recipe" in r.note for r in off.rows)
    assert "α 0.4" in on.rows[0].note
    assert any("\n" in tile.caption for tile in on.rows[1].tiles)  # two classes on a mixed picture


def test_a_row_per_op_and_a_column_per_strength(dataset):
    section = ops_section(dataset, RUN)
    assert [row.title for row in section.rows] == [op.name for op in ops.OPS]
    for row in section.rows:
        assert [t.caption for t in row.tiles] == [str(s) for s in range(11)]
        assert np.array_equal(row.tiles[0].image, section.rows[0].tiles[0].image)  # strength 0
        assert not np.array_equal(row.tiles[10].image, row.tiles[0].image)
        assert [t.marked for t in row.tiles] == [s == 9 for s in range(11)]


def test_ops_outside_the_recipe_are_named_as_such(dataset):
    run = config.Run(
        augment=config.Augment(
            size=32, randaugment_n=1, randaugment_m=4, randaugment_ops=("rotate", "blur")
        )
    )
    rows = ops_section(dataset, run).rows
    inside = {row.title for row in rows if "not in this recipe" not in row.note}
    assert (
        inside
        == {"rotate", "blur"}
        == {row.title for row in rows if any(t.marked for t in row.tiles)}
    )


def test_a_pipeline_of_the_users_own_is_shown_by_itself(dataset, tmp_path):
    A.save(A.Compose([A.RandomFog(p=1), A.CLAHE(p=1)]), str(tmp_path / "p.json"))
    cfg = config.Augment(size=32, pipeline=str(tmp_path / "p.json"), vflip=0.5, rotate90=0.5)
    section = pipeline_section(dataset, config.Run(augment=cfg))
    assert section.note == "RandomFog → CLAHE"
    for row in section.rows:
        assert len({tile.image.tobytes() for tile in row.tiles}) == len(row.tiles) == 11
    note = epochs_section(dataset, config.Run(augment=cfg)).note
    assert "vertical flip 0.5, quarter turns 0.5" in note and "your own pipeline" in note


def test_epochs_differ(dataset):
    for row in epochs_section(dataset, RUN).rows:
        assert len({t.image.tobytes() for t in row.tiles}) == 11


def test_the_sheet_is_a_picture(dataset, tmp_path):
    path = contact_sheet(dataset, RUN, tmp_path / "new" / "sheet.png")
    with Image.open(path) as sheet:
        sheet.load()
        assert sheet.width > 1500 and sheet.height > 4000
        pixels = np.asarray(sheet.convert("RGB"))
    assert (pixels[:, :5] == 255).mean() > 0.999  # an empty margin
    assert pixels.std() > 20


def test_tuning_images_are_not_shown(dataset):
    run = config.Run(data=config.Data(tuning_fraction=0.25), augment=config.Augment(size=32))
    rows = training_rows(dataset, run)
    assert len(rows) == 18 and len(training_rows(dataset, RUN)) == 24


def test_the_job_explains_mistakes(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(
        "preview", Path(__file__).parents[2] / "jobs" / "preview.py"
    )
    preview = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preview)
    for arguments, part in (
        (["phase9"], "unknown recipe phase9. Did you mean"),
        (["phase2", "--augment.randaugment-k", "3"], "randaugment"),
        (["phase2", "--step", "-1"], "must be at least 0"),
    ):
        with pytest.raises(SystemExit) as end:
            preview.main(arguments)
        assert end.value.code == 2 and part in capsys.readouterr().err
    with pytest.raises(DataError, match="none"):
        preview.main(["phase2", "--data.path", str(tmp_path / "none")])
