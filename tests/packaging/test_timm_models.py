"""Packages and exports of timm's models: `package` and `export` for a CNN, a ViT and a ConvNeXt."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ftlib.config import Augment, Data, Evaluate, Model, Run
from ftlib.packaging import export, package
from ftlib.training import models
from ftlib.training.evaluate import normalize

ARCHITECTURES = ["timm/resnet10t", "timm/vit_tiny_patch16_224", "timm/convnext_atto"]
HALF = (0.5, 0.5, 0.5)
READ = """
import sys, io
sys.modules["timm"] = sys.modules["torchvision"] = sys.modules["ftlib"] = None
import mlflow, numpy as np
from PIL import Image
model = mlflow.pyfunc.load_model(sys.argv[1])
picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
data = io.BytesIO()
Image.fromarray(picture).save(data, "PNG")
print(model.predict([data.getvalue()])[0]["class"])
"""


def made(arch):
    torch.manual_seed(0)
    run = Run(
        model=Model(arch=arch, dropout=0.1, drop_path=0.1),
        augment=Augment(size=32),
        data=Data(mean=HALF, std=HALF),
        evaluate=Evaluate(interpolation="bicubic"),
    )
    return models.build(run.model, 4, 32).eval(), run


@pytest.mark.parametrize(
    "arch",
    [ARCHITECTURES[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[1:])],
)
def test_torch_export_computes_what_the_model_computes(arch, tmp_path):
    model, run = made(arch)
    assert export.write(model, run, "abcd", 1.0, tmp_path, ["torch"])["torch"] < 1e-4
    x = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    program = torch.export.load(str(tmp_path / "model.pt2")).module()
    with torch.inference_mode():
        expected = model(normalize(torch.from_numpy(x), HALF, HALF))
    torch.testing.assert_close(program(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnx_computes_what_the_model_computes(arch, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, run = made(arch)
    assert export.write(model, run, "abcd", 1.0, tmp_path, ["onnx"])["onnx"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_package_answers_where_there_is_neither_timm_nor_ftlib(arch, tmp_path):
    model, run = made(arch)
    folder = package.package(model, run, tuple("abcd"), {}, 1.0, tmp_path / "model")
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] in "abcd"
