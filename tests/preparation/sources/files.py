"""Small files for the tests of sources."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ftlib.preparation.sources.listing import Listing


def tree(root: Path, *files: str, data: bytes = b"x") -> Path:
    """Write files of one byte (folders where a name ends with a slash) below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.endswith("/"):
            (root / file).mkdir(parents=True, exist_ok=True)
        else:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(data)
    return root


def many(*classes: str, split: str = "", n: int = 10) -> list[str]:
    """Names of `n` pictures in each class folder."""
    return [f"{split}{name}/{i:02d}.jpg" for name in classes for i in range(n)]


def jpeg(seed: int, side: int = 16) -> bytes:
    """A small photo-like JPEG; another one for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def rows(listing: Listing) -> list[tuple[str, str, str]]:
    """(split, class, file) of all entries, in order."""
    return [(e.split, listing.classes[e.label], e.file) for e in listing.entries]


def labels(listing: Listing) -> dict[str, tuple[str, str]]:
    """File -> (split, class)."""
    return {file: (split, name) for split, name, file in rows(listing)}
