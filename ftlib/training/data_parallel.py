"""Data parallelism over microbatches: gradients, BatchNorm statistics and the step's sums in
one flat buffer.

The global batch is m microbatches; worker r of W handles microbatches k with k mod W = r, adding
each one's gradient into the same buffer, and one all-reduce per step (in buckets, started while the
last backward pass still runs) gives everybody the sum. A step is thus defined by its microbatches
alone. What the number of workers changes is the order of a floating-point sum, and with
`strict=True` not even that: every microbatch's own gradient is gathered and added in the order of
k.

BatchNorm's running statistics move once per step, by the mean over the step's microbatches of the
move each of them would make.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 * 2**20 // 4
"""Elements per all-reduce (25 MiB of float32), as in torch's DDP."""

STEP_SUMS = ("loss", "correct", "images", "checkpoint", "stop")
"""Summed with every step: loss and correct predictions over its images, images, and the two
requests any worker may raise."""


class GradientBuffer:
    """Owns the gradients of `model`'s trainable parameters, as views of one float32 buffer, for
    one training step at a time.

    Use per step: `zero()`; for each own microbatch k `before_forward(k, last)`, forward and
    backward of its summed loss divided by the images in the step, `after_backward(k)`; then
    `all_reduce(count)` once on every worker, also on one that had no microbatch, and
    `commit_batchnorm`.
    """

    def __init__(
        self, model: nn.Module, rank: int = 0, world: int = 1, strict: bool = False
    ) -> None:
        self.rank, self.world, self.strict = rank, world, strict and world > 1
        # Last parameters first: backward reaches them first, so their buckets can leave first.
        self.parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        stats = [
            (m, name)
            for m in model.modules()
            for name, b in m.named_buffers(recurse=False)
            if b.is_floating_point()
        ]
        device = next(model.parameters()).device
        n_grad = sum(p.numel() for p in self.parameters)
        n_stat = sum(getattr(m, n).numel() for m, n in stats)
        self.flat = torch.zeros(n_grad + n_stat + len(STEP_SUMS), device=device)
        self.grads, self.stat_moves, self.step_sums = (
            self.flat[:n_grad],
            self.flat[n_grad : n_grad + n_stat],
            self.flat[n_grad + n_stat :],
        )
        self._bind_gradients()
        # The model's floating-point buffers become views of `stats`, so that they are reset and
        # read with one copy each.
        self.stats = torch.empty(n_stat, device=device)
        start = 0
        for module, name in stats:
            old = getattr(module, name)
            view = self.stats[start : start + old.numel()].view(old.shape)
            view.copy_(old)
            module._buffers[name] = view
            start += old.numel()
        self.base = self.stats.clone()
        self._kept: dict[int, Tensor] = {}
        self._works: list[dist.Work] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._buckets = self._plan_buckets() if world > 1 and not strict else []

    def _bind_gradients(self) -> None:
        start = 0
        for p in self.parameters:
            # The gradient takes the parameter's own memory order (channels_last too), so that
            # accumulating needs no conversion.
            p.grad = self.flat[start : start + p.numel()].as_strided(p.shape, p.stride(), start)
            start += p.numel()

    def _plan_buckets(self) -> list[tuple[Tensor, list[int]]]:
        """[(slice of the buffer, its parameters' indices)], and a hook on each parameter that
        counts its bucket down."""
        buckets: list[tuple[Tensor, list[int]]] = []
        start, size, members = 0, 0, []
        for i, p in enumerate(self.parameters):
            members.append(i)
            size += p.numel()
            if size >= BUCKET or i == len(self.parameters) - 1:
                buckets.append((self.flat[start : start + size], members))
                start, size, members = start + size, 0, []
        self._armed, self._waiting, self._next = False, [0] * len(buckets), 0
        for b, (_, members) in enumerate(buckets):
            for i in members:
                self._hooks.append(
                    self.parameters[i].register_post_accumulate_grad_hook(
                        lambda _, b=b: self._ready(b)
                    )
                )
        return buckets

    def _ready(self, bucket: int) -> None:
        if not self._armed:
            return
        self._waiting[bucket] -= 1
        # Always in the order of the list: all workers must start the same collectives in the same
        # order.
        while self._next < len(self._buckets) and self._waiting[self._next] == 0:
            self._works.append(dist.all_reduce(self._buckets[self._next][0], async_op=True))
            self._next += 1

    def release(self) -> None:
        """Let go of the model, so that another buffer can take it (when its trainable parameters
        change)."""
        for hook in self._hooks:
            hook.remove()
        for p in self.parameters:
            p.grad = None

    def zero(self) -> None:
        """Start a step: everything to zero."""
        self.flat.zero_()
        self._kept.clear()
        if self._buckets:
            self._armed, self._next, self._waiting = (
                False,
                0,
                [len(members) for _, members in self._buckets],
            )

    def before_forward(self, k: int, last: bool) -> None:
        """Before the forward pass of microbatch k; `last` says that it is this worker's last in
        the step."""
        self.stats.copy_(self.base)
        if self._buckets and last:
            self._armed = True

    def after_backward(self, k: int) -> None:
        """After its backward pass."""
        self.stat_moves.add_(self.stats - self.base)
        if self.strict:
            self._kept[k] = self.flat.clone()
            self.flat.zero_()

    def all_reduce(self, microbatches: int) -> None:
        """Sum over all workers.

        `microbatches` is the number in the whole step, over all workers.
        """
        if self.strict:
            self._reduce_in_order(microbatches)
        elif self.world > 1:
            for chunk, _ in self._buckets[self._next :]:
                self._works.append(dist.all_reduce(chunk, async_op=True))
            self._works.append(dist.all_reduce(self.flat[self.grads.numel() :], async_op=True))
            for work in self._works:
                work.wait()
            self._works.clear()
        self.stat_moves.div_(microbatches)

    def _reduce_in_order(self, microbatches: int) -> None:
        rounds = -(-microbatches // self.world)
        requests = self.flat[-2:].clone()  # raised outside any microbatch
        gathered: dict[int, Tensor] = {}
        for j in range(rounds):
            k = j * self.world + self.rank
            mine = self._kept.get(k)
            parts = [torch.empty_like(self.flat) for _ in range(self.world)]
            dist.all_gather(parts, mine if mine is not None else torch.zeros_like(self.flat))
            gathered.update({j * self.world + r: part for r, part in enumerate(parts)})
        self.flat.zero_()
        for k in range(microbatches):
            self.flat.add_(gathered[k])
        dist.all_reduce(requests)
        self.flat[-2:] += requests

    def commit_batchnorm(self, finite: Tensor) -> None:
        """Let BatchNorm's statistics move, unless the step was not finite.

        `finite`: bool scalar on the device.
        """
        self.base.copy_(torch.where(finite, self.base + self.stat_moves, self.base))
        self.stats.copy_(self.base)
