"""An output of one pixel by a matrix product is what torch's convolution gives, forwards and
backwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from ftlib import config
from ftlib.training import models, one_by_one_conv


@given(st.data())
def test_as_torch_convolves(data):
    draw = data.draw
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    padding, height, width = (
        draw(st.integers(0, kernel)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
    )
    if min(height, width) + 2 * padding < kernel:
        return
    torch.manual_seed(draw(st.integers(0, 100)))
    plain = nn.Conv2d(3, 4, kernel, stride, padding, bias=draw(st.booleans())).double()
    short = nn.Sequential(
        nn.Conv2d(3, 4, kernel, stride, padding, bias=plain.bias is not None)
    ).double()
    short[0].load_state_dict(plain.state_dict())
    one_by_one_conv.shorten(short)
    x = torch.randn(2, 3, height, width, dtype=torch.double)
    results = []
    for module in (plain, short):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad, *(p.grad for p in module.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_short_way_is_taken_where_one_pixel_comes_out(monkeypatch):
    calls = []
    monkeypatch.setattr(
        nn.Conv2d,
        "forward",
        lambda self, x: (
            calls.append(x.shape)
            or torch.nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        ),
    )
    conv = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    one_by_one_conv.shorten(conv)
    assert conv(torch.ones(1, 2, 1, 1)).shape == (1, 2, 1, 1) and not calls
    assert conv(torch.ones(1, 2, 2, 2)).shape == (1, 2, 2, 2) and len(calls) == 1


@pytest.mark.parametrize("size", [32, 64])
def test_a_resnet_is_torchvisions(size):
    ours = models.build(config.Model(arch="resnet18"), 10).eval()
    theirs = resnet18(num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert (
        sum(type(m) is one_by_one_conv.Conv2d for m in ours.modules()) == 17
    )  # all but the three 1x1 of the shortcuts
