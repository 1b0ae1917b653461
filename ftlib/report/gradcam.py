"""Where a model looks: Grad-CAM (Selvaraju et al. 2017) by the grad-cam library, for any
classifier.

All this module adds is the choice of the layer: the deepest one whose maps are still at least 4 x
4. The last block of a ResNet, which is the usual choice, has 7 x 7 of them at 224 px, but a single
one at 32 px, which shows nothing.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from ftlib.training import models

LEAST = 4
"""Least side of the maps, in cells."""
MAP_WEIGHT = 0.65
"""Of the map's color where it is highest, so that the picture stays visible below it."""


def target_layer(model: nn.Module, images: Tensor) -> nn.Module:
    """The layer whose activations Grad-CAM weighs, found by running `images` (float[b, 3, H, W])
    through the model."""
    seen: list[tuple[int, nn.Module]] = []

    def remember(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            _, channels, height, width = output.shape
            if height == width and not (channels == height != width) and height > 1:
                seen.append((height, module))

    hooks = [
        module.register_forward_hook(remember) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"{type(model).__name__} has no layer with maps at {images.shape[-1]} px: Grad-CAM has "
            "nothing to show. Evaluate it at a larger size"
        )
    side = min((s for s, _ in seen if s >= LEAST), default=max(s for s, _ in seen))
    return [module for s, module in seen if s == side][-1]


def grad_cam(
    model: nn.Module, images: Tensor, classes: np.ndarray, layer: nn.Module | None = None
) -> np.ndarray:
    """float32[b, H, W] in 0..1: how much each place speaks for the class (int[b]) of its image.
    images: normalised float[b, 3, H, W]."""
    tokens = models.token_layer(model) if layer is None else None
    if tokens is not None:
        layer = tokens.layer
    layer = layer or target_layer(model, images)
    trained = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)  # frozen layers would pass no gradient back to the maps
    try:
        with GradCAM(
            model=model,
            target_layers=[layer],
            reshape_transform=None if tokens is None else tokens.to_maps,
        ) as cam:
            maps = cam(
                input_tensor=images, targets=[ClassifierOutputTarget(int(c)) for c in classes]
            )
    finally:
        for parameter, wanted in zip(model.parameters(), trained):
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return np.nan_to_num(np.asarray(maps, np.float32))


def overlay(image: np.ndarray, cam: np.ndarray, side: int = 0) -> np.ndarray:
    """uint8[S, S, 3]: the picture (uint8[H, W, 3]) in gray, and the map over it: red, and yellow
    where it speaks most for the class. Where it says nothing, the gray picture is as it was.

    side: enlarges small pictures.
    """
    side = max(side, *image.shape[:2])
    enlarged = cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
    gray = cv2.cvtColor(enlarged, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    smooth = np.clip(cv2.resize(cam, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1)
    red, green, blue = np.full_like(smooth, 235), 40 + 190 * smooth**2, np.full_like(smooth, 30)
    weight = MAP_WEIGHT * smooth[..., None]
    blended = (1 - weight) * gray + weight * np.stack([red, green, blue], axis=-1)
    return np.rint(blended).astype(np.uint8)
