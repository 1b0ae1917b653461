"""Exports against the model itself, in another runtime, for batches they were not made with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftlib.config import Augment, Model, Run
from ftlib.packaging import export
from ftlib.training import models
from ftlib.training.evaluate import normalize

RUN = Run(model=Model(arch="resnet18"), augment=Augment(size=32))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.build(RUN.model, 6).eval()


def eager(model, x):
    with torch.inference_mode():
        return model(normalize(torch.from_numpy(x), RUN.data.mean, RUN.data.std)).numpy()


def test_torch_export_computes_what_the_model_computes(model, tmp_path):
    assert export.write(model, RUN, "abcdef", 1.3, tmp_path, ["torch"])["torch"] < 1e-4
    x = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    got = (
        torch.export.load(str(tmp_path / "model.pt2"))
        .module()(torch.from_numpy(x))
        .detach()
        .numpy()
    )
    np.testing.assert_allclose(got, eager(model, x), atol=1e-4)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["classes"] == list("abcdef") and meta["temperature"] == 1.3 and meta["size"] == 32


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from ftlib.config import Augment, Model, Run
from ftlib.packaging import export
from ftlib.packaging.package import package
from ftlib.storage import StorageError
from ftlib.training import models

run = Run(model=Model(arch="resnet18"), augment=Augment(size=32))
model = models.build(run.model, 6).eval()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
out = Path(sys.argv[1])
for write in (
    lambda: export.write(model, run, "abcdef", 1.0, out / "export", ["torch"]),
    lambda: package(model, run, "abcdef", scores={}, temperature=1.0, out=out / "package"),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(tmp_path):
    """In a process of its own: torch's own writer would end it."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert "export/model.pt2: the file would be larger than is allowed here" in first
    assert "/package: the file would be larger than is allowed here" in second
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not (tmp_path / "package").exists()


@pytest.mark.slow
def test_onnx_computes_what_the_model_computes(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.write(model, RUN, "abcdef", 1.0, tmp_path, ["onnx"])["onnx"] < 1e-3
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for n in (1, 7):
        x = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.testing.assert_allclose(session.run(None, {"images": x})[0], eager(model, x), atol=1e-3)


def test_an_export_that_computes_something_else_is_not_kept(model, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"x")
    with pytest.raises(export.ExportError, match="differs from the model by"):
        export.compare(
            export.Program(model, RUN.data.mean, RUN.data.std),
            lambda x: np.zeros((len(x), 6), np.float32),
            32,
            path,
        )
    assert not path.exists()


def test_an_unknown_format_is_refused(model, tmp_path):
    with pytest.raises(export.ExportError, match="no format tflite"):
        export.write(model, RUN, "abcdef", 1.0, tmp_path, ["tflite"])
