"""The weight average against torch's AveragedModel, and its restore."""

import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from ftlib.training.ema import Ema


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )


def train_a_step(model, t):
    g = torch.Generator().manual_seed(t)
    model.train()
    model(torch.randn(6, 3, 4, 4, generator=g)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
            p.grad = None


def floats(model):
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_without_warm_up_it_is_torchs_averaged_model_with_buffers(decay):
    model = net()
    ours, theirs = (
        Ema(model, decay, warmup=False),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True),
    )
    theirs.update_parameters(model)  # AveragedModel's first update is a copy; ours starts as one
    for t in range(20):
        train_a_step(model, t)
        ours.update(model)
        theirs.update_parameters(model)
    a, b = floats(ours.module), floats(theirs.module)
    assert a.keys() == b.keys() and "1.running_var" in a
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_with_warm_up_it_is_the_recursion_written_out():
    model = net()
    ema, expected = Ema(model, 0.9), {k: v.double().clone() for k, v in floats(model).items()}
    for t in range(120):
        train_a_step(model, t)
        assert (
            ema.current_decay()
            == min(0.9, (1 + t) / (10 + t))
            == pytest.approx(0.9 if t >= 80 else (1 + t) / (10 + t))
        )
        ema.update(model)
        d = min(0.9, (1 + t) / (10 + t))
        expected = {k: d * v + (1 - d) * floats(model)[k].double() for k, v in expected.items()}
    torch.testing.assert_close(
        {k: v.double() for k, v in floats(ema.module).items()}, expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("steps", [20, 200])
def test_a_short_run_is_not_stuck_at_its_initial_weights(steps):
    """Weights that walk in a line from 0 to 1: with decay 0.9999 and no warm-up the average
    would still be near 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    warm, cold = Ema(model, 0.9999), Ema(model, 0.9999, warmup=False)
    for t in range(steps):
        nn.init.constant_(model.weight, (t + 1) / steps)
        warm.update(model)
        cold.update(model)
    assert warm.module.weight.item() > 0.85 and cold.module.weight.item() < 0.02


def test_whole_number_buffers_are_copied():
    model = net()
    ema = Ema(model, 0.99)
    for t in range(3):
        train_a_step(model, t)
        ema.update(model)
    assert ema.module[1].num_batches_tracked.item() == 3 == ema.updates


def test_the_average_is_apart_from_the_model_without_gradients_and_in_eval_mode():
    model = net().to(memory_format=torch.channels_last).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ema = Ema(model, 0.9)
    assert (
        not any(p.requires_grad for p in ema.module.parameters())
        and not ema.module.training
        and model.training
    )
    assert ema.module[0].weight.stride() == model[0].weight.stride()
    assert not {t.data_ptr() for t in ema.module.state_dict().values()} & {
        t.data_ptr() for t in model.state_dict().values()
    }
    ema.update(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_stopped_anywhere_it_goes_on_bit_for_bit_from_a_weights_only_file():
    model = net()
    ema = Ema(model, 0.999)
    copies = []
    for t in range(6):
        file = io.BytesIO()
        torch.save(ema.state_dict(), file)
        file.seek(0)
        other = Ema(net(), 0.999)
        other.load_state_dict(torch.load(file, weights_only=True))
        copies.append(other)
        train_a_step(model, t)
        for e in (ema, *copies):
            e.update(model)
    for other in copies:
        a, b = ema.state_dict(), other.state_dict()
        assert a["updates"] == b["updates"] == 6 and all(
            torch.equal(v, b["module"][k]) for k, v in a["module"].items()
        )


def test_an_update_does_not_wait_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = net()
    ema = Ema(model, 0.9)
    with NoWaiting():
        ema.update(model)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match=r"train.ema_decay"):
        Ema(net(), decay)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="not the one"):
        Ema(net(), 0.9).update(nn.Linear(2, 2))
