"""List the files of a folder that get a row, and count those that are left aside."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ftlib.picture import EXTENSIONS, FOREIGN_EXTENSIONS, PictureError, kind_of

KNOWN = frozenset(e for extensions in EXTENSIONS.values() for e in extensions)
BY_NAME = KNOWN | frozenset(FOREIGN_EXTENSIONS)
"""Files with these extensions get a row whatever is in them."""
HIDDEN = "hidden"
UNREADABLE = "unreadable folder"


@dataclass
class PictureList:
    files: list[str] = field(default_factory=list)
    """Pictures, relative to the folder, sorted."""
    left_aside: Counter[str] = field(default_factory=Counter)
    """How many files are no pictures, by extension such as ".txt"; `HIDDEN` for dot files."""

    def left_aside_text(self) -> str:
        """Such as "left aside 3 files that are no pictures (2 .txt, 1 hidden)"; or empty."""
        count = sum(self.left_aside.values())
        if not count:
            return ""
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.left_aside.most_common(6))
        files = "file that is no picture" if count == 1 else "files that are no pictures"
        more = ", ..." if len(self.left_aside) > 6 else ""
        return f"left aside {count:,} {files} ({kinds}{more})"


def list_pictures(source: Path) -> PictureList:
    """The pictures below a folder, links to folders included; or the one file that `source` is.

    A file counts as a picture by its extension; one with another extension or none by its first
    bytes. Formats that cannot be read are listed too, so that their rows say why.
    """
    found = PictureList()
    if not source.is_dir():
        found.files.append(source.name)
        return found
    seen: set[tuple[int, int]] = set()
    unreadable: list[OSError] = []
    for root, folders, names in os.walk(source, followlinks=True, onerror=unreadable.append):
        about = os.stat(root)
        if (about.st_dev, about.st_ino) in seen:  # a link back to a folder above or beside
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            aside = _why_left_aside(path, name)
            if aside:
                found.left_aside[aside] += 1
            else:
                found.files.append(os.path.relpath(path, source))
    found.files.sort()
    if unreadable:
        found.left_aside[UNREADABLE] += len(unreadable)
    return found


def _why_left_aside(path: str, name: str) -> str:
    """Empty for a picture."""
    if name.startswith("."):
        return HIDDEN
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    if extension in BY_NAME:
        return ""
    try:
        with open(path, "rb") as file:
            kind_of(file.read(512))
        return ""
    except (OSError, PictureError):
        return f".{extension}" if extension else "without extension"
