"""The words that turn one recipe into another. What flags do: tests/test_cli.py."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from ftlib import cli, flags, recipes
from ftlib.cli import parse
from ftlib.config import SGD, Focal, OneCycle
from ftlib.flags import words_for
from ftlib.settings import override

PHASE2 = recipes.load("phase2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"mix.mixup_alpha": 0.4}, ["--mix.mixup-alpha", "0.4"]),
        ({"train.channels_last": False}, ["--train.no-channels-last"]),
        ({"augment.crop_scale": (0.2, 0.9)}, ["--augment.crop-scale", "0.2", "0.9"]),
        ({"gates.force": "two words"}, ["--gates.force", "two words"]),
        ({"optimizer": SGD(lr=0.3)}, ["--optimizer", "sgd", "--optimizer.lr", "0.3"]),
    ],
)
def test_the_words_say_what_differs(changes, words):
    assert words_for(PHASE2, override(PHASE2, changes)) == words


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": Focal(gamma=1.5), "schedule": OneCycle(), "optimizer": SGD(lr=1e-7)},
        {"optimizer.lr": 3e-05, "train.clip_norm": 0.1 + 0.2, "seed": 2**40},
        {"augment.randaugment_ops": ("Rotate", "Solarize")},
        {"augment.randaugment_ops": ()},
        {"cluster.strict_elastic": True, "data.path": "s3://bucket/a b"},
    ],
)
def test_the_words_read_back_as_the_recipe(changes):
    changed = override(PHASE2, changes)
    assert parse(PHASE2, words_for(PHASE2, changed)) == changed


@pytest.mark.parametrize("name", [n for n in recipes.available() if n.startswith("sample-")])
def test_the_words_turn_a_recipe_into_the_sample_s(name):
    base, sample = recipes.load(name.removeprefix(recipes.SAMPLE)), recipes.load(name)
    assert parse(base, words_for(base, sample)) == sample


def test_help_lists_the_common_options_first_and_every_option_once(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Options(cli.ResultOptions):
        rare: int = 1
        usual: Annotated[int, flags.Common] = 2

    with pytest.raises(SystemExit):
        cli.options(Options, "About.", ["--help"])
    text = capsys.readouterr().out
    headings = [text.index(s) for s in ("used most:", "--usual", "more options:", "--rare")]
    assert headings == sorted(headings)
    assert text.count("--usual") == text.count("--rare") == 1
