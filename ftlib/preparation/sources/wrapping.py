"""Find the folder that a source really begins in, past folders that only wrap it."""

from __future__ import annotations

from ftlib.preparation.sources.naming import PUBLISHED, split_of
from ftlib.preparation.sources.tree import File, Tree, is_picture_name

DEEPEST_WRAPPER = 4
LABEL_FILES = frozenset({"csv", "tsv", "json", "jsonl", "ndjson", "parquet"})
"""Extensions of files that may hold the labels of what lies in the folders beside them."""


def unwrapped(tree: Tree) -> tuple[Tree, str]:
    """(the tree, the folder it was found in), past folders that hold nothing but one folder."""
    wrapper = ""
    for _ in range(DEEPEST_WRAPPER):
        tops = {name.partition("/")[0] for name in tree.folders}
        loose = any("/" not in f.path and is_picture(f) for f in tree.files)
        linked = any("/" not in link.path for link in tree.links)
        beside = [f for f in tree.files if "/" not in f.path]
        table = any(f.extension in LABEL_FILES or f.name in PUBLISHED for f in beside)
        if len(tops) != 1 or loose or linked or table:
            break
        top = next(iter(tops))
        below = [n for n in tree.folders if n.count("/") == 1]
        pictures_in_it = any(f.path.count("/") == 1 and is_picture(f) for f in tree.files)
        if split_of(top) or pictures_in_it or not below:
            break
        if len(below) == 1 and not split_of(below[0].partition("/")[2]):
            inner = [n for n in tree.folders if n.count("/") == 2]
            if not inner:
                break
        tree = tree.within(top)
        wrapper = f"{wrapper}/{top}" if wrapper else top
    return tree, wrapper


def is_picture(file: File) -> bool:
    """Whether a file is a picture by its name."""
    return is_picture_name(file.path)
