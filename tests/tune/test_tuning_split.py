from dataclasses import replace

import numpy as np
import pytest

from ftlib.config import Data
from ftlib.data import sampler
from ftlib.settings import ConfigError
from ftlib.tune import tuning_split
from ftlib.tune.train_trial import SweepInputs

LABELS = np.repeat(np.arange(10), 144)


def inputs(*seen_by: Data, labels=LABELS):
    """What a sweep knows, when its starting weights were trained on the rows of `seen_by`."""
    seen = np.zeros(len(labels), bool)
    for data in seen_by:
        seen[sampler.run_rows(labels, data)[0]] = True
    return SweepInputs("digits", "d", labels, seen, "/runs/phase1/best/x", seen_by=("phase1",))


def rows(data, split):
    changed = replace(data, tuning_source=split.source, tuning_fraction=split.fraction)
    return sampler.run_rows(LABELS, changed)


def test_a_subset_leaves_a_reserve_and_trials_train_on_the_whole_subset():
    phase1 = Data(subset=0.2)
    split = tuning_split.choose(Data(subset=0.2), inputs(phase1))
    assert (split.source, split.fraction, split.seen) == ("reserve", 0.1, 0)
    train, tuning = rows(Data(subset=0.2), split)
    assert len(tuning) == split.images == 140
    assert np.array_equal(train, sampler.subset(LABELS, 0.2, 42))
    assert not set(tuning) & set(sampler.subset(LABELS, 0.9, 42))


def test_phase_3_gives_up_the_reserve_that_the_phases_before_left():
    split = tuning_split.choose(Data(subset=1.0), inputs(Data(subset=0.2)))
    train, tuning = rows(Data(subset=1.0), split)
    assert split.source == "reserve" and len(train) + len(tuning) == len(LABELS)
    assert not set(train) & set(tuning)


def test_large_sets_take_no_more_than_a_tenth_of_the_subset():
    labels = np.repeat(np.arange(1000), 1281)
    split = tuning_split.choose(Data(subset=0.2), inputs(Data(subset=0.2), labels=labels))
    assert split.fraction == 0.02 and split.images == 26_000


def test_a_small_reserve_is_used_as_far_as_it_goes():
    split = tuning_split.choose(Data(), inputs(Data(subset=0.95)))
    assert split.source == "reserve" and 0.02 <= split.fraction < 0.1
    assert split.images > 0 and split.seen == 0


def test_weights_that_left_the_same_tuning_split_aside_are_accepted():
    phase1 = Data(tuning_fraction=0.1)
    split = tuning_split.choose(Data(), inputs(phase1))
    assert (split.source, split.fraction) == ("subset", 0.1)


def test_weights_that_have_seen_everything_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"of the 140 training images .*\(phase1\) have seen 140"):
        tuning_split.choose(Data(), inputs(Data()))
    with pytest.raises(ConfigError, match=r"--data.subset 0.9.*model.init_from=scratch"):
        tuning_split.choose(Data(), inputs(Data()), 0.2)
    with pytest.raises(ConfigError, match="have seen"):
        tuning_split.choose(Data(tuning_fraction=0.3), inputs(Data()))


def test_a_reserve_under_another_seed_is_no_reserve():
    with pytest.raises(ConfigError, match="have seen"):
        tuning_split.choose(Data(subset_seed=1), inputs(Data(subset=0.9, subset_seed=2)))


def test_weights_from_elsewhere_have_seen_nothing():
    split = tuning_split.choose(Data(), inputs())
    assert (split.source, split.fraction, split.images) == ("reserve", 0.1, 140)


def test_fractions_are_checked():
    for fraction in (0.6, -1):
        with pytest.raises(ConfigError, match="between 0 and 0.5"):
            tuning_split.choose(Data(), inputs(), fraction)


def test_weights_whose_images_are_not_known_are_named():
    split = tuning_split.choose(Data(), inputs())
    assert "that no weights have seen;" in tuning_split.describe(split)
    assert "what timm:resnet18 saw is not known" in tuning_split.describe(split, ["timm:resnet18"])


def test_a_sweep_says_how_far_its_scores_are_off():
    few = tuning_split.TuningSplit("reserve", 0.1, images=100, seen=0)
    assert "standard error of up to 5.0 points" in tuning_split.describe(few)
    assert "--tuning-fraction takes more images" in tuning_split.describe(few)
    many = tuning_split.TuningSplit("reserve", 0.1, images=10_000, seen=0)
    assert tuning_split.describe(many).endswith("standard error of up to 0.5 points")
