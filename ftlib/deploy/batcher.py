"""Compute the pictures of concurrent requests together, with one torch thread per batch.

Threads within a batch would mostly wait for each other: on 2 cores, with the other one busy, a
ResNet-18 at 64 px takes 18 ms of CPU per picture with one thread and 117 ms with two. Batches run
side by side where that costs little: a batch has a cost of its own, whatever its size, so pictures
are split over two batches only when there are enough of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Compute = Callable[[np.ndarray], np.ndarray]
"""uint8[b, S, S, 3] -> float64[b, C]."""
ALLOWED_OVERHEAD = 0.25
"""Share of CPU time that splitting a batch in two may cost."""
TRIED = 8
"""Size of the batch that is timed against one of a single picture."""


class Batcher:
    """`await batcher(pixels)` gives a picture's row of the result. Belongs to one event loop."""

    def __init__(self, compute: Compute, threads: int, largest: int) -> None:
        self._compute, self._threads, self._largest = compute, threads, largest
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="model")
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self._workers = 0
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references
        self.split_from = largest
        """So many waiting pictures are split over one more batch."""
        self.pictures = 0
        self.batches = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        """Pictures that wait for their turn."""
        return len(self._waiting)

    def try_out(self, image: np.ndarray) -> None:
        """Run the model on uint8[S, S, 3] to warm it up, and learn from which size to split."""
        one, many = (np.stack([image] * n) for n in (1, TRIED))
        self._compute(one)
        self.split_from = split_from(
            min(self._timed(one) for _ in range(2)), min(self._timed(many) for _ in range(2))
        )

    def _timed(self, images: np.ndarray) -> float:
        started = time.thread_time()
        self._compute(images)
        return time.thread_time() - started

    async def __call__(self, pixels: np.ndarray) -> np.ndarray:
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, answer))
        free = self._workers < self._threads
        if not self._workers or (free and len(self._waiting) >= self.split_from):
            self._workers += 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def _work(self) -> None:
        try:
            await self._compute_batches()
        finally:
            self._workers -= 1  # with no await since `_waiting` was seen empty: none is forgotten

    async def _compute_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            n = min(self._largest, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(n)]
            started = time.perf_counter()
            try:
                images = np.stack([pixels for pixels, _ in batch])
                found = await loop.run_in_executor(self._pool, self._compute, images)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            self.pictures += n
            self.batches += 1
            self.seconds += time.perf_counter() - started
            for (_, answer), row in zip(batch, found):
                if not answer.done():  # its caller may have gone away
                    answer.set_result(row)
            if self._workers > 1 and len(self._waiting) < self.split_from:
                return  # the others take what is left

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def split_from(one: float, many: float) -> int:
    """How many pictures are worth a batch more, where batches of 1 and `TRIED` take so long."""
    per_picture = max((many - one) / (TRIED - 1), 1e-9)
    fixed = max(one - per_picture, 0.0)
    return max(2, math.ceil(fixed / per_picture * (1 / ALLOWED_OVERHEAD - 1)))
