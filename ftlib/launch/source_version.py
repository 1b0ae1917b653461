"""Which ftlib a machine has. Two checkouts may call themselves by one version, so sources count."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import ftlib
from ftlib.launch.errors import LaunchError


@cache
def source_version() -> str:
    """Version and first digits of the sha256 of all modules: '0.2.0 (1f0c9a3e)'."""
    root = Path(ftlib.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"{ftlib.__version__} ({digest.hexdigest()[:8]})"


def check_version(node: str, theirs: str, drivers: str) -> None:
    """Raise LaunchError where the node at that address has another ftlib than the driver."""
    if theirs != drivers:
        raise LaunchError(
            f"the node {node} runs ftlib {theirs}, and the driver ftlib {drivers}: results would "
            "depend on where a run trains. Install the same on every machine, or submit with `ray "
            "job submit --working-dir .`, which takes the code along"
        )
