"""Faults that a soak switches on in a running worker, through files in a folder.

disk     while the file is there, every write fails as on a full disk
clock    time.time() is off by as many seconds as the file says
"""

import errno
import time
from pathlib import Path

from ftlib import storage


def install(folder):
    """Have this process follow the files in `folder`."""
    disk, clock = Path(folder, "disk"), Path(folder, "clock")
    write, now = storage._write_durably, time.time

    def full_or_write(path, data):
        if disk.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    def shifted():
        try:
            return now() + float(clock.read_text())
        except (OSError, ValueError):
            return now()

    storage._write_durably, time.time = full_or_write, shifted
