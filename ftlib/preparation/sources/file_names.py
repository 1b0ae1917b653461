"""Labels within the names of files, as in Abyssinian_100.jpg and cat.0.jpg."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ftlib.data.shards import DataError
from ftlib.preparation.sources.layout import Labelled, LabelledFiles
from ftlib.preparation.sources.naming import counted, listed, split_of
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.tree import File, Tree, is_picture_name

LABEL_AND_NUMBER = r"([^/]*[^-_. 0-9/])[-_. ]*[0-9]+[.][^./]+$"
"""Matches a label, a number and an extension, the most usual form."""
ENOUGH = 0.9
"""Share of the names that must be of that form for it to be proposed."""


def by_file_name(tree: Tree, options: SourceOptions) -> LabelledFiles:
    """Every picture with the label that `label_pattern` finds in its name, and the split that the
    folder at the top means. Raises DataError where it fits no picture."""
    pattern = re.compile(options.label_pattern)
    found = LabelledFiles("labels in the names of files", tree, [])
    for file in tree.files:
        top, slash, _ = file.path.partition("/")
        if not is_picture_name(file.path):
            found.aside["files that are no pictures"] += 1
        elif match := pattern.search(file.path):
            label = match[1] if match.groups() else match[0]
            found.rows.append(Labelled(file, split_of(top) if slash else "", label or ""))
        else:
            found.aside["pictures whose names --label-pattern does not fit"] += 1
    if not found.rows:
        files = [file.path for file in tree.files if is_picture_name(file.path)]
        raise DataError(
            f"{tree.root}: --label-pattern {options.label_pattern} fits none of "
            f"{counted(len(files), 'picture')} (first: {listed(files, 3)})"
        )
    tops = {row.file.path.partition("/")[0] for row in found.rows if row.split}
    found.split_origins = {split_of(top): f"{top}/" for top in sorted(tops)}
    return found


def named_by_files(files: Sequence[File]) -> str:
    """Advice for pictures whose names look like a label and a number; empty for others."""
    matches = [re.search(LABEL_AND_NUMBER, file.path) for file in files]
    labels = Counter(match[1] for match in matches if match)
    if len(labels) < 2 or labels.total() < max(ENOUGH * len(files), 2 * len(labels)):
        return ""
    return (
        f". If their names start with the label ({listed(sorted(labels), 3)}): "
        f"--label-pattern '{LABEL_AND_NUMBER}'"
    )
