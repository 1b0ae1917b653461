"""The loop in one process: against plain torch, against itself restarted, and where numbers go
wrong.

Modules: loop, evaluate, oom, run_log, state, step_monitor, worker_context.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from worker import BASE, digest, final

from ftlib.config import Run
from ftlib.data import rng, sampler
from ftlib.data.augment import TrainTransform
from ftlib.settings import override
from ftlib.training import evaluate, initial_weights, loop, losses, models
from ftlib.training.loop import DivergedError, InterruptedTrainingError, WorkerContext, train
from ftlib.training.state import LossScale


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**changes):
    return override(Run(), {**BASE, **changes})


def stop_after(step):
    asked = [0]

    def notice():
        asked[0] += 1
        return "stop" if asked[0] == step else ""

    return notice


def test_a_step_is_what_plain_torch_does(digits, tmp_path):
    """Two steps of the loop = two steps written out with torch alone: same images, no mixing,
    SGD with clipping, 4 microbatches."""
    run = recipe(
        **{
            "mix.mixup_alpha": 0,
            "mix.cutmix_alpha": 0,
            "model.dropout": 0,
            "train.ema_decay": 0,
            "optimizer": "SGD",
            "optimizer.lr": 0.1,
            "optimizer.weight_decay": 1e-3,
            "schedule": "Constant",
            "train.epochs": 1,
            "train.channels_last": False,
            "loss.label_smoothing": 0.1,
        }
    )
    with pytest.raises(InterruptedTrainingError):
        train(WorkerContext(run, digits, str(tmp_path), notice=stop_after(2)))
    ours = final(str(tmp_path))["model"]

    with torch.random.fork_rng():
        torch.manual_seed(rng.key(rng.INIT, run.seed) % 2**63)
        plain = models.build(run.model, 10)
    decay = [p for n, p in plain.named_parameters() if p.ndim > 1]
    rest = [p for n, p in plain.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 1e-3}, {"params": rest, "weight_decay": 0}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    transform = TrainTransform(run.augment, run.seed)
    rows, split = np.arange(100), digits.split("train")
    for step in range(2):
        optimizer.zero_grad()
        for mb in sampler.step_plan(run.seed, step, rows, 16, 4):
            pixels = np.stack([transform(split.image(int(r)), mb.epoch, int(r)) for r in mb.rows])
            x = (
                torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
                - torch.tensor(run.data.mean)[:, None, None]
            ) / torch.tensor(run.data.std)[:, None, None]
            plain.train()
            frozen = {n: b.clone() for n, b in plain.named_buffers()}
            loss = F.cross_entropy(
                plain(x), torch.from_numpy(split.labels[mb.rows]), label_smoothing=0.1
            )
            (loss / 4).backward()
            for n, b in plain.named_buffers():
                b.copy_(frozen[n])
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    # Float rounding alone: 1/255 folded into the scale, another order of the norm. BatchNorm at 1x1
    # pixels amplifies it.
    for name, p in plain.named_parameters():
        torch.testing.assert_close(
            ours[name], p.detach(), rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_batchnorm_moves_once_per_step_by_the_mean_of_the_microbatches(digits, tmp_path):
    run = recipe(
        **{"train.epochs": 1, "model.dropout": 0, "mix.mixup_alpha": 0, "mix.cutmix_alpha": 0}
    )
    seen = []
    job = WorkerContext(run, digits, str(tmp_path), notice=stop_after(1))
    training = loop.Training(job)
    first = next(m for m in training.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.register_forward_hook(
        lambda m, args, out: seen.append(args[0].detach()) if m.training else None
    )
    with pytest.raises(InterruptedTrainingError):
        training.fit()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert len(seen) == 4
    torch.testing.assert_close(
        first.running_mean, first.momentum * means.mean(0), rtol=1e-5, atol=1e-6
    )


def test_it_learns_eight_images_by_heart(tmp_path):
    from conftest import MemoryDataset

    run = recipe(
        **{
            "train.epochs": 40,
            "train.batch_size": 8,
            "train.microbatch_size": 8,
            "mix.mixup_alpha": 0,
            "mix.cutmix_alpha": 0,
            "model.dropout": 0,
            "train.ema_decay": 0,
            "augment.randaugment_n": 0,
            "augment.randaugment_m": 0,
            "augment.crop_scale": [1, 1],
            "augment.crop_ratio": [1, 1],
            "augment.flip": 0,
            "augment.color_jitter_p": 0,
            "schedule": "Constant",
            "evaluate.every_epochs": 40,
        }
    )
    out = train(WorkerContext(run, MemoryDataset(8, 8), str(tmp_path)))
    assert (
        out["history"][-1]["train/top1"] == 100
        and out["history"][-1]["train/loss"] < out["history"][0]["train/loss"] / 2
    )


VARIANTS = {
    "adamw cosine ema": {},
    "sgd one cycle": {"optimizer": "SGD", "schedule": "OneCycle", "train.ema_decay": 0},
    "rmsprop step bce": {
        "optimizer": "RMSprop",
        "optimizer.lr": 1e-4,
        "schedule": {"type": "Step", "every_epochs": 1},
        "loss": "BCE",
    },
    "adam plateau focal": {
        "optimizer": "Adam",
        "schedule": {"type": "Plateau", "patience": 0},
        "loss": "Focal",
        "loss.class_weights": "balanced",
    },
    "nll warm-up trivialaugment erasing": {
        "loss": "NLL",
        "schedule": {"type": "Constant", "warmup_epochs": 1},
        "augment.randaugment_n": 0,
        "augment.randaugment_m": 0,
        "augment.trivialaugment": True,
        "augment.erasing_p": 0.5,
        "mix.off_epochs": 1,
    },
    "resnet dropout drop path freeze": {
        "model.arch": "resnet18",
        "augment.size": 16,
        "model.drop_path": 0.2,
        "model.freeze_epochs": 1,
    },
    "timm layer decay unfreezing": {
        "model.arch": "timm/convnext_atto",
        "model.dropout": 0.1,
        "model.drop_path": 0.1,
        "augment.size": 32,
        "optimizer.layer_decay": 0.7,
        "optimizer.head_lr": 3.0,
        "model.unfreeze_every": 1,
    },
    "fp16": {"train.precision": "fp16"},
    "bf16": {"train.precision": "bf16"},
}


@pytest.mark.parametrize(
    "variant, stops",
    [
        *((v, (3,)) for v in VARIANTS),
        ("adamw cosine ema", (7,)),
        ("adamw cosine ema", (2, 3, 4)),
        ("resnet dropout drop path freeze", (7,)),
    ],
    ids=str,
)
def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(digits, tmp_path, variant, stops):
    """Inside an epoch, at its edge (7 steps), and again and again."""
    run = recipe(**VARIANTS[variant])
    train(WorkerContext(run, digits, str(tmp_path / "a")))
    for stop in stops:
        with pytest.raises(InterruptedTrainingError):
            train(WorkerContext(run, digits, str(tmp_path / "b"), notice=stop_after(stop)))
    train(WorkerContext(run, digits, str(tmp_path / "b")))
    a, b = final(str(tmp_path / "a")), final(str(tmp_path / "b"))
    assert a["step"] == b["step"] == 14
    assert digest(a) == digest(b)


def test_seed_mixing_and_dropout_each_change_the_weights(digits, tmp_path):
    """So does the magnitude of the augmentation; the distance of log points does not."""
    hashes = {}
    for name, changes in {
        "base": {},
        "seed": {"seed": 1},
        "mix": {"mix.mixup_alpha": 0, "mix.cutmix_alpha": 0},
        "dropout": {"model.dropout": 0.2},
        "m": {"augment.randaugment_m": 3},
        "log": {"train.log_every": 5},
    }.items():
        train(WorkerContext(recipe(**{"train.epochs": 1, **changes}), digits, str(tmp_path / name)))
        hashes[name] = digest(final(str(tmp_path / name))["model"])
    assert hashes.pop("log") == hashes["base"]
    assert len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize(
    ("matrix_units", "size", "wanted"),
    [(True, 128, torch.bfloat16), (True, 127, torch.float32), (False, 224, torch.float32)],
)
def test_auto_is_bf16_on_cpus_with_matrix_units(monkeypatch, matrix_units, size, wanted):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    run = recipe(**{"augment.size": size, "train.precision": "auto"})
    assert loop.precision(run, torch.device("cpu")) == wanted


def test_bf16_and_fp32_agree(digits, tmp_path):
    losses_of = {}
    for kind in ("fp32", "bf16"):
        out = train(
            WorkerContext(
                recipe(**{"train.precision": kind, "train.epochs": 1, "optimizer.lr": 1e-4}),
                digits,
                str(tmp_path / kind),
            )
        )
        losses_of[kind] = out["history"][0]["train/loss"]
    assert abs(losses_of["bf16"] - losses_of["fp32"]) < 0.05 * losses_of["fp32"]


def poison(monkeypatch, steps):
    real = loop.normalize
    seen = {"step": -1}

    def normalize(images, mean, std):
        x = real(images, mean, std)
        return x * float("nan") if seen["step"] in steps else x

    real_microbatch = loop.Training.microbatch

    def microbatch(self, batch, buffer):
        seen["step"] = batch.step
        return real_microbatch(self, batch, buffer)

    monkeypatch.setattr(loop, "normalize", normalize)
    monkeypatch.setattr(loop.Training, "microbatch", microbatch)


@pytest.mark.parametrize("step", [3, 7, 8])
def test_a_stop_leaves_a_checkpoint_of_its_very_step(digits, tmp_path, step):
    """Within an epoch, at its edge (seven steps) and after it."""
    with pytest.raises(InterruptedTrainingError, match=f"stopped at step {step} "):
        train(
            WorkerContext(
                recipe(**{"train.epochs": 2}), digits, str(tmp_path), notice=stop_after(step)
            )
        )
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()


def test_a_step_that_is_not_finite_changes_nothing(digits, tmp_path, monkeypatch):
    run = recipe(**{"train.epochs": 1, "optimizer.weight_decay": 0.1})
    with pytest.raises(InterruptedTrainingError):
        train(WorkerContext(run, digits, str(tmp_path / "a"), notice=stop_after(3)))
    before = final(str(tmp_path / "a"))
    poison(monkeypatch, {3})
    with pytest.raises(InterruptedTrainingError):
        train(WorkerContext(run, digits, str(tmp_path / "a"), notice=stop_after(1)))
    after = final(str(tmp_path / "a"))
    assert after["step"] == 4 and after["nonfinite"] == 1
    assert digest({k: v for k, v in after["model"].items() if "num_batches" not in k}) == digest(
        {k: v for k, v in before["model"].items() if "num_batches" not in k}
    )
    assert digest(after["optimizer"]["state"]) == digest(before["optimizer"]["state"])


def test_too_many_of_them_stop_the_run_and_name_the_images(digits, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 4})
    with pytest.raises(DivergedError) as error:
        train(WorkerContext(recipe(**{"train.max_nonfinite": 2}), digits, str(tmp_path)))
    assert (
        "step 4 (epoch 1)" in str(error.value)
        and "picture-" in str(error.value)
        and "optimizer.lr" in str(error.value)
    )


def test_out_of_memory_says_what_to_change(digits, tmp_path, monkeypatch):
    def too_much(self, batch, buffer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(loop.Training, "microbatch", too_much)
    with pytest.raises(
        loop.OutOfMemoryError,
        match=r"step 0 with a microbatch of 4 images of 32 px in float32"
        r".*--train.microbatch-size to 2",
    ):
        train(WorkerContext(recipe(), digits, str(tmp_path)))


def test_a_microbatch_that_does_not_fit_is_split_where_that_changes_nothing(
    digits, tmp_path, monkeypatch, caplog
):
    """Memory for one image at a time, in a model whose images do not see each other: the run
    ends as one that had enough."""
    run = recipe(
        **{
            "model.arch": "squeezenet1_1",
            "model.dropout": 0,
            "train.epochs": 1,
            "optimizer.lr": 0.001,
        }
    )
    enough = train(WorkerContext(run, digits, str(tmp_path / "enough")))
    forward = torch.nn.Module.__call__

    def little_memory(self, x, *args, **more):
        if type(self).__name__ == "SqueezeNet" and self.training and len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(self, x, *args, **more)

    monkeypatch.setattr(torch.nn.Module, "__call__", little_memory)
    little = train(WorkerContext(run, digits, str(tmp_path / "little")))
    assert [r.message.split(":")[0] for r in caplog.records if "out of memory" in r.message] == [
        f"out of memory with {n} images of 32 px at once" for n in (4, 2)
    ]
    for a, b in zip(enough["history"], little["history"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4) and a[
            "val/loss"
        ] == pytest.approx(b["val/loss"], rel=1e-4)


def test_the_loss_scale_moves_as_torchs():
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    ours = LossScale.create(True, torch.device("cpu"))
    ours.interval = 3
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], 0.1)
    for finite in [True, True, False, True, True, True, True, False, False, True, True, True]:
        scaler.scale(p.sum()).backward()
        if not finite:
            p.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(finite))
        assert ours.scale.item() == scaler.get_scale()


def test_early_stopping_counts_epochs_since_the_best(digits, tmp_path):
    run = recipe(
        **{
            "train.epochs": 9,
            "train.early_stopping": 2,
            "optimizer.lr": 1e-12,
            "schedule": "Constant",
            "train.ema_decay": 0,
        }
    )
    out = train(WorkerContext(run, digits, str(tmp_path)))
    best = out["metrics"]["best/epoch"]
    assert out["history"][-1]["epoch"] == best + 2 < 9
    again = train(WorkerContext(run, digits, str(tmp_path)))
    assert again["metrics"] == out["metrics"]


def test_a_frozen_backbone_stays_as_it_was(digits, tmp_path):
    run = recipe(**{"model.freeze_epochs": -1, "train.epochs": 1, "train.ema_decay": 0})
    training = loop.Training(WorkerContext(run, digits, str(tmp_path)))
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.fit()
    backbone = models.backbone_parameters(training.model)
    for name, value in training.model.state_dict().items():
        parameter = name in dict(training.model.named_parameters())
        if (parameter and name in backbone) or "running" in name:
            assert torch.equal(value, before[name]), name
        elif parameter:
            assert not torch.equal(value, before[name]), name


def test_scores_agree_with_scikit_learn(digits, tmp_path):
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

    from ftlib.data.loader import eval_batches

    run = recipe(**{"train.epochs": 1})
    out = train(WorkerContext(run, digits, str(tmp_path)))
    loaded_dir = tmp_path / "run.json"
    import json

    from ftlib.settings import to_dict

    loaded_dir.write_text(json.dumps({"run": to_dict(run)}))
    loaded = initial_weights.load_run_model(str(tmp_path))
    split = digits.split("val")
    with eval_batches(
        split, np.arange(37), size=run.eval_size, crop=run.evaluate.crop, batch_size=16, workers=0
    ) as batches:
        p = evaluate.predict(
            loaded.model, batches, torch.device("cpu"), run.data.mean, run.data.std
        )
    probabilities = torch.softmax(torch.from_numpy(p.logits), 1).numpy()
    assert out["metrics"]["best/val_top1"] == pytest.approx(
        100 * accuracy_score(p.labels, p.logits.argmax(1)), abs=1e-3
    )
    assert out["metrics"]["best/val_top5"] == pytest.approx(
        100 * top_k_accuracy_score(p.labels, probabilities, k=5, labels=range(10)), abs=1e-3
    )
    assert out["metrics"]["best/val_loss"] == pytest.approx(
        log_loss(p.labels, probabilities, labels=range(10)), abs=1e-4
    )


def test_the_tuning_split_is_scored_in_place_of_the_validation_set(digits, tmp_path):
    run = recipe(**{"train.epochs": 1, "data.tuning_fraction": 0.2})
    job = WorkerContext(run, digits, str(tmp_path))
    rows, scored, name = job.rows
    assert name == "tuning" and not set(rows) & set(scored) and len(rows) + len(scored) == 100
    out = train(job)
    assert "best/tuning_top1" in out["metrics"] and not any(
        k.startswith("val/") for k in out["history"][0]
    )


def test_balanced_weights_use_the_training_rows(digits, tmp_path):
    run = recipe(**{"loss.class_weights": "balanced", "data.subset": 0.5})
    training = loop.Training(WorkerContext(run, digits, str(tmp_path)))
    counts = np.bincount(digits.split("train").labels[training.rows], minlength=10)
    targets = losses.soft_targets(torch.arange(10), 10, 0.0)
    per_class = training.criterion(torch.zeros(10, 10), targets)
    ratio = per_class / per_class[0]
    np.testing.assert_allclose(ratio.numpy(), counts[0] / counts, rtol=1e-5)


# --- the device -----------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what reads a value from a device to the host, and so waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {
            "optimizer": "AdamW",
            "mix.mixup_alpha": 0.2,
            "mix.cutmix_alpha": 1.0,
            "model.dropout": 0.1,
            "train.ema_decay": 0.9,
        },
        {"optimizer": "SGD", "train.clip_norm": 0, "loss": "BCE"},
        {"optimizer": "Adam", "loss": "Focal", "loss.class_weights": "balanced"},
    ],
    ids=["everything", "sgd", "focal"],
)
def test_no_step_waits_for_the_device_between_log_points(digits, changes, monkeypatch):
    reads = Reads()

    def counting(original):
        def counted(*args, **kwargs):
            reads.count += 1
            return original(*args, **kwargs)

        return counted

    for name in ("tolist", "cpu", "numpy"):  # on a CPU these are not dispatched
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    training = loop.Training(WorkerContext(recipe(**changes), digits, ""))
    with contextlib.closing(
        loop.train_batches(
            digits,
            training.rows,
            training.run,
            rank=0,
            world=1,
            start_step=0,
            stop_step=training.total,
            workers=0,
        )
    ) as batches:
        training.update_frozen(0)
        weight = list(training.model.parameters())[-2]
        before = weight.detach().clone()
        reads.count = 0
        with reads:
            for _ in range(2):
                training.train_step(batches, ask=False)
                training.state.step += 1
        assert reads.count == 0
        with reads:
            training.sync_and_log()  # a log point may
        assert reads.count > 0 and not torch.equal(before, weight)
