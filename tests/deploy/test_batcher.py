"""Pictures of concurrent requests are computed together, and every caller gets its own row."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from ftlib.deploy.batcher import Batcher, split_from


def doubled(images: np.ndarray) -> np.ndarray:
    time.sleep(0.01)
    return images.reshape(len(images), -1)[:, :1].astype(np.float64) * 2


def image(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_caller_gets_its_own_row(threads: int) -> None:
    async def work() -> list[np.ndarray]:
        batcher = Batcher(doubled, threads, largest=16)
        batcher.split_from = 4
        found = await asyncio.gather(*(batcher(image(i)) for i in range(100)))
        assert batcher.pictures == 100 and 7 <= batcher.batches < 60 and len(batcher) == 0
        batcher.close()
        return found

    assert [row[0] for row in asyncio.run(work())] == [2.0 * i for i in range(100)]


def test_a_failed_batch_reaches_its_callers_and_no_others() -> None:
    def compute(images: np.ndarray) -> np.ndarray:
        if (images == 9).any():
            raise RuntimeError("no")
        return doubled(images)

    async def work() -> None:
        batcher = Batcher(compute, 1, largest=16)
        with pytest.raises(RuntimeError, match="no"):
            await batcher(image(9))
        assert (await batcher(image(3)))[0] == 6
        batcher.close()

    asyncio.run(work())


def test_a_caller_that_goes_away_harms_nobody() -> None:
    async def work() -> None:
        batcher = Batcher(doubled, 1, largest=16)
        tasks = [asyncio.ensure_future(batcher(image(i))) for i in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        rows = await asyncio.gather(*tasks, return_exceptions=True)
        assert rows[0][0] == 0 and rows[2][0] == 4
        batcher.close()

    asyncio.run(work())


def test_batches_are_split_only_where_their_own_cost_is_small() -> None:
    assert split_from(one=0.020, many=0.160) == 2  # each picture costs the same
    assert split_from(one=0.018, many=0.043) == 13  # mostly the cost of a batch
    assert split_from(one=0.010, many=0.009) > 1000  # noise


def test_trying_out_runs_the_model() -> None:
    batcher = Batcher(doubled, 1, largest=16)
    batcher.try_out(image(1))
    assert batcher.split_from >= 2
    batcher.close()
