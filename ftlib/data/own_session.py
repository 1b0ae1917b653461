"""Moves the process that imports it into a session of its own. For the loader's fork server only.

A signal to the job's process group (Ctrl-C, `timeout`, Slurm, a container's stop) must reach the
training process alone, which needs its loaders for the steps up to its last checkpoint. The fork
server imports this before anything else, and all loader processes inherit its session.
"""

import contextlib
import os

with contextlib.suppress(OSError):
    os.setsid()
