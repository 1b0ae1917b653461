"""Smaller forward passes after running out of device memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ftlib.training import models

log = logging.getLogger("ftlib.training")


class MicrobatchSplitter:
    """How many parts a microbatch goes through the network in.

    One part to begin with; twice as many each time the device runs out of memory. That is allowed
    only before the first step has succeeded (later the memory is lost to something else), and only
    for models that compute each image by itself, so that splitting changes nothing but speed.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        self._model, self._image_size = model, image_size
        self.parts = 1
        self.settled = False
        """A whole step has run without running out of memory."""

    def split(self, images: int) -> bool:
        """Double the number of parts for microbatches of `images`; False where that cannot be done.

        Call it outside the `except` block's forward pass: it frees the device's cached memory.
        """
        if self.settled or 2 * self.parts > images:
            return False
        if not models.is_batch_independent(self._model):
            return False
        self.parts *= 2
        log.warning(
            "out of memory with %d images of %d px at once: each microbatch now goes through the "
            "network in %d parts, which changes nothing but speed",
            -(-images * 2 // self.parts),
            self._image_size,
            self.parts,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors' parts along their first dimension, side by side."""
        return zip(*(tensor.chunk(self.parts) for tensor in tensors), strict=True)
