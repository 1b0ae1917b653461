"""Grad-CAM of a packaged model: where it looked for a class."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Explain = Callable[[np.ndarray, int], bytes]
"""(uint8[S, S, 3], class) -> PNG: the heat map laid over what the network sees."""


def explainer(meta: dict[str, Any], weights: str | Path) -> Explain | None:
    """None where the package's weights do not make a model that ftlib knows."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from ftlib.config import Run
    from ftlib.report.gradcam import grad_cam, overlay, target_layer
    from ftlib.settings import from_dict
    from ftlib.training import models
    from ftlib.training.evaluate import normalize

    try:
        run = from_dict(Run, meta["recipe"])
        model = models.build(run.model, len(meta["classes"]), image_size=run.augment.size).eval()
        model.load_state_dict(load_file(weights))
        layer = target_layer(model, torch.zeros(1, 3, meta["size"], meta["size"]))
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError):
        return None
    lock = threading.Lock()

    def explain(pixels: np.ndarray, index: int) -> bytes:
        with lock:  # hooks on the model's layers are not for two threads at once
            images = torch.from_numpy(np.array(pixels)[None])
            inputs = normalize(images, meta["mean"], meta["std"])
            cam = grad_cam(model, inputs, np.array([index]), layer)[0]
        buffer = io.BytesIO()
        Image.fromarray(overlay(np.asarray(pixels), cam, 224)).save(buffer, "PNG")
        return buffer.getvalue()

    return explain
