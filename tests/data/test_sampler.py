import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedShuffleSplit

from ftlib.config import Data
from ftlib.data.sampler import (
    ShardBlocks,
    epoch_order,
    owned,
    reserve,
    run_rows,
    step_plan,
    steps_per_epoch,
    subset,
    tuning_split,
)

shapes = st.tuples(
    st.integers(2, 300), st.integers(1, 9), st.integers(1, 7)
)  # images, microbatch size, microbatches per batch


def epoch_plans(n, b, m, epoch=0, seed=42, rows=None):
    per = steps_per_epoch(n, b * m)
    return [
        step_plan(seed, epoch * per + i, np.arange(n) if rows is None else rows, b * m, b)
        for i in range(per)
    ]


def test_the_order_has_not_changed_since_it_was_recorded():
    assert epoch_order(42, 0, 10).tolist() == [8, 5, 3, 9, 1, 0, 2, 4, 7, 6]
    assert epoch_order(42, 1, 10).tolist() != epoch_order(42, 0, 10).tolist()


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.integers(0, 500))
def test_the_order_is_a_permutation(seed, epoch, n):
    assert sorted(epoch_order(seed, epoch, n)) == list(range(n))


def test_every_position_is_equally_likely():
    n, epochs = 10, 5000
    places = np.array([epoch_order(0, e, n) for e in range(epochs)])
    counts = np.array([np.bincount(places[:, i], minlength=n) for i in range(n)])
    assert (
        (counts - epochs / n) ** 2 / (epochs / n)
    ).sum() < 125  # chi-square, 81 degrees: 1 in 1000


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_an_epoch_has_every_image_once(shape):
    n, b, m = shape
    plans = epoch_plans(n, b, m)
    seen = np.concatenate([mb.rows for plan in plans for mb in plan])
    left_out = n - len(seen)
    assert len(np.unique(seen)) == len(seen)
    assert left_out == (1 if b * m > 1 and n % (b * m) == 1 else 0)


@given(shapes)
@settings(max_examples=200, deadline=None)
def test_steps_and_microbatches_have_the_documented_sizes(shape):
    n, b, m = shape
    plans = epoch_plans(n, b, m)
    for i, plan in enumerate(plans):
        sizes = [len(mb.rows) for mb in plan]
        assert [mb.index for mb in plan] == list(range(len(plan)))
        assert {(mb.step, mb.epoch, mb.images_in_step) for mb in plan} == {(i, 0, sum(sizes))}
        assert len(plan) <= m
        if i < len(plans) - 1 or n % (b * m) == 0:
            assert sizes == [b] * m
        else:
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= min(b, 2)
            assert max(sizes) <= (
                3 if b == 2 else b
            )  # three images in microbatches of two stay together


@given(shapes, st.integers(1, 7))
def test_every_microbatch_belongs_to_exactly_one_worker(shape, world):
    n, b, m = shape
    for plan in epoch_plans(n, b, m):
        parts = [owned(plan, rank, world) for rank in range(world)]
        assert sorted(mb.index for part in parts for mb in part) == list(range(len(plan)))
        assert all(mb.index % world == rank for rank, part in enumerate(parts) for mb in part)


def test_steps_continue_across_epochs():
    rows = np.arange(100, 110)
    first, second = epoch_plans(10, 2, 2, 0, rows=rows), epoch_plans(10, 2, 2, 1, rows=rows)
    assert [p[0].step for p in first + second] == [0, 1, 2, 3, 4, 5]
    assert [p[0].epoch for p in first + second] == [0, 0, 0, 1, 1, 1]
    for plans in (first, second):
        assert sorted(np.concatenate([mb.rows for p in plans for mb in p])) == rows.tolist()
    assert first[0][0].rows.tolist() != second[0][0].rows.tolist()


def test_the_plan_of_a_step_does_not_depend_on_earlier_calls():
    rows = np.arange(50)
    late = step_plan(1, 17, rows, 8, 4)
    for step in range(20):
        step_plan(1, step, rows, 8, 4)
    assert [mb.rows.tolist() for mb in late] == [
        mb.rows.tolist() for mb in step_plan(1, 17, rows, 8, 4)
    ]


def test_remainders_are_split_as_documented():
    assert [len(mb.rows) for mb in step_plan(1, 0, np.arange(33), 128, 32)] == [17, 16]
    assert [len(mb.rows) for mb in step_plan(1, 1, np.arange(131), 128, 32)] == [3]
    assert steps_per_epoch(129, 128) == 1
    assert steps_per_epoch(130, 128) == 2
    with pytest.raises(ValueError, match="needs at least 2"):
        steps_per_epoch(1, 128)


# --- blocks of shards ----------------------------------------------------------------------------


@st.composite
def sharded(draw):
    sizes = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=20)))
    rows = draw(st.integers(2, 300))
    shards = np.sort(np.random.default_rng(rows).integers(0, len(sizes), rows))
    return ShardBlocks(shards, sizes, draw(st.integers(1, 200)))


@given(sharded(), st.integers(0, 2**63 - 1), st.integers(0, 9))
def test_an_epoch_goes_through_the_shards_in_blocks_of_the_limit(blocks, seed, epoch):
    order = epoch_order(seed, epoch, len(blocks.shards), blocks)
    assert sorted(order) == list(range(len(order)))
    groups = blocks.of_epoch(seed, epoch)
    assert sorted(np.concatenate(groups)) == sorted(set(blocks.shards.tolist()))
    for shards in groups:
        assert len(shards) == 1 or blocks.sizes[shards].sum() <= blocks.limit
    visited = [group for group, _ in itertools.groupby(block_of(groups)[blocks.shards[order]])]
    assert visited == list(range(len(groups)))  # one block after the other


def block_of(groups):
    numbers = np.zeros(1 + max(map(max, groups)), int)
    for number, shards in enumerate(groups):
        numbers[shards] = number
    return numbers


def test_blocks_differ_from_epoch_to_epoch_and_rows_are_shuffled_within():
    blocks = ShardBlocks(np.repeat(np.arange(20), 50), np.full(20, 10), 40)
    first, second = (epoch_order(3, epoch, 1000, blocks) for epoch in (0, 1))
    assert set(blocks.shards[first[:200]]) != set(blocks.shards[second[:200]])
    assert len(set(blocks.shards[first[:200]])) == 4
    assert abs(np.corrcoef(first[:200] % 50, np.arange(200))[0, 1]) < 0.3


def test_where_all_shards_fit_into_one_block_the_order_is_that_without_a_limit():
    blocks = ShardBlocks(np.repeat(np.arange(4), 25), np.full(4, 10), 40)
    assert np.array_equal(epoch_order(5, 2, 100, blocks), epoch_order(5, 2, 100))
    plans = [step_plan(5, 3, np.arange(100), 16, 8, blocks=b) for b in (None, blocks)]
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(*plans, strict=True))


# --- subsets --------------------------------------------------------------------------------------

labels_of = st.lists(st.integers(0, 5), min_size=1, max_size=200).map(np.array)


@given(labels_of, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_subsets_are_stratified_and_nested(labels, a, b, seed):
    small, large = subset(labels, min(a, b), seed), subset(labels, max(a, b), seed)
    assert set(small) <= set(large)
    assert small.dtype == np.int64 and (np.diff(small) > 0).all()
    for c, size in zip(*np.unique(labels, return_counts=True)):
        taken = (labels[small] == c).sum()
        assert taken == max(1, int(size * min(a, b) + 1e-9))


def test_the_whole_set_and_the_seed_of_a_subset():
    labels = np.repeat(np.arange(10), 100)
    assert subset(labels, 1.0, 1).tolist() == list(range(1000))
    assert subset(labels, 0.2, 1).tolist() != subset(labels, 0.2, 2).tolist()
    assert len(subset(labels, 0.2, 1)) == 200


def test_a_fifth_of_imagenet_has_the_known_number_of_images():
    """The predecessor's stratified fifth has 256,190 of 1,281,167 images: of each class the whole
    part of a fifth."""
    sizes = np.full(1000, 1300)
    sizes[:105] = 1120
    sizes[0] += 1_281_167 - sizes.sum()
    assert len(subset(np.repeat(np.arange(1000), sizes), 0.2, 42)) == sum(
        int(s * 0.2 + 1e-9) for s in sizes
    )


def test_class_sizes_of_a_tuning_split_match_sklearns():
    labels = np.random.default_rng(0).choice(4, 2000, p=[0.5, 0.3, 0.15, 0.05])
    ours = np.bincount(labels[subset(labels, 0.2, 3)])
    theirs = np.bincount(
        labels[
            next(StratifiedShuffleSplit(1, train_size=0.2, random_state=0).split(labels, labels))[0]
        ]
    )
    assert np.abs(ours - theirs).max() <= 1


@given(labels_of, st.floats(0, 0.5), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_the_tuning_split_divides_the_rows(labels, fraction, seed):
    rows = subset(labels, 0.7, seed)
    train, tuning = tuning_split(labels, rows, fraction, seed)
    assert sorted([*train, *tuning]) == rows.tolist()
    for c in np.unique(labels[rows]):
        size, taken = (labels[rows] == c).sum(), (labels[tuning] == c).sum()
        assert taken < size
        assert taken == (0 if fraction == 0 else min(max(1, int(size * fraction + 0.5)), size - 1))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**31),
)
def test_no_subset_of_the_rest_has_an_image_of_the_reserve(sizes, fraction, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    held_out = reserve(labels, fraction, seed)
    assert not set(held_out) & set(subset(labels, 1 - fraction, seed))
    counts = np.bincount(labels[held_out], minlength=len(sizes))
    for size, count in zip(sizes, counts):
        assert count == min(max(1, int(np.floor(size * fraction + 0.5))), size - 1)
    larger = reserve(labels, min(2 * fraction, 0.5), seed)
    assert set(held_out) <= set(larger)


@pytest.mark.parametrize("source", ["subset", "reserve"])
@pytest.mark.parametrize("part", [0.3, 1.0])
def test_a_run_never_trains_on_its_tuning_split(source, part):
    labels = np.repeat(np.arange(7), [3, 20, 50, 1, 2, 9, 100])
    data = Data(subset=part, tuning_fraction=0.2, tuning_source=source)
    train, tuning = run_rows(labels, data)
    assert len(tuning) and not set(train) & set(tuning)
    assert set(train) <= set(subset(labels, part, data.subset_seed))
    assert run_rows(labels, Data(subset=part))[1].size == 0
