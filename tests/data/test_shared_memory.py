"""A slot is never handed out while anything refers to it, and always comes back."""

import gc
import mmap
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.shared_memory import MappedRing, SharedMemoryRing, lease


class SameProcess:
    """Stands in for the descriptor's way into another process."""

    def __init__(self, ring):
        self.ring = ring

    def detach(self):
        return os.dup(self.ring._file)


def filler(ring):
    return MappedRing(SameProcess(ring), ring.size, ring.number)


def test_a_slot_is_shared_without_a_copy():
    ring = SharedMemoryRing(3, 100)
    writing, slots = filler(ring), [ring.take(100) for _ in range(3)]
    assert sorted(slots) == [0, 1, 2] and ring.size == mmap.PAGESIZE
    for slot in slots:
        writing.view(slot, (5, 4, 5))[:] = slot + 1
    read = [lease(ring.number, slot, (5, 4, 5)) for slot in slots]
    assert [np.unique(r).tolist() for r in read] == [[slot + 1] for slot in slots]
    writing.view(slots[1], (5, 4, 5))[:] = 9
    assert (read[1] == 9).all() and read[1].flags.writeable


@pytest.mark.parametrize(
    "part",
    [
        lambda t: t,
        lambda t: t[1:2],
        lambda t: t.permute(2, 0, 1)[0],
        lambda t: t.numpy()[:, 1:],
        lambda t: t.view(-1).detach(),
    ],
)
def test_a_slot_comes_back_when_the_last_view_of_it_is_gone(part):
    ring = SharedMemoryRing(1, 60)
    slot = ring.take(60)
    tensor = torch.from_numpy(lease(ring.number, slot, (4, 5, 3)))
    kept = part(tensor)
    del tensor
    gc.collect()
    assert ring.take(60) is None
    del kept
    gc.collect()
    assert ring.take(60) == slot


def test_take_returns_none_without_a_free_slot_of_that_size():
    ring = SharedMemoryRing(2, mmap.PAGESIZE)
    assert ring.take(mmap.PAGESIZE + 1) is None
    assert {ring.take(1), ring.take(mmap.PAGESIZE)} == {0, 1}
    assert ring.take(1) is None
    assert SharedMemoryRing(0, 10).take(1) is None


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_no_two_holders_share_a_slot(actions):
    """None takes a slot and writes to it; a number drops one of those held."""
    ring, held, stamp = SharedMemoryRing(4, 8), [], 0
    writing = filler(ring)
    for action in actions:
        if action is None:
            slot = ring.take(8)
            assert (slot is None) == (len(held) == 4)
            if slot is not None:
                stamp += 1
                writing.view(slot, (8,))[:] = stamp
                held.append((stamp, lease(ring.number, slot, (8,))))
        elif held:
            held.pop(action % len(held))
        assert all((memory == written).all() for written, memory in held)


def test_the_memory_outlives_the_ring_while_it_is_read():
    ring = SharedMemoryRing(1, 8)
    slot = ring.take(8)
    filler(ring).view(slot, (8,))[:] = 5
    memory, file = lease(ring.number, slot, (8,)), ring._file
    del ring
    gc.collect()
    assert (memory == 5).all()
    del memory
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(file)


def test_slots_may_come_back_in_another_thread():
    ring = SharedMemoryRing(2, 8)
    memory = [lease(ring.number, ring.take(8), (8,)) for _ in range(2)]
    threads = [threading.Thread(target=memory.pop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert {ring.take(8), ring.take(8)} == {0, 1}
