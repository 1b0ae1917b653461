"""What is refused before a run starts, beside what tests/launch/test_launch.py holds.

Also source_version.
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import cloudpickle

import ftlib
from ftlib.config import Model
from ftlib.data.shards import Dataset
from ftlib.launch import preflight
from ftlib.launch.errors import LaunchError
from ftlib.launch.source_version import source_version
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
        return "0.2.0", True, True

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
        preflight._ask_nodes(nodes, "/shared/probe", "")
    assert waits == [preflight.NODES_SECONDS]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (("0.1.0 (12345678)", True, True), r"^the node 10.0.0.2 runs ftlib 0.1.0 .* the driver"),
        ((source_version(), False, True), "^checkpoint.storage: the node 10.0.0.2 does not see"),
        ((source_version(), True, False), "^data.path: the node 10.0.0.2 does not see"),
    ],
)
def test_a_node_that_cannot_train_the_run_is_named(monkeypatch, tmp_path, answer, said):
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    nodes = [{"NodeID": node, "Alive": True} for node in ("here", "there")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(preflight, "_ask_nodes", lambda *_: {"10.0.0.2": answer})
    with pytest.raises(LaunchError, match=said):
        preflight.check_nodes(str(tmp_path), "/data")
    assert not list(tmp_path.iterdir())


def test_a_node_is_asked_with_code_of_this_process(tmp_path):
    """Its own ftlib may be another, in which the question does not exist."""
    sent = pickle.loads(cloudpickle.dumps(preflight._question()))
    assert sent.__code__ is not preflight._question().__code__
    assert sent(str(tmp_path), "/not/there") == (source_version(), True, False)


def test_a_version_names_the_sources(monkeypatch, tmp_path):
    """As `find` and sha256 of the files tell them apart."""
    copy = tmp_path / "ftlib"
    shutil.copytree(Path(ftlib.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from ftlib.launch.source_version import source_version as v; print(v())"

    def version():
        printed = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, text=True)
        return printed.strip()

    assert version() == source_version()
    (copy / "config.py").write_bytes((copy / "config.py").read_bytes() + b"# changed\n")
    assert version().startswith(f"{ftlib.__version__} (") and version() != source_version()
