"""Grad-CAM against the library and the paper's formula; the layer for every kind of model."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision import models as tv

from ftlib.config import Model
from ftlib.report import gradcam
from ftlib.training import models


def images(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return tv.resnet18(num_classes=5).eval()


@pytest.mark.parametrize("name", ["layer4", "layer3", "layer2.0.conv1"])
def test_agrees_with_the_grad_cam_library(resnet, name):
    x, classes, layer = images(128), np.array([3, 1]), resnet.get_submodule(name)
    with GradCAM(model=resnet, target_layers=[layer]) as cam:
        theirs = cam(input_tensor=x, targets=[ClassifierOutputTarget(3), ClassifierOutputTarget(1)])
    ours = gradcam.grad_cam(resnet, x, classes, layer)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # theirs adds 1e-7 to the highest value


def test_agrees_with_the_grad_cam_library_on_tokens():
    torch.manual_seed(0)
    model = models.build(Model(arch="timm/vit_tiny_patch16_224"), 4, 96).eval()
    torch.nn.init.normal_(models.head(model).weight)
    tokens, x = models.token_layer(model), images(96)
    with GradCAM(model, [tokens.layer], reshape_transform=tokens.to_maps) as cam:
        theirs = cam(input_tensor=x, targets=[ClassifierOutputTarget(0), ClassifierOutputTarget(3)])
    ours = gradcam.grad_cam(model, x, np.array([0, 3]))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_layer_before_one_that_works_in_place_shows_its_own_maps():
    """VGG's convolutions are followed by ReLUs that overwrite them."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 3)).eval()
    x = images(16, 1)
    maps = model[0](x)
    score = model[1:](maps.clone())[0, 2]
    gradient = torch.autograd.grad(score, maps)[0]
    wanted = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(1).relu()[0].detach().numpy()
    ours = gradcam.grad_cam(model, x, np.array([2]), model[0])[0]
    assert np.corrcoef(cv2.resize(wanted, (16, 16)).ravel(), ours.ravel())[0, 1] > 0.9999


def test_agrees_with_the_papers_equations(resnet):
    """Selvaraju et al. 2017, eq. 1 and 2: relu of the maps weighed by the mean gradient, here
    before the library's scaling to 0..1."""
    x = images(128, 1)
    kept = {}
    hook = resnet.layer4.register_forward_hook(lambda m, i, o: kept.update(maps=o))
    score = resnet(x)[0, 2]
    hook.remove()
    gradient = torch.autograd.grad(score, kept["maps"])[0]
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * kept["maps"]).sum(1).relu()[0].detach().numpy()
    ours = gradcam.grad_cam(resnet, x, np.array([2]))[0]
    cells = ours.reshape(4, 32, 4, 32).mean(axis=(1, 3))
    assert np.corrcoef(cells.ravel(), cam.ravel())[0, 1] > 0.95
    assert ours.min() >= 0 and ours.max() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "layer"), [(224, "layer4"), (128, "layer4"), (64, "layer3"), (32, "layer2")]
)
def test_takes_the_deepest_layer_that_still_shows_places(resnet, size, layer):
    assert gradcam.target_layer(resnet, images(size, 1)) is getattr(resnet, layer)


@pytest.mark.parametrize(
    ("arch", "size"),
    [("convnext_tiny", 64), ("swin_t", 128), ("vit_b_32", 128), ("mobilenet_v3_small", 128)],
)
def test_works_for_other_families(arch, size):
    torch.manual_seed(0)
    extra = {"image_size": size} if arch.startswith("vit") else {}
    model = tv.get_model(arch, weights=None, num_classes=4, **extra).eval()
    if extra:
        torch.nn.init.normal_(
            model.heads.head.weight
        )  # torchvision starts it at zero, where nothing speaks for anything
    found = gradcam.grad_cam(model, images(size), np.array([0, 3]))
    assert (
        found.shape == (2, size, size)
        and np.isfinite(found).all()
        and found.min() >= 0
        and found.max() <= 1 + 1e-6
    )
    assert found.std() > 0


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("timm/convnext_atto", 64),
        ("timm/vit_tiny_patch16_224", 96),
        ("timm/swin_tiny_patch4_window7_224", 112),
        ("timm/resnet10t", 64),
    ],
)
def test_works_for_timms_families(arch, size):
    torch.manual_seed(0)
    model = models.build(Model(arch=arch), 4, size).eval()
    torch.nn.init.normal_(models.head(model).weight)
    found = gradcam.grad_cam(model, images(size), np.array([0, 3]))
    assert found.shape == (2, size, size) and np.isfinite(found).all()
    assert found.min() >= 0 and found.max() <= 1 + 1e-6 and found.std() > 0


def test_a_frozen_model_is_left_as_it_was(resnet):
    resnet.requires_grad_(False).zero_grad()
    resnet.fc.requires_grad_(True)
    try:
        assert gradcam.grad_cam(resnet, images(64), np.array([0, 1])).max() > 0
        assert [n for n, p in resnet.named_parameters() if p.requires_grad] == [
            "fc.weight",
            "fc.bias",
        ]
        assert all(p.grad is None for p in resnet.parameters()) and not resnet._forward_hooks
        assert not any(m._forward_hooks for m in resnet.modules())
    finally:
        resnet.requires_grad_(True)


def test_a_model_without_maps_is_refused():
    with pytest.raises(ValueError, match="nothing to show"):
        gradcam.target_layer(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 2)), images(8, 1)
        )


def test_the_overlay_is_red_where_the_map_is_high_and_the_gray_picture_elsewhere():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    cam = np.zeros((32, 32), np.float32)
    cam[:12] = 1
    shown = gradcam.overlay(image, cam, 128).astype(int)
    assert shown.shape == (128, 128, 3)
    assert (shown[:40, :, 0] > shown[:40, :, 2] + 60).all()
    large = Image.fromarray(image).convert("L").resize((128, 128), Image.Resampling.NEAREST)
    gray = np.asarray(large)
    assert np.abs(shown[60:] - gray[60:, :, None]).max() <= 1
    assert np.corrcoef(shown[:40, :, 0].ravel(), gray[:40].ravel())[0, 1] > 0.9
