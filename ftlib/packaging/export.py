"""Exports a trained model for other programs as torch.export and ONNX; each file is checked."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ftlib import storage
from ftlib.config import Run
from ftlib.packaging.model_card import evaluation_size
from ftlib.packaging.package import Program, export, serialized

TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that is taken for rounding."""
FORMATS = ("torch", "onnx")
OPSET = 18


class ExportError(ValueError):
    """A model whose export does not compute the same; the message says which and by how much."""


def write(
    model: nn.Module,
    run: Run,
    classes: Sequence[str],
    temperature: float,
    out: Path,
    formats: Sequence[str] = FORMATS,
) -> dict[str, float]:
    """Write model.pt2, model.onnx and meta.json into `out`.

    Both programs compute uint8[b, S, S, 3] -> logits float32[b, C] for any b, normalization inside.

    Returns:
        format -> largest difference of a logit from the model's own, on random pixels in batches of
        1, 3 and 8.

    Raises:
        ExportError: for an unknown format, or an export that computes something else.
    """
    if unknown := set(formats) - set(FORMATS):
        raise ExportError(
            f"there is no format {sorted(unknown)[0]}. Choose among {', '.join(FORMATS)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    size, short = evaluation_size(run)
    program = export(model, run)
    eager = Program(model, run.data.mean, run.data.std)
    differences: dict[str, float] = {}
    if "torch" in formats:
        storage.write_file(str(out / "model.pt2"), serialized(program))
        loaded = torch.export.load(str(out / "model.pt2")).module()
        differences["torch"] = compare(
            eager,
            lambda x: loaded(torch.from_numpy(x)).detach().numpy(),
            size,
            out / "model.pt2",
        )
    if "onnx" in formats:
        import onnxruntime

        _write_onnx(eager, size, out / "model.onnx")
        session = onnxruntime.InferenceSession(
            str(out / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        differences["onnx"] = compare(
            eager, lambda x: session.run(None, {"images": x})[0], size, out / "model.onnx"
        )
    meta = {
        "classes": list(classes),
        "size": size,
        "short": short,
        "interpolation": run.evaluate.interpolation,
        "temperature": temperature,
        "input": "images: uint8[b, size, size, 3], red first, shorter side resized "
        "to `short` (antialiased), central crop",
        "output": "logits: float32[b, classes]; probabilities are softmax(logits / temperature)",
    }
    storage.write_file(str(out / "meta.json"), json.dumps(meta, indent=1).encode())
    return differences


def _write_onnx(eager: Program, size: int, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx and onnxscript warn about themselves
        made = torch.onnx.export(
            eager,
            (torch.zeros(2, size, size, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert made is not None
    import onnx

    buffer = io.BytesIO()
    onnx.save_model(made.model_proto, buffer)
    storage.write_file(str(path), buffer.getvalue())
    onnx.checker.check_model(str(path))


@torch.inference_mode()
def compare(
    eager: nn.Module, exported: Callable[[np.ndarray], np.ndarray], size: int, path: Path
) -> float:
    """The largest difference of a logit between the model and its export in the file `path`.

    Raises:
        ExportError: it is more than rounding; the file is removed.
    """
    rng = np.random.default_rng(0)
    worst = 0.0
    for batch in (1, 3, 8):
        x = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        own = eager(torch.from_numpy(x)).numpy()
        difference = float(np.abs(exported(x) - own).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(own).max())):
            path.unlink(missing_ok=True)
            raise ExportError(
                f"the export {path.name} differs from the model by {difference:.2g} in a logit; it "
                "was not kept. Try another torch version, or another format"
            )
        worst = max(worst, difference)
    return worst
