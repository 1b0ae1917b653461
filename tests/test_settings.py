"""Checked settings: JSON both ways, overrides, fingerprints, and hostile input."""

import dataclasses
import subprocess
import sys
from typing import Annotated

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib import settings
from ftlib.config import (
    BCE,
    SGD,
    AdamW,
    Constant,
    Cosine,
    Focal,
    Gates,
    OneCycle,
    Plateau,
    Run,
    Step,
)
from ftlib.settings import (
    ConfigError,
    fingerprint,
    flat,
    from_dict,
    from_json,
    override,
    to_dict,
    to_json,
)

RUN = Run()


def numeric_leaves():
    return [p for p, v in flat(RUN).items() if isinstance(v, float) and not isinstance(v, bool)]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "mix.mixup_alpha": st.floats(0, 100),
            "model.dropout": st.floats(0, 0.99),
            "train.epochs": st.integers(1, 10**6),
            "optimizer": st.sampled_from(["SGD", "AdamW", "adam", "rmsprop"]),
            "schedule": st.sampled_from(["one_cycle", "Cosine", "plateau", "Step", "constant"]),
            "loss": st.sampled_from(["cross_entropy", "NLL", "bce", "focal"]),
            "data.path": st.text(
                st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
            ),
            "augment.crop_scale": st.just([0.1, 0.9]),
        },
    )
)
def test_every_tree_survives_json_and_overrides_hit_only_their_leaf(changes):
    run = override(RUN, changes)
    assert from_json(Run, to_json(run)) == run
    assert hash(fingerprint(run)) == hash(fingerprint(from_json(Run, to_json(run))))
    touched = {p for p in settings.differences(RUN, run)}
    assert all(any(t == c or t.startswith(c + ".") for c in changes) for t in touched)


def test_a_run_is_frozen_and_leaves_the_original_alone():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUN.seed = 1
    assert override(RUN, {"seed": 7}).seed == 7 and RUN.seed == 42


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mix.mixup_alhpa": 1}, ["mix.mixup_alhpa", "mixup_alpha"]),
        ({"mixup_alpha": 1}, ["mixup_alpha", "mix.mixup_alpha"]),
        (
            {"augment.randaugment_m": 12, "augment.randaugment_n": 2},
            ["augment.randaugment_m = 12", "at most 10"],
        ),
        ({"augment.randaugment_m": 5}, ["would do nothing", "randaugment_n"]),
        ({"train.batch_size": 100}, ["train.batch_size = 100", "not a multiple", "96"]),
        ({"cluster.workers": "8"}, ["more workers than microbatches", "4"]),
        ({"cluster.workers": "4:2"}, ["upside down", "2:4"]),
        ({"optimizer": "adamv"}, ["AdamW", "Did you mean"]),
        ({"augment.flip": "x"}, ["augment.flip", "needs a number"]),
        ({"model.dropout": float("nan")}, ["model.dropout", "finite"]),
        ({"train.epochs": 1.5}, ["train.epochs = 1.5", "whole number"]),
        ({"train.compile": 1}, ["true or false"]),
        ({"train.precision": "bf61"}, ["bf16", "fp32"]),
        ({"data.std": [1, 1]}, ["needs 3 values"]),
        ({"mix.off_epochs": 2}, ["would do nothing because mixing is off"]),
        ({"name": "../x"}, ["name", "letters"]),
        ({"schedule": {"type": "Cosine", "warmup": 1}}, ["schedule.warmup", "warmup_epochs"]),
        ({"train.epochs.x": 1}, ["single value"]),
    ],
)
def test_bad_settings_name_the_field_the_value_and_the_remedy(changes, words):
    with pytest.raises(ConfigError) as error:
        override(RUN, changes)
    for word in words:
        assert word in str(error.value)


def test_numbers_from_samplers_become_plain_ones():
    run = override(
        RUN, {"mix.mixup_alpha": np.float64(0.25), "train.epochs": np.int64(3), "model.dropout": 0}
    )
    assert (
        type(run.mix.mixup_alpha) is float
        and type(run.train.epochs) is int
        and type(run.model.dropout) is float
    )
    from_json(Run, to_json(run))


def test_a_member_of_a_union_can_be_replaced_whole_and_then_set():
    run = override(
        RUN,
        {
            "optimizer": "SGD",
            "optimizer.lr": 1,
            "schedule": Plateau(patience=2),
            "loss": {"type": "Focal", "gamma": 1},
        },
    )
    assert (
        run.optimizer == SGD(lr=1.0)
        and run.schedule == Plateau(patience=2)
        and run.loss == Focal(gamma=1.0)
    )
    with pytest.raises(ConfigError, match="momentum"):
        override(
            RUN, {"optimizer.momentum": 0.5}
        )  # AdamW has none: never silently another optimizer


def test_unknown_keys_in_a_file_are_refused_and_missing_ones_take_defaults():
    assert from_dict(Run, {}) == RUN
    with pytest.raises(ConfigError, match="augment.sise"):
        from_dict(Run, {"augment": {"sise": 3}})
    with pytest.raises(ConfigError, match="line 1"):
        from_json(Run, "{nonsense")
    with pytest.raises(ConfigError, match="object"):
        from_json(Run, "[]")


def test_the_fingerprint_follows_what_is_computed_and_nothing_else():
    from ftlib.config import NOT_IN_FINGERPRINT as out

    base = fingerprint(RUN, out)
    for same in (
        {"name": "x"},
        {"cluster.workers": "2"},
        {"track.offline": True},
        {"data.loader_workers": 3},
        {"checkpoint.every_steps": 5},
    ):
        assert fingerprint(override(RUN, same), out) == base, same
    for other in (
        {"seed": 1},
        {"mix.mixup_alpha": 0.1},
        {"optimizer": "SGD"},
        {"data.subset": 0.5},
        {"train.precision": "fp32"},
    ):
        assert fingerprint(override(RUN, other), out) != base, other
    assert fingerprint(RUN, out, data="a") != fingerprint(RUN, out, data="b")


def test_config_and_command_line_import_nothing_heavy():
    code = (
        "import sys, ftlib.config, ftlib.cli;"
        "bad = {'torch','ray','mlflow','numpy','albumentations'} & set(sys.modules);"
        "sys.exit(f'imports {bad}' if bad else 0)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
    )


def test_all_members_of_the_unions_construct():
    for member in (
        BCE(),
        Focal(),
        AdamW(),
        SGD(),
        Constant(),
        Cosine(),
        OneCycle(),
        Step(),
        Plateau(),
        Gates(),
    ):
        assert settings.from_dict(type(member), to_dict(member)) == member


@pytest.mark.parametrize(
    "text",
    [
        '{"data": ' * 5000 + "1" + "}" * 5000,
        "[" * 200_000,
        '{"seed": ' + "9" * 6000 + "}",
        '{"seed": ' + "9" * 4000 + "}",
        '{"train": {"clip_norm": ' + "9" * 4000 + "}}",
        '{"' + "k" * 2_000_000 + '": 1}',
        '{"train": {"' + "k" * 2_000_000 + '": 1}}',
        '{"name": "' + "x" * 2_000_000 + '"}',
        '{"gates": {"force": "' + "x" * 2_000_000 + '"}}',
        '{"augment": {"randaugment_ops": [' + '"x",' * 200_000 + '"x"]}}',
        '{"optimizer": {"type": ["SGD"]}}',
        '{"optimizer": {"type": {"a": 1}}}',
        '{"optimizer": "' + "x" * 2_000_000 + '"}',
        '{"model": {"dropout_in": ["both"]}}',
        '{"data": {"path": "a\\u0000b"}}',
        '{"data": {"path": "\\ud800"}}',
        '{"train": {"clip_norm": NaN}}',
        '{"train": {"clip_norm": 1e999}}',
        '{"data": {"mean": [[[[1]]], 2, 3]}}',
        '{"\\u001b[31mred": 1}',
    ],
)
def test_a_hostile_recipe_is_one_short_message(text):
    """Deep nesting, huge numbers and endless texts: no traceback, and nothing is echoed whole."""
    with pytest.raises(ConfigError) as error:
        from_json(Run, text)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()


def test_no_message_has_a_password():
    with pytest.raises(ConfigError) as error:
        override(RUN, {"cluster.workers": "https://user:SEC#RET@host"})
    assert "SEC" not in str(error.value) and "RET" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Optional(settings.Settings):
    side: Annotated[int, settings.Between(8, 64)] | None = None


def test_a_value_that_may_be_none_is_checked_when_it_is_not():
    assert Optional().side is None and Optional(8.0).side == 8
    with pytest.raises(ConfigError, match="side = 7: must be at least 8"):
        Optional(7)
    assert (
        from_dict(Optional, {"side": None}) == Optional() == override(Optional(9), {"side": None})
    )
