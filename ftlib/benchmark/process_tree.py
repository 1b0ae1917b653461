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
COUNT_SECONDS = 0.2
"""Between two counts of the processes. One that lives shorter may be missed; its CPU is not."""


def main(out: str, command: list[str]) -> int:
    """Write {"cpu": seconds, "wall": seconds, "processes": int} to `out` when all have ended.

    Wall time ends with the command itself. Returns its exit code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began = counted = time.perf_counter()
    first = os.posix_spawnp(command[0], command, os.environ)
    seen, wall, code = {first}, 0.0, 0
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        now = time.perf_counter()
        if ended == first:
            wall, code = now - began, os.waitstatus_to_exitcode(status)
        if now - counted > COUNT_SECONDS:
            seen.update(child.pid for child in psutil.Process().children(recursive=True))
            counted = time.perf_counter()
        if not ended:
            time.sleep(0.01)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {"cpu": used.ru_utime + used.ru_stime, "wall": wall, "processes": len(seen)}
    Path(out).write_text(json.dumps(cost), "utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
