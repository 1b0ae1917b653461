"""timm's classifiers as ftlib builds them: the same numbers as timm's own, and settings that act or
are refused."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from ftlib.config import Model
from ftlib.settings import ConfigError
from ftlib.training import models
from ftlib.training.models.timm import SOURCE

FAMILIES = {
    "resnet10t": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 64,
    "tf_efficientnet_lite0": 64,
    "swin_tiny_patch4_window7_224": 112,
    "mixer_s32_224": 64,
}
"""Name -> picture side in pixels."""
LARGE = {"swin_tiny_patch4_window7_224", "mixer_s32_224"}


def each(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in names]


def built(name, classes=5, size=None, seed=0, **settings):
    torch.manual_seed(seed)
    cfg = Model(arch=f"timm/{name}", **settings)
    return models.build(cfg, classes, size or FAMILIES[name])


def pictures(size, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", each(FAMILIES))
def test_logits_are_timms_own_and_so_are_the_keys(name):
    size = FAMILIES[name]
    ours = built(name).eval()
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    theirs = timm.create_model(name, num_classes=5, **({"img_size": size} if fixed else {}))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pictures(size)), theirs.eval()(pictures(size)), rtol=1e-5, atol=1e-5
        )
    head = models.head(ours)
    assert head is ours.get_classifier() and head.weight.shape[0] == 5
    names = {n for n, _ in ours.named_parameters()}
    inside = {f"{models.head_name(ours)}.{n}" for n, _ in head.named_parameters()}
    assert inside == names - models.backbone_parameters(ours)


def test_weights_of_another_size_are_fitted_as_timm_fits_them(tmp_path):
    """Position embeddings interpolated, the classifier dropped: against timm's own loader."""
    torch.manual_seed(3)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    expected = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "w.pth"), "num_classes": 7},
        num_classes=5,
        img_size=96,
    )
    cfg = Model(arch="timm/vit_tiny_patch16_224")
    model = built("vit_tiny_patch16_224", size=96)
    found = models.fit_state(model, cfg, 96, theirs.state_dict(), new_head=True)
    assert set(found) == set(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert key.startswith("head.") or torch.equal(found[key], value), key


def test_weights_that_do_not_fit_say_what_is_wrong():
    cfg = Model(arch="timm/resnet10t")
    model = built("resnet10t")
    state = dict(model.state_dict())
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="layer1.0.conv1.weight"):
        models.fit_state(model, cfg, 64, state)


# --- settings that act or are refused -------------------------------------------------------------


@pytest.mark.parametrize("name", each(FAMILIES))
def test_dropout_acts_where_it_is_accepted(name):
    """In training the logits change from one draw to the next, and not without it."""
    size = FAMILIES[name]
    for settings, differs in (({}, False), ({"dropout": 0.5}, True)):
        model = built(name, **settings)
        for m in model.modules():  # BatchNorm and zero-initialized branches would hide or add noise
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
        nn.init.normal_(models.head(model).weight)
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.train()
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
            with torch.no_grad():
                outputs.append(model(pictures(size)))
        assert torch.equal(*outputs) != differs


def test_drop_path_is_the_last_blocks_probability():
    model = built("convnext_atto", drop_path=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
    assert not [m for m in built("convnext_atto").modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
@pytest.mark.parametrize("where", ["both", "blocks", "head"])
def test_a_timm_resnet_drops_channels_in_its_blocks(name, where):
    model = built(name, size=32, dropout=0.25, dropout_in=where, drop_path=0.1)
    inside = [m for m in model.modules() if isinstance(m, nn.Dropout2d)]
    assert len(inside) == (8 if where != "head" else 0)
    assert all(m.p == 0.25 for m in inside)
    assert model.drop_rate == (0.25 if where != "blocks" else 0.0)
    assert set(model.state_dict()) == set(timm.create_model(name, num_classes=5).state_dict())
    model.train()
    model(pictures(32)).sum().backward()


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("resnett18", {}, r"timm has no such classifier. Did you mean timm/resnet18\?"),
        ("resnet18.nothing", {}, "no weights of that name. There are a1_in1k"),
        ("vgg11", {"drop_path": 0.1}, "drop_path = 0.1: it cannot act"),
        ("convnext_atto", {"dropout": 0.1, "dropout_in": "blocks"}, "only ResNets"),
    ],
)
def test_what_cannot_act_is_refused(name, settings, words):
    with pytest.raises(ConfigError, match=words):
        models.check(Model(arch=f"timm/{name}", **settings), 224)


@pytest.mark.parametrize(
    "name, size, works",
    [("vit_tiny_patch16_224", 70, "64 or 80"), ("vgg11", 9, "32")],
)
def test_a_size_that_cannot_work_is_refused_with_those_that_do(name, size, works):
    with pytest.raises(ConfigError, match=rf"augment.size = {size}.*Set it to {works}$"):
        models.check(Model(arch=f"timm/{name}"), size)


def test_a_fixed_size_model_is_evaluated_at_its_training_size():
    models.check(Model(arch="timm/vit_tiny_patch16_224"), 64, 64)
    with pytest.raises(ConfigError, match=r"evaluate.size = 96.*Set evaluate.size to 0"):
        models.check(Model(arch="timm/vit_tiny_patch16_224"), 64, 96)
    models.check(Model(arch="timm/resnet10t"), 64, 96)


# --- depths and dependence ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_depths_end_in_the_classifier(name):
    model = models.build_on_meta(Model(arch=f"timm/{name}"), 5, FAMILIES[name])
    depths = models.depths(model)
    last = max(depths.values())
    head = models.head_name(model) + "."
    assert set(depths.values()) == set(range(last + 1)) and last >= 5
    assert {depths[n] for n in depths if n.startswith(head)} == {last}


def test_stochastic_depth_and_batchnorm_make_images_depend_on_each_other():
    """So that out-of-memory splitting leaves such models alone."""
    name = "convnext_atto"
    assert models.is_batch_independent(built(name))
    assert not models.is_batch_independent(built(name, drop_path=0.1))
    assert not models.is_batch_independent(built(name, dropout=0.1))
    assert not models.is_batch_independent(built("resnet10t"))
    model = built(name)
    x = pictures(64)
    with torch.no_grad():
        whole = model.train()(x)
        parts = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_published_weights_say_how_they_expect_their_images():
    known = models.pretrained("timm/tf_efficientnet_lite0")
    assert known.repo == "timm/tf_efficientnet_lite0.in1k" and known.classes == 1000
    assert known.preprocessing.mean == (0.5, 0.5, 0.5)
    assert (known.preprocessing.crop, known.preprocessing.interpolation) == (0.875, "bicubic")
    tagged = models.pretrained("timm/resnet18.a1_in1k")
    assert tagged.name == "resnet18.a1_in1k"


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models()[::25])
def test_a_sample_of_all_architectures_builds(name):
    """Every 25th name: it builds on the meta device, has a head and depths."""
    size = (
        SOURCE.pretrained(f"timm/{name}").preprocessing.size
        if timm.is_model_pretrained(name)
        else 224
    )
    model = models.build_on_meta(Model(arch=f"timm/{name}"), 7, size)
    assert models.head(model).weight.shape[0] == 7
    assert max(models.depths(model).values()) >= 1
    models.is_batch_independent(model)
