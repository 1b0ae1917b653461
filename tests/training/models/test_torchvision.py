"""torchvision's classifiers as we build them: keys and values stay torchvision's, dropout and
stochastic depth act or are refused."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from ftlib.config import Model
from ftlib.settings import ConfigError
from ftlib.training import models
from ftlib.training.models.torchvision import SMALLEST_SIZE, SOURCE, RegularizedBlock

ONE_OF_EACH = {
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "alexnet": 63,
    "vgg11_bn": 32,
    "squeezenet1_1": 32,
    "densenet121": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "mnasnet0_5": 32,
    "shufflenet_v2_x0_5": 32,
    "efficientnet_b0": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vit_b_32": 64,
}
"""Architecture -> picture side in pixels."""
LARGE = {
    "resnext50_32x4d",
    "alexnet",
    "vgg11_bn",
    "densenet121",
    "googlenet",
    "inception_v3",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "vit_b_32",
}
"""Tens of millions of weights to initialise, or slow ones: left to the slow tests."""
NO_DROPOUT = {"shufflenet_v2_x0_5", "regnet_y_400mf", "convnext_tiny"}
DROP_PATH = {
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
}


def each(architectures):
    return [pytest.param(a, marks=pytest.mark.slow) if a in LARGE else a for a in architectures]


def built(arch, classes=5, size=32, seed=0, **settings):
    torch.manual_seed(seed)
    return models.build(Model(arch=arch, **settings), classes, image_size=size)


def pictures(size, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", each(ONE_OF_EACH))
def test_each_family_gives_logits_has_torchvisions_keys_and_one_head(arch):
    size = ONE_OF_EACH[arch]
    model = built(arch, 5, size)
    x = pictures(size)
    assert model(x).shape == (4, 5)
    aux = (
        {"aux_logits": False, "init_weights": False}
        if arch in ("googlenet", "inception_v3")
        else {}
    )
    theirs = get_model(
        arch,
        weights=None,
        num_classes=5,
        **aux,
        **({"image_size": size} if arch.startswith("vit") else {}),
    )
    theirs.load_state_dict(model.state_dict())  # strict, both ways
    model.load_state_dict(theirs.state_dict())
    if not aux:
        with torch.no_grad():
            # Equal but for the order of the sums that make one pixel
            # (ftlib.training.one_by_one_conv).
            torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    head = models.head(model)
    assert isinstance(head, nn.Linear | nn.Conv2d) and head.weight.shape[0] == 5
    names = {n for n, _ in model.named_parameters()}
    backbone = models.backbone_parameters(model)
    assert {
        f"{models.head_name(model)}.{n}" for n, _ in head.named_parameters()
    } == names - backbone and len(backbone) > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", SOURCE.architectures())
def test_every_architecture_builds_with_its_head_and_its_refusals_are_true(arch):
    """The tables of families that cannot take dropout or stochastic depth, against the modules
    that torchvision really makes."""
    model = models.build_on_meta(Model(arch=arch), 7)
    assert models.head(model).weight.shape[0] == 7
    modules = list(model.modules())
    resnet = isinstance(model, torchvision.models.ResNet)
    has_depth = resnet or any(isinstance(m, StochasticDepth) for m in modules)
    has_dropout = resnet or any(
        isinstance(m, nn.Dropout) or hasattr(m, "drop_rate") for m in modules
    )
    for setting, can in (("drop_path", has_depth), ("dropout", has_dropout)):
        if can:
            models.check(Model(arch=arch, **{setting: 0.1}), 224)
        else:
            with pytest.raises(ConfigError, match=f"model.{setting} = 0.1: it cannot act"):
                models.check(Model(arch=arch, **{setting: 0.1}), 224)


def test_the_default_is_torchvisions_resnet_to_the_last_bit():
    torch.manual_seed(3)
    theirs = torchvision.models.resnet50(num_classes=10)
    ours = built("resnet50", 10, seed=3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert type(ours.layer1[0]) is type(theirs.layer1[0])


@pytest.mark.parametrize("arch", ["resnet18", "regnet_y_400mf", "mobilenet_v3_small", "swin_t"])
def test_an_outline_has_the_parameters_without_drawing_them(arch):
    cfg = Model(arch=arch)
    before = torch.get_rng_state()
    counted = sum(p.numel() for p in models.build_on_meta(cfg, 7, 64).parameters())
    assert torch.equal(before, torch.get_rng_state()) or arch.startswith("regnet")
    assert counted == sum(p.numel() for p in models.build(cfg, 7, image_size=64).parameters())


def test_initial_weights_depend_on_the_seed_and_not_on_dropout():
    plain, dropped, other = (
        built("resnet18"),
        built("resnet18", dropout=0.3, drop_path=0.2),
        built("resnet18", seed=1),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), dropped.state_dict().values(), strict=True)
    )
    assert not torch.equal(plain.fc.weight, other.fc.weight)


@pytest.mark.slow
def test_every_resnet_and_its_relatives_take_dropout_and_drop_path():
    family = [
        a for a in SOURCE.architectures() if a.startswith(("resnet", "resnext", "wide_resnet"))
    ]
    assert len(family) == 10
    for arch in family:
        with torch.device("meta"):
            model = models.build(Model(arch=arch, dropout=0.1, drop_path=0.1), 5)
        assert (
            sum(isinstance(m, RegularizedBlock) for m in model.modules())
            == {"18": 8, "34": 16, "50": 16, "101": 33, "152": 50}[
                "".join(
                    c
                    for c in arch.split("_")[-2 if arch.endswith(("_2", "d")) else -1]
                    if c.isdigit()
                )
            ]
        )


# --- dropout in ResNets ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_regularized_resnet_computes_what_torchvisions_does_when_nothing_is_dropped(arch):
    """Forward, gradients and BatchNorm statistics, in training and in evaluation."""
    plain, ours = built(arch), built(arch, dropout=0.5, drop_path=0.5)
    assert list(plain.state_dict()) == list(ours.state_dict()) and [
        n for n, _ in plain.named_parameters()
    ] == [n for n, _ in ours.named_parameters()]
    for m in ours.modules():
        if isinstance(m, nn.Dropout | nn.Dropout2d | StochasticDepth):
            m.p = 0.0
    x = pictures(32)
    for model in (plain, ours):
        model.train()(x).square().sum().backward()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()],
        [p.grad for p in plain.parameters()],
        rtol=1e-3,
        atol=1e-4,
    )
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    "place,blocks,before_head",
    [("both", True, True), ("blocks", True, False), ("head", False, True)],
)
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_dropout_acts_where_it_should(arch, place, blocks, before_head):
    model = built(arch, dropout=0.25, dropout_in=place)
    spatial = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
    plain = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(spatial) == (
        len([b for s in (model.layer1, model.layer2, model.layer3, model.layer4) for b in s])
        if blocks
        else 0
    )
    assert len(plain) == before_head and all(m.p == 0.25 for m in spatial + plain)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_whole_channels_of_the_residual_branch_are_dropped_with_the_set_probability(arch):
    model = built(arch, dropout=0.3, dropout_in="blocks")
    block = model.layer2[1]
    norm = block.bn3 if block.bottleneck else block.bn2
    seen = {}
    norm.register_forward_hook(lambda m, a, out: seen.update(branch=out.detach().clone()))
    block.relu.register_forward_pre_hook(lambda m, a: seen.update(total=a[0].detach().clone()))
    x = torch.rand(64, norm.num_features, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    block.train()(x)
    added = seen["total"] - x
    kept = added.flatten(2).abs().amax(2) > 1e-5
    torch.testing.assert_close(
        added[kept], seen["branch"][kept] / 0.7, rtol=1e-3, atol=1e-4
    )  # whole maps, scaled up by 1 / (1 - p)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(
        block.eval()(x), torch.relu(seen["branch"] + x), rtol=1e-4, atol=1e-4
    )


def test_dropout_before_the_classifier_drops_features_and_only_in_training():
    model = built("resnet18", dropout=0.4, dropout_in="head")
    seen = []
    model.fc.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    x = pictures(32, 64)
    model.train()(x)
    model.eval()(x)
    assert (seen[0] == 0).float().mean() > 0.35 and torch.equal(model(x), model(x))


@pytest.mark.parametrize("arch,blocks", [("resnet18", 8), ("resnet50", 16)])
def test_stochastic_depth_rises_in_a_line_to_the_last_block(arch, blocks):
    model = built(arch, drop_path=0.4)
    p = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    assert p == pytest.approx([0.4 * (i + 1) / blocks for i in range(blocks)])


def test_stochastic_depth_skips_the_branch_of_whole_images():
    block = built("resnet18", drop_path=0.8).layer4[1].train()
    x = torch.rand(500, 512, 2, 2)
    torch.manual_seed(0)
    skipped = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert skipped == pytest.approx(0.8, abs=0.06)


# --- the other families ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", each(a for a in ONE_OF_EACH if a not in NO_DROPOUT))
def test_dropout_acts_and_is_exactly_what_is_set(arch):
    size = ONE_OF_EACH[arch]
    x = pictures(size)

    def random(p):
        """Whether two training passes differ (BatchNorm's do not: it sees the same batch)."""
        model = built(arch, size=size, dropout=p).train()
        nn.init.normal_(models.head(model).weight)
        with torch.no_grad():
            return not torch.equal(model(x), model(x))

    assert random(0.5) and not random(0.0)
    rates = {
        m.p for m in built(arch, size=size, dropout=0.125).modules() if isinstance(m, nn.Dropout)
    }
    assert (
        rates <= {0.125}
        if arch.startswith("swin")
        else rates == {0.125} or arch.startswith("densenet")
    )


@pytest.mark.parametrize("arch", sorted(NO_DROPOUT))
def test_dropout_that_cannot_act_is_refused(arch):
    with pytest.raises(
        ConfigError, match=rf"model.dropout = 0.1: it cannot act.*{arch}.*Set it to 0"
    ):
        built(arch, dropout=0.1)


@pytest.mark.parametrize(
    "arch", each(sorted(DROP_PATH - {"resnet18", "resnet50", "resnext50_32x4d", "maxvit_t"}))
)
def test_built_in_stochastic_depth_takes_the_set_rate(arch):
    model = built(arch, drop_path=0.35)
    acting = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    assert max(acting) == pytest.approx(0.35) and min(acting) == 0
    off = built(arch)
    assert all(m.p == 0 for m in off.modules() if isinstance(m, StochasticDepth))
    x = pictures(32)
    with torch.no_grad():
        assert torch.equal(off.train()(x), off(x)) and not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("arch", sorted(set(ONE_OF_EACH) - DROP_PATH))
def test_stochastic_depth_that_cannot_act_is_refused(arch):
    with pytest.raises(ConfigError, match=r"model.drop_path = 0.1: it cannot act"):
        models.check(Model(arch=arch, drop_path=0.1), ONE_OF_EACH[arch])


def test_where_dropout_acts_can_be_chosen_in_resnets_only():
    with pytest.raises(ConfigError, match=r"model.dropout_in = blocks: only ResNets"):
        built("vgg11", dropout=0.1, dropout_in="blocks")


def test_an_unknown_name_is_answered_with_the_nearest():
    for wrong, right in [
        ("resnet51", "resnet50"),
        ("ResNet50", "resnet50"),
        ("efficientnet_bo", "efficientnet_b0"),
        ("vit_b16", "vit_b_16"),
    ]:
        with pytest.raises(ConfigError, match=f"model.arch = {wrong}.*Did you mean {right}?"):
            built(wrong)
    with pytest.raises(ConfigError, match=r"model.arch"):
        built("fcn_resnet50")  # torchvision has it, but it is no classifier


@pytest.mark.parametrize(
    "arch,size,says",
    [
        ("vit_b_32", 100, "Set it to 96"),
        ("maxvit_t", 200, "Set it to 224"),
        ("inception_v3", 64, "at least 75"),
        ("vgg11", 28, "at least 32"),
    ],
)
def test_a_size_the_model_cannot_take_is_refused_with_one_it_can(arch, size, says):
    with pytest.raises(ConfigError, match=f"augment.size = {size}.*{says}"):
        models.check(Model(arch=arch), size)
    with pytest.raises(ConfigError, match=r"evaluate\.size"):
        models.check(Model(arch=arch), 224, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch,least",
    [
        (a, n)
        for f, n in SMALLEST_SIZE.items()
        for a in [next(m for m in SOURCE.architectures() if m.startswith(f))]
    ],
)
def test_the_least_sizes_are_the_least_that_work(arch, least):
    model = built(arch, size=least).train()
    with torch.no_grad():
        assert model(pictures(least, 2)).shape == (2, 5)
        with pytest.raises(RuntimeError):
            model(pictures(least - 1, 2))


def test_a_fixed_size_model_is_evaluated_at_its_training_size():
    models.check(Model(arch="vit_b_32"), 64, 64)
    with pytest.raises(
        ConfigError, match=r"evaluate.size = 96.*training size only, 64.*Set evaluate.size to 0"
    ):
        models.check(Model(arch="vit_b_32"), 64, 96)
    models.check(Model(arch="resnet50"), 128, 160)


# --- freezing and weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch", ["resnet18", "squeezenet1_1", "efficientnet_b0", "shufflenet_v2_x0_5"]
)
def test_a_frozen_backbone_does_not_change_and_thaws_again(arch):
    model = built(arch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    head = models.head_name(model) + "."

    def step():
        """Names of what a training step changes; weight decay makes every trainable weight move."""
        model.train()
        models.freeze_backbone(model, frozen)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.zero_grad()
        model(pictures(32)).square().sum().backward()
        optimizer.step()
        return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

    frozen = True
    changed = step()
    assert changed == {n for n in model.state_dict() if n.startswith(head)}
    frozen = False
    moving = {
        n for n, p in model.named_parameters() if p.any()
    }  # decay leaves zeros, as biases of dead channels
    assert moving <= step() and all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_thawing_a_model_in_eval_mode_leaves_it_there():
    model = built("resnet18").eval()
    models.freeze_backbone(model, True)
    models.freeze_backbone(model, False)
    assert not any(m.training for m in model.modules())


def test_another_head_keeps_the_backbone():
    old, new = built("resnet18", 5), built("resnet18", 9, seed=1)
    fresh = new.fc.weight.clone()
    cfg = Model(arch="resnet18")
    new.load_state_dict(models.fit_state(new, cfg, 32, old.state_dict(), new_head=True))
    assert torch.equal(new.fc.weight, fresh) and torch.equal(
        new.layer3[0].conv1.weight, old.layer3[0].conv1.weight
    )


def test_position_embeddings_are_carried_to_another_size_as_torchvision_does():
    tiny = {
        "patch_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 16,
        "num_classes": 5,
    }
    old, new = (torchvision.models.VisionTransformer(image_size=s, **tiny) for s in (64, 128))
    new.load_state_dict(SOURCE.convert(Model(arch="vit_b_32"), 128, old.state_dict(), 5))
    expected = torchvision.models.vision_transformer.interpolate_embeddings(
        128, 32, dict(old.state_dict())
    )
    assert torch.equal(new.encoder.pos_embedding, expected["encoder.pos_embedding"]) and new(
        pictures(128, 2)
    ).shape == (2, 5)


def test_densenets_older_keys_are_renamed():
    model = built("densenet121", 5, 32)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", k): v
        for k, v in model.state_dict().items()
    }
    assert set(old) != set(model.state_dict())
    new = built("densenet121", 5, 32, seed=1)
    models.load_state(new, models.fit_state(new, Model(arch="densenet121"), 32, old))
    for key, value in new.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_auxiliary_classifiers_of_published_weights_are_left_out():
    theirs = torchvision.models.googlenet(init_weights=False, aux_logits=True)
    cfg = Model(arch="googlenet")
    model = models.build_on_meta(cfg, 1000, 32)
    found = models.fit_state(model, cfg, 32, theirs.state_dict())
    assert set(found) == set(model.state_dict())


def test_a_model_that_asks_for_the_version_of_a_state_dict_loads_a_plain_one():
    model = built("mnasnet0_5")
    models.load_state(built("mnasnet0_5", seed=1), dict(model.state_dict()))


@pytest.mark.parametrize("arch", each(ONE_OF_EACH))
def test_depths_rise_from_the_stem_to_the_classifier(arch):
    model = models.build_on_meta(Model(arch=arch), 5, ONE_OF_EACH[arch])
    head = models.head_name(model) + "."
    for coarse in (False, True):
        depths = models.depths(model, coarse)
        assert list(depths) == [n for n, _ in model.named_parameters()]
        last = max(depths.values())
        assert set(depths.values()) == set(range(last + 1)) and last >= 3
        assert {depths[n] for n in depths if n.startswith(head)} == {last}
        assert next(iter(depths.values())) == 0
    assert max(models.depths(model).values()) >= last


def test_a_resnets_depths_are_its_stem_blocks_and_classifier():
    model = models.build_on_meta(Model(arch="resnet18"), 5)
    fine, coarse = models.depths(model), models.depths(model, coarse=True)
    assert (fine["conv1.weight"], fine["bn1.bias"]) == (0, 0)
    assert (fine["layer1.0.conv1.weight"], fine["layer4.1.bn2.weight"]) == (1, 8)
    assert (fine["fc.weight"], coarse["layer4.0.conv1.weight"], coarse["fc.bias"]) == (9, 4, 5)


def test_the_backbone_thaws_a_stage_at_a_time_from_its_end():
    cfg = Model(arch="resnet18", freeze_epochs=1, unfreeze_every=2)
    model = models.build_on_meta(cfg, 5)
    names = {n for n, _ in model.named_parameters()}
    seen = []
    for epoch in range(11):
        trained = models.trained_parameters(model, cfg, epoch)
        parts = {n.split(".")[0] for n in (names if trained is None else trained)}
        seen.append(len(parts))
    # fc; then layer4, layer3, layer2, layer1 for two epochs each; then the stem (conv1, bn1) too
    assert seen == [1, 2, 2, 3, 3, 4, 4, 5, 5, 7, 7]
    assert models.trained_parameters(model, Model(arch="resnet18", freeze_epochs=2), 2) is None


def test_batchnorm_of_thawed_stages_trains_and_of_frozen_ones_does_not():
    cfg = Model(arch="resnet18", unfreeze_every=1)
    model = models.build(cfg, 5).train()
    models.freeze(model, models.trained_parameters(model, cfg, 0))
    assert model.layer4[0].bn1.training and not model.layer3[0].bn1.training
    assert model.layer4[0].conv1.weight.requires_grad
    assert not model.layer3[0].conv1.weight.requires_grad and not model.bn1.training


def test_unfreezing_what_stays_frozen_is_refused():
    with pytest.raises(ConfigError, match=r"model.unfreeze_every = 1: it would do nothing"):
        Model(freeze_epochs=-1, unfreeze_every=1)
