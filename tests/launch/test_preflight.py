"""What is refused before a run starts, beside what tests/launch/test_launch.py holds."""

import pytest

from ftlib.config import Model
from ftlib.data.shards import Dataset
from ftlib.launch import preflight
from ftlib.paths import data_path
from ftlib.settings import ConfigError, override


def test_single_images_before_a_batchnorm_over_one_pixel_are_refused(tiny):
    dataset = Dataset.open(data_path(tiny.data.path))
    run = override(tiny, {"train.microbatch_size": 1, "model": Model(arch="resnet18")})
    with pytest.raises(ConfigError, match=r"microbatch_size = 1: BatchNorm in resnet18 .* 16 px"):
        preflight.plan(run, dataset)
    preflight.plan(override(run, {"augment.size": 64}), dataset)
    preflight.plan(override(run, {"train.microbatch_size": 2}), dataset)
    preflight.plan(override(run, {"model.arch": "vit_b_16"}), dataset)
