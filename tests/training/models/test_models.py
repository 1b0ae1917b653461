"""What every source of models must do, whichever library it is: the functions of
`ftlib.training.models` over the protocol in `models.source`."""

import pytest
import torch
from torch import nn

from ftlib.config import Model
from ftlib.settings import ConfigError
from ftlib.training import models

SIZES = {
    "resnet18": 32,
    "mobilenet_v3_small": 32,
    "timm/resnet10t": 32,
    "timm/convnext_atto": 32,
    "timm/vit_tiny_patch16_224": 32,
}
each = pytest.mark.parametrize("arch", SIZES)


def built(arch, classes=5, seed=0, **settings):
    torch.manual_seed(seed)
    return models.build(Model(arch=arch, **settings), classes, SIZES[arch])


def pictures(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@each
def test_the_same_seed_makes_the_same_model(arch):
    a, b, c = built(arch), built(arch), built(arch, seed=1)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not all(torch.equal(v, c.state_dict()[k]) for k, v in a.state_dict().items())


@each
def test_logits_have_a_column_per_class_and_come_from_the_head(arch):
    model = built(arch, 7).eval()
    seen = []
    hook = models.head(model).register_forward_hook(lambda m, i, out: seen.append(out.flatten(1)))
    with torch.no_grad():
        logits = model(pictures())
    hook.remove()
    assert logits.shape == (2, 7) and torch.equal(seen[0], logits)
    assert models.head_rows(model, model.state_dict()) == 7


@each
def test_a_model_on_meta_has_the_same_shapes_and_draws_nothing(arch):
    before = torch.get_rng_state()
    meta = models.build_on_meta(Model(arch=arch), 5, SIZES[arch])
    assert torch.equal(before, torch.get_rng_state())
    assert {k: v.shape for k, v in meta.state_dict().items()} == {
        k: v.shape for k, v in built(arch).state_dict().items()
    }


@each
def test_weights_come_back_and_a_new_head_is_the_models_own(arch):
    cfg, old = Model(arch=arch), built(arch, 5)
    same = built(arch, 5, seed=1)
    models.load_state(same, models.fit_state(same, cfg, SIZES[arch], old.state_dict()))
    assert all(torch.equal(v, old.state_dict()[k]) for k, v in same.state_dict().items())

    other = built(arch, 9, seed=1)
    fresh = {k: v.clone() for k, v in models.head(other).state_dict().items()}
    state = old.state_dict()
    models.load_state(other, models.fit_state(other, cfg, SIZES[arch], state, new_head=True))
    assert all(torch.equal(v, fresh[k]) for k, v in models.head(other).state_dict().items())
    backbone = models.backbone_parameters(other)
    assert all(torch.equal(v, state[k]) for k, v in other.named_parameters() if k in backbone)
    with pytest.raises(ValueError, match="the model's is"):
        models.fit_state(other, cfg, SIZES[arch], state)


@each
def test_a_frozen_backbone_leaves_only_the_classifier_to_train(arch):
    model = built(arch).train()
    models.freeze_backbone(model, True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(model.named_parameters())} - models.backbone_parameters(
        model
    )
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert not any(m.training for m in norms)
    models.freeze_backbone(model, False)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in norms)


@each
def test_depths_name_every_parameter_and_stages_are_fewer(arch):
    model = models.build_on_meta(Model(arch=arch), 5, SIZES[arch])
    fine, coarse = models.depths(model), models.depths(model, coarse=True)
    names = {n for n, _ in model.named_parameters()}
    assert set(fine) == set(coarse) == names
    assert max(coarse.values()) <= max(fine.values())


@each
def test_published_weights_are_named_with_their_preprocessing(arch):
    known = models.pretrained(arch)
    assert bool(known.url) != bool(known.repo) and known.classes == 1000
    assert 0 < known.preprocessing.crop <= 1 and known.preprocessing.size >= 64


def test_both_libraries_names_are_listed_once():
    names = models.architectures()
    assert len(names) == len(set(names)) > 1000
    assert {"resnet50", "timm/convnext_atto"} <= set(names)


@pytest.mark.parametrize("arch", ["resnet1", "timm/resnet1", "keras/resnet"])
def test_an_unknown_name_is_refused(arch):
    with pytest.raises(ConfigError, match="has no such classifier"):
        models.check(Model(arch=arch), 32)
