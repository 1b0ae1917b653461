"""Optimizers: parameter groups, fused kernels, and a step that skips itself when the gradients
are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import assert_never

from ftlib import config

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters are not decayed: batch, instance, layer, group and RMS norm, and their
subclasses."""
FUSED_DEVICES = ("cuda", "cpu")


def parameter_groups(model: nn.Module, cfg: config.Optimizer) -> list[dict[str, Any]]:
    """Every parameter exactly once, frozen ones too (they get no gradient, and may thaw later):
    first those that are decayed, then biases (any parameter with `bias` in its own name) and the
    parameters of norm layers, with weight_decay 0 unless cfg.decay_norm_and_bias. Empty groups
    are left out."""
    norms = {
        id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        spare = not cfg.decay_norm_and_bias and (
            id(p) in norms or "bias" in name.rpartition(".")[2]
        )
        (spared if spare else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build(
    cfg: config.Optimizer, model: nn.Module, device: torch.device | str
) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names, fused where torch has a fused kernel for the device
    (RMSprop has none)."""
    groups = parameter_groups(model, cfg)
    fused = torch.device(device).type in FUSED_DEVICES
    match cfg:
        case config.AdamW():
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused
            )
        case config.Adam():
            optimizer = torch.optim.Adam(
                groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused
            )
        case config.SGD():
            optimizer = torch.optim.SGD(
                groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused
            )
        case config.RMSprop():
            return torch.optim.RMSprop(
                groups, lr=cfg.lr, alpha=cfg.alpha, momentum=cfg.momentum, eps=cfg.eps
            )
        case _:
            assert_never(cfg)
    if fused:
        optimizer.register_step_pre_hook(_before_fused_step)
        optimizer.register_load_state_dict_post_hook(_match_layout)
    return optimizer


def _before_fused_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What fused kernels of torch 2.14 leave to their caller."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            # They walk through memory: on a CPU, gradients in another memory order than their
            # parameter (contiguous beside channels_last, say) would be added to the wrong weights
            # without a word.
            if p.grad.stride() != p.stride():
                p.grad = _laid_out_like(p, p.grad)
            # SGD makes its momentum with empty_like in the first step, for the kernel to fill. If
            # just that step is skipped, the next one reads uninitialised memory; and a parameter
            # that thaws later gets none at all. Zeros give the same first step.
            if group.get("momentum") and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.preserve_format
                )


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """State from a checkpoint in the memory order of the parameters here."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[name] = _laid_out_like(p, value)


def _laid_out_like(p: Tensor, x: Tensor) -> Tensor:
    """x itself, or a copy where its memory order differs from p's."""
    if p.stride() == x.stride():
        return x
    return torch.empty_like(p, dtype=x.dtype, memory_format=torch.preserve_format).copy_(x)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """optimizer.step() where `finite` (bool[], on the parameters' device) is true; otherwise
    weights, averages and step counts all stay as they were, bit for bit. `finite` must tell of
    every gradient, for example torch.isfinite(their global norm).

    Fused optimizers decide on the device, through the `found_inf` that GradScaler hands them, and
    the host does not wait. Others (RMSprop) have no such switch: the host waits for `finite`, once
    per step.

    With a GradScaler: scaler.unscale_(optimizer), clip, step_if_finite, scaler.update().
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if bool(finite):
            optimizer.step()
        return
    optimizer.found_inf = torch.logical_not(finite).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
