"""Copies of a remote set's shards, made before training reaches them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from functools import lru_cache

import numpy as np

from ftlib.data.sampler import Microbatch, ShardBlocks
from ftlib.data.shards import BLOCKS_IN_CACHE, Split
from ftlib.settings import ConfigError

log = logging.getLogger("ftlib.data")


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
            try:
                self._split.fetch(shard)
            except Exception as error:
                log.info("shard %d could not be fetched ahead: %s", shard, error)
