"""What a GPU must show (`make gpu`). Without one, as much of it runs on the CPU as it can."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import worker
from test_workers import Workers

from ftlib.config import Run
from ftlib.launch.timing import run_steps
from ftlib.settings import override
from ftlib.training.loop import Training, WorkerContext

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
ROOT = Path(__file__).parents[2]


def mig_modes():
    """One line per GPU; empty where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = ["nvidia-smi", "--query-gpu=index,mig.mode.current", "--format=csv"]
    return subprocess.run(asked, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", autouse=True)
def mig_is_left_alone():
    before = mig_modes()
    yield
    assert mig_modes() == before


def trained(dataset, folder, **changes):
    """Two steps of 16 pictures; (mean loss, the training)."""
    small = {
        "model.arch": "resnet18",
        "model.dropout": 0.0,
        "train.microbatch_size": 16,
        "optimizer.lr": 1e-3,
    }
    asked = {key.replace("__", "."): value for key, value in changes.items()}
    run = override(Run(), {**worker.BASE, **small, **asked})
    training = Training(WorkerContext(run, dataset, str(folder), device=DEVICE))
    with contextlib.closing(training.batches()) as batches:
        run_steps(training, batches, 2)
    total, _, images = training.state.sums.tolist()
    return total / images, training


@pytest.fixture(scope="module")
def in_float32(digits, tmp_path_factory):
    return trained(digits, tmp_path_factory.mktemp("float32"))[0]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_cuda)])
def test_half_precision_gives_the_loss_of_float32(digits, tmp_path, in_float32, precision):
    loss, training = trained(digits, tmp_path, train__precision=precision)
    assert training.dtype != torch.float32
    assert loss == pytest.approx(in_float32, rel=0.03) and loss != in_float32


def test_channels_last_is_another_layout_of_the_same_numbers(digits, tmp_path, in_float32):
    loss, training = trained(digits, tmp_path, train__channels_last=False)
    assert loss == pytest.approx(in_float32, rel=5e-3)
    assert training.model.conv1.weight.is_contiguous()
    _, usual = trained(digits, tmp_path)
    assert usual.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("gcc")), reason="needs a C compiler")
def test_a_compiled_model_computes_the_same(digits, tmp_path, in_float32):
    loss, _ = trained(digits, tmp_path, train__compile=True)
    assert loss == pytest.approx(in_float32, rel=5e-3)


@needs_cuda
def test_a_microbatch_that_does_not_fit_is_split(digits, tmp_path):
    large = {"model__arch": "convnext_tiny", "augment__size": 160, "train__microbatch_size": 64}
    large |= {"train__batch_size": 64}
    whole, training = trained(digits, tmp_path, **large)
    assert training.splitter.parts == 1
    peak, memory = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    del training
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.8 * peak / memory)
    try:
        in_parts, training = trained(digits, tmp_path, **large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert training.splitter.parts > 1
    assert in_parts == pytest.approx(whole, rel=0.02)


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    """kill -9 after the checkpoint of step 7 has been followed by two steps more."""

    def over(workers):
        workers.processes[0].join(300)
        assert workers.processes[0].exitcode == 0
        last = workers.lines.read_text().splitlines()[-1]
        return json.loads(last.removeprefix("RESULT "))["digest"]

    whole = over(Workers(tmp_path / "whole", device=DEVICE.type))
    killed = Workers(tmp_path / "killed", device=DEVICE.type)
    killed.wait_for(step=9)
    killed.processes[0].kill()
    killed.processes[0].join()
    assert over(Workers(tmp_path / "killed", device=DEVICE.type)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", range(1, torch.cuda.device_count() + 1) if CUDA else [2])
def test_workers_train_over_nccl_on_all_gpus(tmp_path, workers):
    """gloo where there is no GPU."""
    out, settings = tmp_path / "out.json", {"size": 32, "batch": 2, "steps": 1, "rounds": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["-m", "ftlib.benchmark.two_workers", str(out), json.dumps(settings)]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", str(workers), *script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["backend"] == ("nccl" if CUDA else "gloo")
    assert len(found["costs"]["ftlib, two workers"]) == 1
