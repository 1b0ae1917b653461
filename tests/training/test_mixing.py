"""Mixing against torchvision's v2 transforms with the same lambda and box, and the statistics of
what is drawn."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from ftlib import config
from ftlib.training import mixing
from ftlib.training.losses import soft_targets

B, C, H, W = 8, 10, 24, 32
NEXT = torch.arange(B).roll(1)
"""torchvision pairs each image with the one before it."""


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, H, W, generator=g), soft_targets(
        torch.randperm(C, generator=g)[:B], C, 0.1
    )


def torchvisions(kind, params, images, targets, monkeypatch):
    transform = kind(num_classes=C)
    monkeypatch.setattr(transform, "make_params", lambda inputs: params)
    return transform(images, targets)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.7, 1.0])
def test_mixup_is_torchvisions(batch, lam, monkeypatch):
    ours = mixing.mixup(*batch, NEXT, lam)
    torch.testing.assert_close(
        ours, torchvisions(v2.MixUp, {"lam": lam}, *batch, monkeypatch), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("box", [(0, 0, W, H), (3, 5, 17, 9), (20, 0, W, 24), (7, 7, 7, 7)])
def test_cutmix_is_torchvisions(batch, box, monkeypatch):
    x1, y1, x2, y2 = box
    lam = 1 - (x2 - x1) * (y2 - y1) / (W * H)
    assert mixing.cutmix_lam(box, H, W) == lam
    images, targets = mixing.cutmix(*batch, NEXT, box)
    theirs = torchvisions(v2.CutMix, {"box": box, "lam_adjusted": lam}, *batch, monkeypatch)
    assert torch.equal(images, theirs[0])
    torch.testing.assert_close(targets, theirs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_the_box_of_a_lambda_and_a_centre_is_torchvisions(lam, monkeypatch):
    transform = v2.CutMix(num_classes=C)
    for x, y in [(0, 0), (W - 1, H - 1), (W // 2, H // 2), (3, 20)]:
        monkeypatch.setattr(
            transform,
            "_dist",
            type(
                "Fixed",
                (),
                {"sample": staticmethod(lambda shape: torch.tensor(lam, dtype=torch.float64))},
            ),
        )
        centre = iter([x, y])
        monkeypatch.setattr(
            torch, "randint", lambda *a, centre=centre, **k: torch.tensor([next(centre)])
        )
        params = transform.make_params([torch.zeros(B, 3, H, W)])
        box = mixing.cutmix_box(lam, x, y, H, W)
        assert box == tuple(params["box"])
        assert mixing.cutmix_lam(box, H, W) == pytest.approx(params["lam_adjusted"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    "plan",
    [
        mixing.MixPlan("mixup", torch.randperm(B, generator=torch.Generator().manual_seed(3)), 0.3),
        mixing.MixPlan(
            "cutmix",
            torch.randperm(B, generator=torch.Generator().manual_seed(3)),
            0.75,
            (0, 0, W // 2, H // 2),
        ),
    ],
    ids=["mixup", "cutmix"],
)
def test_every_type_and_memory_order_element_by_element_and_the_arguments_stay(
    batch, plan, dtype, channels_last
):
    images, targets = (batch[0] * 40 + 128).clamp(0, 255).to(dtype), batch[1]
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    before = images.clone(), targets.clone()
    mixed, soft = mixing.apply(plan, images, targets)
    assert mixed.dtype == dtype and mixed.stride() == images.stride()
    for i, j in enumerate(plan.partner.tolist()):
        if plan.kind == "mixup":
            expected = plan.lam * images[i].double() + (1 - plan.lam) * images[j].double()
            torch.testing.assert_close(
                mixed[i].double(), expected, rtol=0.01, atol=0.51 if dtype == torch.uint8 else 1e-4
            )
        else:
            assert torch.equal(mixed[i, :, : H // 2, : W // 2], images[j, :, : H // 2, : W // 2])
            assert torch.equal(mixed[i, :, H // 2 :], images[i, :, H // 2 :]) and torch.equal(
                mixed[i, :, :, W // 2 :], images[i, :, :, W // 2 :]
            )
        torch.testing.assert_close(soft[i], plan.lam * targets[i] + (1 - plan.lam) * targets[j])
    torch.testing.assert_close(soft.sum(1), torch.ones(B))
    assert torch.equal(images, before[0]) and torch.equal(targets, before[1])


class NoWaiting(TorchDispatchMode):
    """Fails on what reads a value from a device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


def test_applying_a_plan_never_waits_for_the_device(batch):
    for key in range(20):
        with NoWaiting():
            mixing.apply(mixing.draw(BOTH, key, B, H, W), *batch)
    with NoWaiting(), pytest.raises(AssertionError):
        batch[0].sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too(batch):
    images, targets = (t.cuda() for t in batch)
    for key in range(20):
        plan = mixing.draw(BOTH, key, B, H, W)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = mixing.apply(plan, images, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close([t.cpu() for t in ours], list(mixing.apply(plan, *batch)))


# --- what is drawn --------------------------------------------------------------------------------

BOTH = config.Mix(mixup_alpha=0.2, cutmix_alpha=1.0)
N = 4000


def plans(cfg, n=N, size=224):
    return [mixing.draw(cfg, k, B, size, size) for k in range(n)]


def test_a_plan_is_a_function_of_the_key_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    a = mixing.draw(BOTH, 2**64 - 1, B, H, W)
    torch.manual_seed(2)
    np.random.seed(2)
    b = mixing.draw(BOTH, 2**64 - 1, B, H, W)
    assert (a.kind, a.lam, a.box) == (b.kind, b.lam, b.box) and torch.equal(a.partner, b.partner)
    assert len({p.lam for p in plans(config.Mix(mixup_alpha=1.0), 100)}) == 100


def test_nothing_is_mixed_when_both_are_off_or_p_is_zero():
    assert all(p is None for p in plans(config.Mix(), 50))
    assert all(p is None for p in plans(config.Mix(mixup_alpha=0.2, p=0.0), 50))
    images, targets = torch.zeros(2, 3, 4, 4), torch.eye(2)
    assert mixing.apply(None, images, targets) == (images, targets)


def test_one_alone_is_the_only_one_drawn_whatever_the_share():
    assert {p.kind for p in plans(config.Mix(mixup_alpha=1.0, cutmix_share=1.0), 100)} == {"mixup"}
    assert {p.kind for p in plans(config.Mix(cutmix_alpha=1.0, cutmix_share=0.0), 100)} == {
        "cutmix"
    }


@pytest.mark.parametrize("p,share", [(1.0, 0.5), (0.4, 0.25), (0.9, 1.0), (1.0, 0.0)])
def test_shares_of_mixed_and_of_cutmix_and_never_both(p, share):
    drawn = plans(config.Mix(mixup_alpha=0.2, cutmix_alpha=1.0, p=p, cutmix_share=share))
    mixed = [d for d in drawn if d is not None]
    cut = [d for d in mixed if d.kind == "cutmix"]
    assert stats.binomtest(len(mixed), N, p).pvalue > 1e-3 if 0 < p < 1 else len(mixed) == p * N
    assert (
        stats.binomtest(len(cut), len(mixed), share).pvalue > 1e-3
        if 0 < share < 1
        else len(cut) == share * len(mixed)
    )
    assert all((d.box is not None) == (d.kind == "cutmix") for d in mixed)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_lambda_follows_beta(alpha):
    lam = [p.lam for p in plans(config.Mix(mixup_alpha=alpha))]
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_lambda_stays_a_share_at_extreme_alphas(alpha):
    for kind in ("mixup_alpha", "cutmix_alpha"):
        assert all(0 <= p.lam <= 1 for p in plans(config.Mix(**{kind: alpha}), 500))


def test_the_boxes_areas_and_centres_are_those_of_the_paper():
    """Against 400,000 boxes drawn by other code from lambda ~ Beta(1, 1) and a uniform centre,
    cut off at the edge."""
    size, rng = 224, np.random.default_rng(0)
    lam, x, y = rng.random(400_000), rng.random(400_000) * size, rng.random(400_000) * size
    half = size * np.sqrt(1 - lam) / 2
    areas = (
        (np.minimum(x + half, size) - np.maximum(x - half, 0))
        * (np.minimum(y + half, size) - np.maximum(y - half, 0))
        / size**2
    )
    drawn = plans(config.Mix(cutmix_alpha=1.0))
    ours = np.array([1 - p.lam for p in drawn])
    assert abs(ours.mean() - areas.mean()) < 4 * areas.std() / np.sqrt(N) + 2 / size
    assert stats.ks_2samp(ours, areas[:50_000]).statistic < 0.04
    inside = np.array(
        [
            ((b := p.box)[2] > 0, b[0] >= 0, b[2] <= size, b[3] <= size, b[0] <= b[2], b[1] <= b[3])
            for p in drawn
        ]
    )
    assert inside.all()
    covered = np.zeros((size, size))
    for p in drawn:
        x1, y1, x2, y2 = p.box
        covered[y1:y2, x1:x2] += 1
    assert (
        np.abs(covered / covered.mean() - covered.T / covered.mean()).mean() < 0.05
    )  # x and y alike


def test_a_cutmix_targets_share_is_the_share_of_its_own_pixels():
    images = torch.arange(B).float().view(B, 1, 1, 1).expand(B, 1, H, W)
    for key in range(50):
        plan = mixing.draw(config.Mix(cutmix_alpha=1.0), key, B, H, W)
        mixed, targets = mixing.apply(plan, images.contiguous(), torch.eye(B))
        for i in range(B):
            own = (mixed[i] == i).double().mean().item()
            assert targets[i, i].item() == pytest.approx(own, abs=1e-6)


def test_partners_are_uniform_permutations():
    count = np.zeros((B, B))
    for p in plans(BOTH):
        partner = p.partner.numpy()
        assert sorted(partner) == list(range(B))
        count[np.arange(B), partner] += 1
    # Rows and columns are tied to sum to N, hence (B - 1)^2 degrees of freedom.
    chi2 = ((count - N / B) ** 2 / (N / B)).sum() * (B - 1) / B
    assert stats.chi2((B - 1) ** 2).sf(chi2) > 1e-3


def test_changing_one_setting_leaves_the_other_draws():
    a, b = plans(config.Mix(mixup_alpha=0.2), 200), plans(config.Mix(mixup_alpha=0.2, p=0.5), 200)
    kept = [(x, y) for x, y in zip(a, b) if y is not None]
    assert 60 < len(kept) < 140 and all(
        x.lam == y.lam and torch.equal(x.partner, y.partner) for x, y in kept
    )


def test_one_image_meets_itself():
    for key in range(10):
        plan = mixing.draw(BOTH, key, 1, H, W)
        images, targets = torch.rand(1, 3, H, W), torch.eye(3)[:1]
        mixed, soft = mixing.apply(plan, images, targets)
        torch.testing.assert_close((mixed, soft), (images, targets))
