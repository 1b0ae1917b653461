"""Where pictures come from, and what is known about each one.

A source is a place (`tree`): a folder, an archive, an address. What lies there is understood by a
layout, one module each: `folders`, `table`, `imagenet`, `webdataset`, `parquet`. A layout gives
every picture a class and, where the source has them, a split; `listing` checks the whole and
splits validation pictures off. Built-in sets (`builtin`) are written as folders first.
"""

from ftlib.preparation.sources.builtin import make_folders, names
from ftlib.preparation.sources.layout import Entry, Layout
from ftlib.preparation.sources.listing import Listing, describe, scan
from ftlib.preparation.sources.options import LAYOUTS, SourceOptions

__all__ = [
    "LAYOUTS",
    "Entry",
    "Layout",
    "Listing",
    "SourceOptions",
    "describe",
    "make_folders",
    "names",
    "scan",
]
