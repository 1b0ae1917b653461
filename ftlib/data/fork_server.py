"""Where the loader's processes come from.

A fork server rather than a fork: the training process runs threads of Ray and CUDA, which a fork would break. The server has imported
the loader already, so a process starts in a few hundredths of a second and shares those pages.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib.paths import environment


class _Popen(popen_forkserver.Popen):
    """Starts a process that does not import the training process's main module again: loading needs nothing of it, and in a Ray
    worker it would bring all of Ray into each loader process."""

    def _launch(self, process_obj: Any) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super()._launch(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def context(module: str) -> multiprocessing.context.ForkServerContext:
    """The fork server's context, the server running and `module` imported in it."""
    found = _Context()
    found.set_forkserver_preload([module])
    root = str(Path(__file__).parents[2])
    # The server looks for the module there.
    with environment(
        PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ):
        forkserver.ensure_running()
    return found
