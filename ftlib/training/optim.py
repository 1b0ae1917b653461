"""Optimizers: parameter groups, fused kernels, and a step that skips itself when the gradients
are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import assert_never

from ftlib import config
from ftlib.training import models

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters are not decayed: batch, instance, layer, group and RMS norm, and their
subclasses."""
FUSED_DEVICES = ("cuda", "cpu")


def parameter_groups(model: nn.Module, cfg: config.Optimizer) -> list[dict[str, Any]]:
    """Every parameter exactly once, frozen ones too: they get no gradient, and may thaw later.

    Not decayed are biases (any parameter with `bias` in its own name), the parameters of norm
    layers, and what the model itself asks for, unless cfg.decay_norm_and_bias.

    Without cfg.layer_decay and cfg.head_lr there are two groups, decayed first. With them there are
    two for each learning rate, from the stem on, and `lr_scale` is the factor of its rate: 1 at the
    classifier (times head_lr), layer_decay more for each block before it. Empty groups are left
    out.
    """
    spared = set() if cfg.decay_norm_and_bias else _undecayed(model)
    scales = _lr_scales(model, cfg)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in sorted(set(scales.values())):
        groups |= {(scale, True): [], (scale, False): []}
    for name, p in model.named_parameters():
        groups[scales[name], name not in spared].append(p)
    out: list[dict[str, Any]] = []
    for (scale, decayed), params in groups.items():
        if not params:
            continue
        group = {"params": params, "weight_decay": cfg.weight_decay if decayed else 0.0}
        out.append(group if len(set(scales.values())) == 1 else {**group, "lr_scale": scale})
    return out


def _undecayed(model: nn.Module) -> set[str]:
    own = models.undecayed(model)
    if own is not None:
        return set(own)
    norms = {
        id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    return {
        name
        for name, p in model.named_parameters()
        if id(p) in norms or "bias" in name.rpartition(".")[2]
    }


def _lr_scales(model: nn.Module, cfg: config.Optimizer) -> dict[str, float]:
    """Parameter name -> factor of the learning rate."""
    if cfg.layer_decay == 1 and cfg.head_lr == 1:
        return dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    depths, backbone = models.depths(model), models.backbone_parameters(model)
    last = max(depths.values())
    return {
        name: cfg.layer_decay ** (last - depth) * (1.0 if name in backbone else cfg.head_lr)
        for name, depth in depths.items()
    }


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


def _before_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
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
    """The schedule's rate in every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


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
