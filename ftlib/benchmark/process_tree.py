"""What a command costs with all processes below it, those included that outlive their parents.

python -m ftlib.benchmark.process_tree OUT.json COMMAND...
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans become this process's children, so that their CPU time is counted here."""
LOOK_SECONDS = 0.1
"""Between two looks at the processes: what one does after the last look at it may be missed."""


def main(out: str, command: list[str]) -> int:
    """Write {"cpu": seconds, "wall": seconds, "processes": int} to `out` when all have ended.

    The CPU time is that of all processes as they were seen last. The kernel's own account of ended
    children lacks Ray's workers, whose parent does not wait for them; it is taken where it is
    larger. Wall time ends with the command itself. Returns its exit code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began = looked = time.perf_counter()
    first = os.posix_spawnp(command[0], command, os.environ)
    seen, wall, code = {first: 0.0}, 0.0, 0
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        now = time.perf_counter()
        if ended == first:
            wall, code = now - began, os.waitstatus_to_exitcode(status)
        if now - looked > LOOK_SECONDS:
            seen.update(cpu_seconds())
            looked = time.perf_counter()
        if not ended:
            time.sleep(0.01)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = max(used.ru_utime + used.ru_stime, sum(seen.values()))
    Path(out).write_text(json.dumps({"cpu": cpu, "wall": wall, "processes": len(seen)}), "utf-8")
    return code


def cpu_seconds() -> dict[int, float]:
    """Of each living process below this one: its id -> the CPU seconds that it has used itself."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        found[child.pid] = times.user + times.system
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
