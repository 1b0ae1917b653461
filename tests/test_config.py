"""Every kind of loss, optimizer and schedule works from the command line to the training loop.

A kind that was added to a union of ftlib.config but forgotten in one place fails here.
"""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from ftlib import config
from ftlib.cli import parse
from ftlib.config import Run
from ftlib.settings import Settings, flat, from_json, hints, override, to_json

KINDS = [
    (union, kind)
    for union, members in (
        ("loss", get_args(config.Loss)),
        ("optimizer", get_args(config.Optimizer)),
        ("schedule", get_args(config.Schedule)),
    )
    for kind in members
]
IDS = [kind.__name__ for _, kind in KINDS]


@pytest.mark.parametrize(("union", "kind"), KINDS, ids=IDS)
def test_a_kind_can_be_chosen_and_read_back(union, kind):
    run = parse(Run(), [f"--{union}", kind.__name__.lower()])
    assert getattr(run, union) == kind()
    assert from_json(Run, to_json(run)) == run
    assert kind.section == union


@pytest.mark.parametrize("kind", get_args(config.Loss))
def test_a_loss_is_computed(kind):
    import torch

    from ftlib.training.losses import build, soft_targets

    values = build(kind())(torch.randn(4, 3), soft_targets(torch.tensor([0, 1, 2, 0]), 3))
    assert values.shape == (4,) and bool((values > 0).all())


@pytest.mark.parametrize("kind", get_args(config.Optimizer))
def test_an_optimizer_is_built_and_its_checkpoint_has_the_size_that_is_planned(kind):
    """`state_copies` counts the weights and all that the optimizer keeps beside them."""
    import torch

    from ftlib.training import optim

    model = torch.nn.Linear(100, 100, bias=False)
    optimizer = optim.build(kind(), model, "cpu")
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    kept = sum(
        value.numel()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    assert 10_000 + kept == 10_000 * kind.state_copies


@pytest.mark.parametrize("kind", get_args(config.Schedule))
def test_a_schedule_has_a_rate_for_every_step(kind):
    from ftlib.training.schedule import learning_rate

    rates = [learning_rate(kind(), 0.1, step, 20, 10) for step in range(20)]
    assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0


def test_every_optimizer_has_what_parameter_groups_and_tracking_read():
    for kind in get_args(config.Optimizer):
        assert {"lr", "weight_decay", "decay_norm_and_bias"} <= set(hints(kind))


def test_every_path_outside_the_fingerprint_is_a_setting():
    known = set(flat(Run())) | set(hints(Run))
    assert set(config.NOT_IN_FINGERPRINT) <= known


def test_every_field_and_section_says_what_it_is():
    """The docstring under a field is its help; a field that only changes a default inherits it."""
    tree = ast.parse(Path(config.__file__).read_text())
    documented: dict[str, set[str]] = {}
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        documented[node.name] = {
            ast.unparse(field.target)
            for field, after in zip(node.body, [*node.body[1:], None])
            if isinstance(field, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        }
    for name, kind in vars(config).items():
        if not (isinstance(kind, type) and issubclass(kind, Settings) and kind is not Settings):
            continue
        said = set().union(*(documented.get(c.__name__, set()) for c in kind.__mro__))
        plain = {f for f in hints(kind) if not isinstance(getattr(kind(), f), Settings)}
        assert plain <= said, f"{name}: {plain - said} have no docstring"
        assert kind.__doc__ and not kind.__doc__.startswith(f"{name}("), f"{name} has no docstring"


def test_help_texts_are_sentences():
    texts = re.findall(r'^    """(.+?)"""$', Path(config.__file__).read_text(), re.M | re.S)
    for text in texts:
        assert text.rstrip().endswith((".", "!")), text


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "SGD"}, {"loss": "Focal", "loss.label_smoothing": 0.2}, {"schedule": "Step"}],
)
def test_shared_fields_stay_settable_by_their_path(changes):
    assert override(Run(), changes) != Run()


def test_a_recipe_of_an_earlier_version_reads_and_keeps_its_fingerprint():
    """Settings that were added since stand at their defaults, and make no other run of it."""
    from ftlib.launch.run_record import fingerprint

    run = from_json(Run, (Path(__file__).parent / "assets" / "phase2-2026-11.json").read_text())
    expected = "58c09fd59fb8f10f8327188ac64fe47168f8cb69cc883a6e5ed08cf6bff43f99"
    assert run.stage == "phase2" and run.mix.mixup_alpha == 0.2
    assert fingerprint(run, "0" * 64, "1" * 64) == expected
