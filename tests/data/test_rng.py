import pickle
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftlib.data.rng import (
    AUGMENT,
    DROPOUT,
    INIT,
    MIX,
    ORDER,
    SUBSET,
    TUNING,
    Randomness,
    _mix,
    key,
    raw,
)

numbers = st.integers(0, 2**63 - 1)


def test_the_mixing_function_is_splitmix64():
    """The published generator from seed 0: its state grows by the golden ratio, and its output is
    the mixed state."""
    state, outputs = 0, []
    for _ in range(3):
        outputs.append(_mix(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keys_have_not_changed_since_they_were_recorded():
    assert key(ORDER, 42, 0) == 0x95806DB43FD771D7
    assert key(AUGMENT, 42, 3, 1_281_166) == 0x59A1885A6A9812B
    assert raw(7, 2).tolist() == [16086915834549238692, 5448529601018347655]


@given(numbers, numbers, numbers)
def test_a_key_depends_on_all_its_parts_and_their_order(a, b, c):
    k = key(AUGMENT, a, b, c)
    assert 0 <= k < 2**64
    assert k == key(AUGMENT, a, b, c)
    others = [
        key(MIX, a, b, c),
        key(AUGMENT, a + 1, b, c),
        key(AUGMENT, a, b + 1, c),
        key(AUGMENT, a, b, c + 1),
        key(AUGMENT, a, b),
        key(AUGMENT, a, b, c, 0),
    ]
    assert k not in others
    if b != c:
        assert k != key(AUGMENT, a, c, b)


def test_domains_give_different_keys():
    assert len({key(d, 1, 2) for d in (ORDER, AUGMENT, MIX, DROPOUT, INIT, SUBSET, TUNING)}) == 7


def test_a_million_keys_do_not_collide_and_have_balanced_bits():
    keys = np.array(
        [key(AUGMENT, 42, epoch, image) for epoch in range(20) for image in range(10_000)],
        np.uint64,
    )
    assert len(np.unique(keys)) == len(keys)
    ones = ((keys[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(keys))


@given(numbers, st.integers(0, 300))
def test_rewinding_forgets_all_earlier_draws(k, before):
    randomness, fresh = Randomness(), Randomness()
    randomness.generator.integers(0, 255, before, dtype=np.uint8)  # leaves a half-used 32-bit word
    randomness.python.gauss(0, 1)  # keeps the second of a pair
    randomness.rewind(k)
    fresh.rewind(k)

    def draws(r):
        return [
            r.python.random(),
            r.python.gauss(0, 1),
            r.generator.random(),
            r.python.randrange(10**30),
            *r.generator.integers(0, 255, 5, dtype=np.uint8),
            *r.python.sample(range(100), 4),
            r.python.uniform(2, 3),
            r.python.choice("abcdef"),
        ]

    assert draws(randomness) == draws(fresh)


def test_the_stream_is_philox_with_that_key():
    randomness = Randomness(5)
    assert randomness.generator.random() == np.random.Generator(np.random.Philox(key=5)).random()


def test_python_numbers_are_uniform():
    randomness = Randomness(1)
    counts = np.bincount([randomness.python.randrange(7) for _ in range(7000)], minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square, 6 degrees: 1 in 1000


def test_choices_equal_those_of_the_base_class():
    """Drawn in fewer layers, from the same bits to the same end."""

    class Plain(random.Random):
        def __init__(self, generator):
            super().__init__(0)
            self.raw = generator.bit_generator.random_raw

        def getrandbits(self, k):
            return sum(int(self.raw()) << have for have in range(0, k, 64)) & ((1 << k) - 1)

    ours, plain = Randomness(9).python, Plain(Randomness(9).generator)
    for n in (1, 2, 3, 7, 8, 1000, 2**32, 2**63 + 1, 2**64, 2**64 + 1, 10**30):
        assert [ours.randrange(n) for _ in range(20)] == [plain.randrange(n) for _ in range(20)], n
    assert ours.sample(range(50), 9) == plain.sample(range(50), 9) and ours.choice(
        "abcde"
    ) == plain.choice("abcde")


def test_a_pickled_generator_works():
    again = pickle.loads(pickle.dumps(Randomness(3)))
    again.rewind(3)
    assert again.python.random() == Randomness(3).python.random()
