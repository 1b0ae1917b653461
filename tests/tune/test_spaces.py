import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune

from ftlib.config import Augment, Cosine, Data, Mix, Model, OneCycle, Run, Train
from ftlib.paths import space_names
from ftlib.settings import ConfigError, differences, flat
from ftlib.tune import spaces
from ftlib.tune.spaces import KEEP, When

ROOT = Path(__file__).resolve().parents[2]
PHASE2 = Run(
    data=Data(path="x"),
    augment=Augment(randaugment_n=2, randaugment_m=9),
    mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0),
    model=Model(dropout=0.02),
    train=Train(epochs=9),
)


@pytest.mark.parametrize("name", space_names())
def test_every_space_loads_and_its_values_survive_a_recipe(name):
    space = spaces.load(name)
    assert space.purpose and space.axes
    spaces.check(space, PHASE2)
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = spaces.choose(space, lambda axis: axis.draw(rng))
        run = spaces.apply(PHASE2, {**space.constants, **values})
        back = spaces.own_values(space, run)
        assert all(back[p] == v for p, v in values.items())
        assert all(space.axis(p).holds(v) for p, v in spaces.searched(space, values).items())
    own = spaces.own_values(space, PHASE2)
    assert spaces.apply(PHASE2, own) == PHASE2


def test_the_documented_spaces_exist():
    documented = {"regularisation", "augmentation", "optimisation", "quick", "finetuning"}
    assert documented <= set(space_names())
    assert set(spaces.load("regularisation").describe()) == {
        "model.dropout",
        "mix.mixup_alpha",
        "mix.cutmix_alpha",
        "augment.randaugment_m",
    }


def test_unknown_space_names_the_nearest_and_all():
    with pytest.raises(
        ConfigError,
        match=r"Did you mean regularisation\? There are: augmentation, .*quick, regularisation",
    ):
        spaces.load("regularization")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"model.dropuot": tune.uniform(0, 0.1)},
            r"unknown setting model.dropuot. Did you mean model.dropout\?",
        ),
        ({"mixup_alpha": tune.uniform(0, 0.1)}, r"Did you mean mix.mixup_alpha\?"),
        (
            {"model.dropout": tune.uniform(0, 1)},
            "model.dropout = 1.0: must be at least 0 and below 1",
        ),
        ({"train.epochs": tune.uniform(1, 9.5)}, "train.epochs = 9.5: needs a whole number"),
        (
            {"model.dropout_in": tune.choice(["both", "heads"])},
            "needs one of both, blocks, head. Did you mean head",
        ),
        (
            {"optimizer": tune.choice(["AdamW", "Newton"])},
            "optimizer = 'Newton': needs one of AdamW, Adam, SGD, RMSprop",
        ),
        (
            {"augment.crop_scale[2]": tune.uniform(0, 1)},
            "augment.crop_scale has 2 entries, counted from 0",
        ),
        ({"model.dropout[0]": tune.uniform(0, 1)}, "model.dropout has one value, no list"),
        ({"optimizer.lr": tune.randn(0, 1)}, "When"),
        ({"optimizer.lr": tune.sample_from(lambda s: 1)}, "When"),
        ({"optimizer.lr": tune.uniform(0, 0.1)}, "optimizer.lr = 0.0: must be above 0"),
        ({"model.dropout": 0.1}, "it varies nothing"),
        ({"model.dropout": When(0.1, given=lambda v: True)}, "When needs a Ray Tune domain"),
    ],
)
def test_bad_spaces_are_refused_with_the_remedy(space, message):
    with pytest.raises(ConfigError, match=message):
        spaces.build("s", space)


def test_points_are_checked():
    space = {"model.dropout": tune.uniform(0, 0.1)}
    with pytest.raises(ConfigError, match=r"POINTS has model.droput.*Did you mean model.dropout\?"):
        spaces.build("s", space, [{"model.droput": 0.1}])
    with pytest.raises(ConfigError, match="outside its range"):
        spaces.build("s", space, [{"model.dropout": 0.2}])


def test_impossible_combinations_are_found_before_a_trial_runs():
    space = spaces.build("s", {"augment.randaugment_m": tune.uniform(1, 10)})
    with pytest.raises(
        ConfigError,
        match=r"space s asks for impossible values.*Set augment.randaugment_n to 1, 2 or 3"
        r"(.|\n)*Tried: augment.randaugment_m =",
    ):
        spaces.check(space, Run())
    spaces.check(space, PHASE2)


def test_a_file_outside_the_folder_works_and_needs_space(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Mine."""\nfrom ray import tune\n'
        'SPACE = {"model.dropout": tune.uniform(0, .1), "seed": 7}\n'
    )
    space = spaces.load(str(file))
    assert (space.name, space.purpose, space.constants) == ("mine", "Mine.", {"seed": 7})
    file.write_text("SPAEC = {}")
    with pytest.raises(ConfigError, match="a space needs SPACE"):
        spaces.load(str(file))


def test_a_setting_is_searched_only_where_its_condition_holds():
    space = spaces.build(
        "s",
        {
            "augment.randaugment_n": tune.randint(0, 3),
            "augment.randaugment_m": When(
                tune.uniform(1, 10), given=lambda v: v["augment.randaugment_n"] > 0, otherwise=0.0
            ),
            "augment.randaugment_p": When(
                tune.uniform(0.2, 1), given=lambda v: v["augment.randaugment_n"] > 0
            ),
        },
    )
    assert space.axes[2].default is KEEP
    off = spaces.choose(
        space, lambda axis: 0 if axis.path.endswith("_n") else pytest.fail("asked for what is off")
    )
    assert off == {"augment.randaugment_n": 0, "augment.randaugment_m": 0.0}
    assert spaces.searched(space, off) == {"augment.randaugment_n": 0}
    assert spaces.apply(PHASE2, off).augment.randaugment_p == PHASE2.augment.randaugment_p


def test_what_only_qualifies_a_switched_off_part_goes_back_to_neutral():
    run = spaces.apply(
        Run(mix=Mix(mixup_alpha=0.2, off_epochs=2), model=Model(dropout=0.1, dropout_in="head")),
        {"mix.mixup_alpha": 0.0, "model.dropout": 0.0},
    )
    assert run.mix.off_epochs == 0 and run.model.dropout_in == "both"
    assert (
        spaces.apply(
            Run(mix=Mix(mixup_alpha=0.2, off_epochs=2)), {"model.dropout": 0.1}
        ).mix.off_epochs
        == 2
    )


def test_choosing_the_kind_that_is_there_keeps_its_settings():
    run = Run(schedule=Cosine(min_lr=1e-5))
    assert spaces.apply(run, {"schedule": "Cosine"}) == run
    assert spaces.apply(run, {"schedule": "OneCycle"}).schedule == OneCycle()
    assert set(
        differences(run, spaces.apply(run, {"schedule": "Cosine", "schedule.warmup_epochs": 2}))
    ) == {"schedule.warmup_epochs"}


def test_the_ends_of_ranges_are_those_of_ray():
    build = lambda domain: spaces.build("s", {"train.epochs": domain}).axes[0]  # noqa: E731
    assert build(tune.randint(1, 4)).grid(9) == [1, 2, 3]
    assert build(tune.qrandint(2, 6, 2)).grid(9) == [2, 4, 6]
    assert build(tune.choice([5, 3])).grid(9) == [5, 3]
    lr = spaces.build("s", {"optimizer.lr": tune.loguniform(1e-4, 1e-2)}).axes[0]
    assert lr.grid(3) == pytest.approx([1e-4, 1e-3, 1e-2])


DOMAINS = st.one_of(
    st.tuples(st.floats(1e-4, 1), st.floats(1e-3, 10)).map(
        lambda t: tune.uniform(t[0], t[0] + t[1])
    ),
    st.tuples(st.floats(1e-6, 1), st.floats(1.5, 1e4)).map(
        lambda t: tune.loguniform(t[0], t[0] * t[1])
    ),
    st.tuples(st.integers(0, 5), st.integers(1, 20), st.sampled_from([0.05, 0.1, 0.25])).map(
        lambda t: tune.quniform(t[0], t[0] + t[1] * t[2], t[2])
    ),
)


@settings(max_examples=150, deadline=None)
@given(domain=DOMAINS, seed=st.integers(0, 2**32 - 1))
def test_draws_and_grids_stay_within_the_axis(domain, seed):
    axis = spaces._axis("mix.mixup_alpha", domain, None)
    rng = np.random.default_rng(seed)
    for value in [axis.draw(rng) for _ in range(20)] + axis.grid(5):
        assert axis.low - 1e-9 <= value <= axis.high + 1e-9
        assert axis.cast(value) == value
    grid = axis.grid(5)
    assert grid == sorted(set(grid)) and len(grid) <= 5


def test_grid_lists_every_combination_once():
    space = spaces.build(
        "s",
        {
            "augment.randaugment_n": tune.choice([0, 2]),
            "augment.randaugment_m": When(
                tune.choice([3.0, 9.0]), given=lambda v: v["augment.randaugment_n"], otherwise=0.0
            ),
        },
    )
    assert [tuple(v.values()) for v in spaces.grid(space, 3)] == [(0, 0.0), (2, 3.0), (2, 9.0)]


def test_known_paths_cover_every_leaf_of_every_kind():
    known = spaces.known_paths()
    assert set(flat(Run())) <= set(known)
    assert {"optimizer.momentum", "schedule.peak", "loss.gamma"} <= set(known)


def test_the_docs_list_every_space_once():
    text = (ROOT / "docs" / "search.md").read_text()
    table = text[text.index("## Spaces") : text.index("A space of your own")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == space_names()
