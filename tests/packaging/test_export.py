"""Exports against the model itself, in another runtime, for batches they were not made with."""

import json

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
