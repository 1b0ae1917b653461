"""ftlib: fine-tune image classifiers on clusters.

From the shell: the jobs in `jobs/`, or the command `ftlib`. From Python: `ftlib.prepare`,
`ftlib.finetune`, `ftlib.recipe`, `ftlib.train` and `ftlib.load` (see `ftlib.api`). Settings are in
`ftlib.config`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftlib.api import TrainedRun, finetune, load, prepare, recipe, train

# Albumentations asks a package registry for its newest version when it is imported: seconds spent
# on a request that nobody wants.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.2.0"
__all__ = ["TrainedRun", "__version__", "finetune", "load", "prepare", "recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first used, so that `ftlib --help` stays fast."""
    if name in __all__:
        from ftlib import api

        return getattr(api, name)
    raise AttributeError(f"module 'ftlib' has no attribute '{name}'")
