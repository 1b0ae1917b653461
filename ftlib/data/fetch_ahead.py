"""Copies of a remote set's shards, made before training reaches them."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from ftlib.data.sampler import Microbatch, ShardBlocks
from ftlib.data.shards import BLOCKS_IN_CACHE, Split
from ftlib.settings import ConfigError

log = logging.getLogger("ftlib.data")

REQUESTS = 8
"""Shards that a machine copies at once before they are needed."""
SAY_SECONDS = 10.0
"""How often it is said how many have been."""


def shard_blocks(split: Split, rows: np.ndarray, limit: float) -> ShardBlocks | None:
    """The order that `data.cache_limit` (in GB) asks for; None where it is 0.

    Raises ConfigError where the limit has no room for as many shards as it takes.
    """
    if not limit:
        return None
    sizes = np.array([shard.bytes for shard in split.shards], np.int64)
    least = BLOCKS_IN_CACHE * int(sizes.max(initial=0))
    if int(limit * 1e9) < least:
        raise ConfigError(
            f"data.cache_limit = {limit:g}: it must hold {BLOCKS_IN_CACHE} shards of up to "
            f"{sizes.max() / 1e9:.3g} GB. Set it to {least / 1e9 + 0.001:.3f} at least; more "
            "shuffles better"
        )
    return ShardBlocks(split.shards_of(rows), sizes, int(limit * 1e9) // BLOCKS_IN_CACHE)


@contextlib.contextmanager
def warm_up(
    needed: Sequence[tuple[Split, np.ndarray]],
    *,
    worker: int = 0,
    workers: int = 1,
    say: Callable[[str], object],
) -> Iterator[None]:
    """Copy the shards of a run to this machine's cache while the block runs, several at once.

    In any order, an epoch soon needs all of them. Meanwhile whoever needs a shard that is not here
    copies it, or waits for the copy that is being made. What fails is left to that process, which
    asks again and reports it. Does nothing where the cache has a limit (`FetchAhead` copies then).

    Args:
        needed: splits and their rows, int64[n].
        worker: this process among the `workers` on this machine, which share the work: each begins
            elsewhere.
        say: called by the first of them with lines about the progress.
    """
    missing = [
        (split, shard)
        for split, rows in needed
        for shard in np.unique(split.shards_of(rows)).tolist()
        if not split.dataset.cache_limit and not split.is_here(shard)
    ]
    if not missing:
        yield
        return
    sizes = [split.shards[shard].bytes for split, shard in missing]
    copied = _Copied(sizes, say if worker == 0 else lambda text: None)
    first = len(missing) * worker // workers
    pool = ThreadPoolExecutor(max(REQUESTS // workers, 1), "ftlib-warm-up")
    for split, shard in missing[first:] + missing[:first]:
        pool.submit(_fetch, split, shard, copied.add)
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)


class _Copied:
    """Counts shards that have been copied, and says so now and then."""

    def __init__(self, sizes: list[int], say: Callable[[str], object]) -> None:
        self.shards, self.bytes = len(sizes), sum(sizes)
        self.say, self.began, self.said = say, time.monotonic(), time.monotonic()
        self.done, self.bytes_done, self._lock = 0, 0, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += 1
            self.bytes_done += size
            now = time.monotonic()
            if self.done == self.shards or now - self.said > SAY_SECONDS:
                self.said, seconds = now, max(now - self.began, 1e-3)
                self.say(
                    f"data: {self.done:,} of {self.shards:,} shards in the cache of "
                    f"{platform.node()} ({self.bytes_done / 1e9:.2f} of {self.bytes / 1e9:.2f} GB, "
                    f"{self.bytes_done / seconds / 1e6:.0f} MB/s)"
                )


def _fetch(split: Split, shard: int, done: Callable[[int], None]) -> None:
    try:
        split.fetch(shard)
        done(split.shards[shard].bytes)
    except Exception as error:
        log.info("shard %d could not be fetched ahead: %s", shard, error)


class FetchAhead:
    """A thread that copies the shards of the block that training is in, and then of the next one.

    What fails is left to the process that needs the shard: it asks again, and reports it.
    """

    def __init__(self, split: Split, blocks: ShardBlocks, seed: int) -> None:
        self._split, self._at = split, (-1, -1)
        self._of_epoch = lru_cache(maxsize=2)(lambda epoch: blocks.of_epoch(seed, epoch))
        self._wanted: deque[int] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="ftlib-fetch", daemon=True)
        self._thread.start()

    def reached(self, microbatch: Microbatch) -> None:
        """Training will soon need the rows of this microbatch."""
        shard = int(self._split.shards_of(microbatch.rows[-1:])[0])
        blocks = self._of_epoch(microbatch.epoch)
        number = next(i for i, shards in enumerate(blocks) if shard in shards)
        if (microbatch.epoch, number) == self._at:
            return
        self._at = microbatch.epoch, number
        if number + 1 < len(blocks):
            following = blocks[number + 1]
        else:
            following = self._of_epoch(microbatch.epoch + 1)[0]
        with self._changed:
            self._wanted = deque([*blocks[number].tolist(), *following.tolist()])
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the copy it is making."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard = self._wanted.popleft()
            _fetch(self._split, shard, lambda size: None)
