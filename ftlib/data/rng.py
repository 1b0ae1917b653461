"""Randomness as an argument: everything random in a run is drawn from a 64-bit key of what it is
for.

`key(AUGMENT, seed, epoch, image)` is the same number in every process, thread and order of
loading, so no random state has to be saved or restored. The mixing function is the finalizer of
splitmix64 (Steele, Lea, Flood 2014), chained over the parts.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

ORDER, AUGMENT, MIX, DROPOUT, INIT, SUBSET, TUNING = range(1, 8)
"""Domains: keys of one are unrelated to those of another."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(domain: int, *parts: int) -> int:
    """A well-mixed uint64 from a domain and whole numbers (taken modulo 2**64).

    It depends on their order and on how many there are.
    """
    if not parts:
        return _mix(domain)
    return _mix(_prefix(domain, parts[:-1]) ^ _mix(int(parts[-1]) & _MASK))


@lru_cache(maxsize=256)
def _prefix(domain: int, parts: tuple[int, ...]) -> int:
    """The key that the last part is mixed into: the same for all images of an epoch."""
    return key(domain, *parts)


class _OnGenerator(random.Random):
    """`random.Random` on top of a numpy Generator, so that one rewind covers both."""

    gauss_next: float | None

    def __init__(self, generator: np.random.Generator) -> None:
        super().__init__(0)
        # The method itself: another layer of Python would double the cost of a draw.
        self.random = generator.random  # type: ignore[method-assign]
        self._raw = generator.bit_generator.random_raw

    def getrandbits(self, k: int) -> int:
        bits = 0
        for have in range(0, k, 64):
            bits |= self._raw() << have
        return bits & ((1 << k) - 1)

    def _randbelow(self, n: int) -> int:
        """What randrange, choice, sample and shuffle draw with.

        Gives the numbers of the base class, without its layers where 64 bits are enough.
        """
        mask = (1 << n.bit_length()) - 1
        if mask >> 64:
            return self._randbelow_with_getrandbits(n)  # type: ignore[attr-defined]
        while (drawn := self._raw() & mask) >= n:
            pass
        return drawn


class Randomness:
    """A numpy generator and a `random.Random` on the same counter-based stream (Philox; Salmon et
    al. 2011).

    `rewind(key)` puts both at the start of that key's own stream, in a few microseconds.
    """

    def __init__(self, start: int = 0) -> None:
        self._philox = np.random.Philox(0)
        self.generator = np.random.Generator(self._philox)
        self.python = _OnGenerator(self.generator)
        self._state = self._philox.state
        self._state["state"]["counter"] = np.zeros(4, np.uint64)
        self._state["buffer"] = np.zeros(4, np.uint64)
        self._state["buffer_pos"] = 4  # the buffer is used up: the next draw starts at the counter
        self._state["has_uint32"] = self._state["uinteger"] = 0
        self.rewind(start)

    def rewind(self, key: int) -> None:
        self._state["state"]["key"] = np.array([key, 0], np.uint64)
        self._philox.state = self._state
        self.python.gauss_next = None  # drop the second half of a pair that was drawn before

    def __reduce__(self) -> tuple[type[Randomness], tuple[()]]:
        return Randomness, ()  # it is rewound before each use, so it has no state worth keeping


def raw(key: int, n: int) -> np.ndarray:
    """uint64[n] from the key's Philox stream.

    Unlike numpy's distributions, the raw stream never changes between versions.
    """
    return np.random.Philox(key=key).random_raw(n)
