"""What is refused before a run starts, beside what tests/launch/test_launch.py holds."""

from types import SimpleNamespace

import pytest
import ray

from ftlib.config import Model
from ftlib.data.shards import Dataset
from ftlib.launch import preflight
from ftlib.launch.errors import LaunchError
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


def test_nodes_that_do_not_answer_are_named_after_one_wait_for_all(monkeypatch):
    """Three of four: two say nothing, the third is lost."""

    def answer(ref):
        if ref == "ref-10.0.0.3":
            raise ray.exceptions.RayTaskError("f", "lost", RuntimeError())
        return True, True

    def options(*, num_cpus, scheduling_strategy):
        del num_cpus
        number = int(scheduling_strategy.node_id, 16)
        return SimpleNamespace(remote=lambda probe, data: f"ref-10.0.0.{number}")

    waits = []

    def wait(refs, *, num_returns, timeout):
        waits.append(timeout)
        assert num_returns == len(refs) == 4
        return refs[1:3], [refs[0], refs[3]]

    monkeypatch.setattr(ray, "remote", lambda function: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", answer)
    nodes = [{"NodeID": f"{i:056x}", "NodeManagerAddress": f"10.0.0.{i}"} for i in range(1, 5)]
    with pytest.raises(LaunchError, match=r"^3 of 4 .* 60 s: 10.0.0.1, 10.0.0.3, 10.0.0.4\. "):
        preflight._ask_nodes(nodes, "/shared/probe", None)
    assert waits == [preflight.NODES_SECONDS]
