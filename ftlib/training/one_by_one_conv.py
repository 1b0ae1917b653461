"""Convolutions whose output is one pixel, as the matrix products that they are.

The last stage of a ResNet sees a map of 1x1 when pictures are 32 pixels wide. All but one tap of a
3x3 kernel then lie on padding, and oneDNN computes them nevertheless: more than half of a
ResNet-18's training step on a CPU. The result is the same sum over the same products; only its
order in float32, and so its last bits, differ. GPUs keep their own kernels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """nn.Conv2d with a shorter way to an output of one pixel on a CPU.

    Same parameters, same state dict.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float[b, C, H, W] -> float[b, D, H', W']."""
        assert not isinstance(self.padding, str)  # `shorten` leaves those alone
        height, width = x.shape[-2:]
        (down, right), (above, left) = self.stride, self.padding
        one = (
            x.device.type == "cpu"
            and height + 2 * above - self.kernel_size[0] < down
            and width + 2 * left - self.kernel_size[1] < right
        )
        if not one or above + height > self.kernel_size[0] or left + width > self.kernel_size[1]:
            return super().forward(x)
        taps = self.weight[:, :, above : above + height, left : left + width]
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def shorten(model: nn.Module) -> None:
    """Let every convolution of the model that can take the shorter way do so, in place."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size != (1, 1)
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        ):
            module.__class__ = Conv2d
