"""A network cable that delays and loses frames: `python bad_line.py RACK MACHINE NAME ...`.

Two TAP devices, one in the network namespace of process RACK (plugged into its switch), one in that
of process MACHINE, and this process, which carries frames between them. `tc netem` would do it in
the kernel, where that has it. It ends, and the devices with it, when its standard input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TAP_NO_PI = 0x400454CA, 0x1002
CLONE_NEWNET = 0x40000000


def tap(pid: int, name: str) -> int:
    """A new TAP device in the network namespace of process `pid`; reads and writes its frames."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP_NO_PI))
    return device


def carry(one: int, other: int, seconds: float, loss: float) -> None:
    """Carry each frame to the other side `seconds` later, but lose a share of them."""
    chance = random.Random(0)
    waiting: list[tuple[float, int, int, bytes]] = []
    other_side, count = {one: other, other: one}, 0
    while True:
        wait = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        for side in select.select([one, other, sys.stdin], [], [], wait)[0]:
            if side is sys.stdin:
                return
            frame = os.read(side, 65536)
            count += 1
            if chance.random() >= loss:
                due = time.monotonic() + seconds
                heapq.heappush(waiting, (due, count, other_side[side], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # down, or its queue is full: lost, as on any line
                os.write(to, frame)


if __name__ == "__main__":
    rack, machine, name, delay, lost = sys.argv[1:]
    ends = tap(int(rack), name), tap(int(machine), name)
    print("there", flush=True)
    carry(*ends, float(delay), float(lost))
