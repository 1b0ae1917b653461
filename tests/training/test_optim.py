"""Optimizers: groups, parity with torch's plain implementations, skipped steps, memory order,
exact restore."""

import copy
import dataclasses
import io

import pytest
import timm.optim
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftlib import config
from ftlib.training import models, optim

ALL = [
    config.AdamW(lr=0.01, weight_decay=0.1),
    config.Adam(lr=0.01, weight_decay=0.1),
    config.SGD(lr=0.01, weight_decay=0.1),
    config.SGD(lr=0.01, momentum=0.0, nesterov=False),
    config.RMSprop(lr=0.01, weight_decay=0.1),
]
ids = ["AdamW", "Adam", "SGD", "SGD-plain", "RMSprop"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def net(channels_last=False, device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 2),
        nn.GroupNorm(1, 5),
        nn.Flatten(),
        nn.Linear(20, 4),
    ).to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def give_gradients(model, seed, bad=None):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.device)
    if bad is not None:
        next(model.parameters()).grad.view(-1)[0] = bad


def weights(model):
    return {k: v.clone() for k, v in model.named_parameters()}


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def flat_state(optimizer):
    return {
        (i, k): v.clone() if torch.is_tensor(v) else torch.tensor(v)
        for i, s in optimizer.state_dict()["state"].items()
        for k, v in s.items()
        if v is not None
    }


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch", ["resnet18", "convnext_tiny", "swin_t", "vit_b_32", "mobilenet_v3_small"]
)
def test_every_parameter_is_in_one_group_and_no_norm_nor_bias_is_decayed(arch):
    with torch.device("cpu" if arch.startswith(("swin", "regnet")) else "meta"):
        model = torchvision.models.get_model(arch, weights=None)
    decayed, spared = optim.parameter_groups(model, config.AdamW(weight_decay=0.05))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    ids = [id(p) for g in (decayed, spared) for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    # torchvision's own recipe: norm layers and biases apart
    norms, others = torchvision.ops._utils.split_normalization_params(model)
    biases = {id(p) for n, p in model.named_parameters() if "bias" in n.split(".")[-1]}
    assert {id(p) for p in spared["params"]} == {id(p) for p in norms} | biases
    assert {id(p) for p in decayed["params"]} == {id(p) for p in others} - biases
    assert optim.parameter_groups(
        model, config.AdamW(weight_decay=0.05, decay_norm_and_bias=True)
    ) == [{"params": list(model.parameters()), "weight_decay": 0.05}]


def test_a_shared_and_a_frozen_parameter_are_there_once():
    model = net()
    model.add_module("again", model[3])
    model[0].requires_grad_(False)
    params = [p for g in optim.parameter_groups(model, config.SGD()) for p in g["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))


def test_weight_decay_moves_only_what_it_should():
    model = net()
    optimizer = optim.build(config.AdamW(lr=0.1, weight_decay=0.5), model, "cpu")
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {"0.weight", "3.weight", "6.weight"}


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_ten_steps_are_those_of_torchs_plain_optimizer(cfg, device):
    ours, theirs = net(device=device), net(device=device)
    a = optim.build(cfg, ours, device)
    groups = optim.parameter_groups(theirs, cfg)
    match cfg:
        case config.AdamW() | config.Adam():
            b = getattr(torch.optim, type(cfg).__name__)(
                groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, foreach=False
            )
        case config.SGD():
            b = torch.optim.SGD(
                groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, foreach=False
            )
        case _:
            b = torch.optim.RMSprop(
                groups,
                lr=cfg.lr,
                alpha=cfg.alpha,
                momentum=cfg.momentum,
                eps=cfg.eps,
                foreach=False,
            )
    for t in range(10):
        for model, o in ((ours, a), (theirs, b)):
            optim.set_lr(o, cfg.lr * (t + 1) / 10)
            give_gradients(model, t)
            o.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    assert not equal(weights(ours), weights(net(device=device)))


def test_the_kernels_are_fused_where_torch_has_them():
    assert [bool(optim.build(cfg, net(), "cpu").defaults.get("fused")) for cfg in ALL] == [
        True,
        True,
        True,
        True,
        False,
    ]


def test_the_rate_is_set_in_every_group():
    optimizer = optim.build(config.AdamW(), net(), "cpu")
    optim.set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


# --- skipped steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_a_skipped_step_leaves_no_trace(cfg, first, bad, device):
    """Weights and state go on as if the bad step had never been, also when it is the very first."""
    finals = []
    for with_bad in (True, False):
        model = net(device=device)
        optimizer = optim.build(cfg, model, device)
        for t in range(4):
            if with_bad and t == (0 if first else 2):
                before, state = weights(model), flat_state(optimizer)
                give_gradients(model, 99, bad)
                optim.step_if_finite(optimizer, torch.tensor(False, device=device))
                assert equal(weights(model), before)
                if not first:
                    assert equal(flat_state(optimizer), state)
            give_gradients(model, t)
            optim.step_if_finite(optimizer, torch.tensor(True, device=device))
        finals.append((weights(model), flat_state(optimizer)))
    assert equal(finals[0][0], finals[1][0]) and equal(finals[0][1], finals[1][1])
    assert all(torch.isfinite(v).all() for v in finals[0][0].values())


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_a_finite_step_is_the_optimizers_own(cfg):
    a, b = net(), net()
    for model, step in (
        (a, lambda o: optim.step_if_finite(o, torch.tensor(True))),
        (b, lambda o: o.step()),
    ):
        optimizer = optim.build(cfg, model, "cpu")
        for t in range(3):
            give_gradients(model, t)
            step(optimizer)
        assert not hasattr(optimizer, "found_inf")
    assert equal(weights(a), weights(b))


class NoWaiting(TorchDispatchMode):
    """Fails on what reads a value from a device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_fused_optimizers_decide_without_the_host(cfg, finite):
    model = net()
    optimizer = optim.build(cfg, model, "cpu")
    for t in range(2):
        give_gradients(model, t)
        if isinstance(cfg, config.RMSprop):
            with pytest.raises(AssertionError), NoWaiting():
                optim.step_if_finite(optimizer, torch.tensor(finite))
        else:
            with NoWaiting():
                optim.step_if_finite(optimizer, torch.tensor(finite))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cfg", ALL[:4], ids=ids[:4])
def test_fused_optimizers_do_not_synchronise_a_gpu(cfg):
    model = net(device="cuda")
    optimizer = optim.build(cfg, model, "cuda")
    yes, no = torch.tensor(True, device="cuda"), torch.tensor(False, device="cuda")
    give_gradients(model, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for finite in (no, yes, no, yes):
            optim.step_if_finite(optimizer, finite)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_a_parameter_that_thaws_later_joins_in(cfg):
    model = net()
    model[0].requires_grad_(False)
    optimizer = optim.build(cfg, model, "cpu")
    before = weights(model)
    for t in range(4):
        give_gradients(model, t)
        if t < 2:
            model[0].weight.grad = model[0].bias.grad = None
        optim.step_if_finite(optimizer, torch.tensor(True))
        assert torch.equal(model[0].weight, before["0.weight"]) == (t < 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- memory order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_memory_order_does_not_matter(cfg, device):
    """Contiguous gradients beside channels_last weights: torch's fused CPU kernels would add
    them to the wrong weights."""
    plain, last = net(device=device), net(channels_last=True, device=device)
    for model in (plain, last):
        optimizer = optim.build(cfg, model, device)
        for t in range(3):
            give_gradients(model, t)
            optimizer.step()
    assert last[0].weight.stride() != plain[0].weight.stride()
    torch.testing.assert_close(weights(last), weights(plain))


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_state_of_a_contiguous_model_goes_on_in_a_channels_last_one(cfg):
    whole = net()
    optimizer = optim.build(cfg, whole, "cpu")
    resumed = None
    for t in range(4):
        if t == 2:
            resumed = net()
            resumed.load_state_dict(whole.state_dict())
            resumed = resumed.to(memory_format=torch.channels_last)
            other = optim.build(cfg, resumed, "cpu")
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, o in ((whole, optimizer), (resumed, other if resumed else None)):
            if model is not None:
                give_gradients(model, t)
                o.step()
    torch.testing.assert_close(weights(resumed), weights(whole))


# --- restore --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(5))
@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_stopped_anywhere_it_goes_on_bit_for_bit_from_a_weights_only_file(cfg, stop):
    model = net(channels_last=True)
    optimizer = optim.build(cfg, model, "cpu")
    for t in range(5):
        if t == stop:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            resumed = net(channels_last=True)
            resumed.load_state_dict(saved["model"])
            again = optim.build(cfg, resumed, "cpu")
            again.load_state_dict(saved["optimizer"])
        for m, o in ((model, optimizer), (resumed, again)) if t >= stop else ((model, optimizer),):
            optim.set_lr(o, 0.01 / (t + 1))
            give_gradients(m, t, float("nan") if t == 3 else None)
            optim.step_if_finite(o, torch.tensor(t != 3))
    assert equal(weights(model), weights(resumed)) and equal(
        flat_state(optimizer), flat_state(again)
    )


# --- learning rates by depth ----------------------------------------------------------------------

TIMM = {
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 64,
    "resnet10t": 64,
    "tf_efficientnet_lite0": 64,
}


@pytest.mark.parametrize("name", TIMM)
def test_layer_decay_is_timms(name):
    """The same learning-rate factor and weight decay for every parameter as timm's own groups."""
    model = models.build(config.Model(arch=f"timm/{name}"), 5, TIMM[name])
    theirs = timm.optim.param_groups_layer_decay(
        model,
        weight_decay=0.05,
        layer_decay=0.7,
        no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
    )
    cfg = config.AdamW(weight_decay=0.05, layer_decay=0.7)
    ours = optim.parameter_groups(model, cfg)

    def of(groups):
        return {
            id(p): (pytest.approx(g["lr_scale"]), g["weight_decay"])
            for g in groups
            for p in g["params"]
        }

    assert of(ours) == of(theirs) and len(of(ours)) == len(list(model.parameters()))
    keys = [(g["lr_scale"], g["weight_decay"]) for g in ours]
    assert len(set(keys)) == len(keys)


def test_layer_decay_and_head_lr_of_a_resnet():
    model = models.build_on_meta(config.Model(arch="resnet18"), 5)
    cfg = config.SGD(lr=0.1, weight_decay=0.01, layer_decay=0.5, head_lr=10.0)
    scale = {id(p): g["lr_scale"] for g in optim.parameter_groups(model, cfg) for p in g["params"]}
    assert scale[id(model.conv1.weight)] == 0.5**9
    assert scale[id(model.layer4[1].bn2.bias)] == 0.5
    assert scale[id(model.fc.weight)] == scale[id(model.fc.bias)] == 10.0


def test_head_lr_alone_leaves_the_backbone_as_it_is():
    model = models.build_on_meta(config.Model(arch="resnet18"), 5)
    groups = optim.parameter_groups(model, config.SGD(head_lr=3.0))
    assert [g["lr_scale"] for g in groups] == [1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_the_schedules_rate_is_scaled_in_every_group(cfg):
    model = models.build(config.Model(arch="shufflenet_v2_x0_5"), 3, 32)
    scaled = dataclasses.replace(cfg, layer_decay=0.5, head_lr=2.0)
    optimizer = optim.build(scaled, model, "cpu")
    optim.set_lr(optimizer, 0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.3 * group["lr_scale"])
    again = optim.build(scaled, model, "cpu")
    again.load_state_dict(optimizer.state_dict())
    optim.set_lr(again, 0.1)
    assert max(g["lr"] for g in again.param_groups) == pytest.approx(0.2)


def test_checkpoints_without_factors_keep_one_rate():
    """The groups of a run from before these settings."""
    model = net()
    optimizer = optim.build(config.AdamW(lr=0.1), model, "cpu")
    assert all("lr_scale" not in g for g in optimizer.param_groups)
    optim.set_lr(optimizer, 0.2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.2}
