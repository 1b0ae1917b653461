"""Where pictures come from, and what is known about each one.

A source is a place (`tree`): a folder, an archive, an address. What lies there is understood by a
layout, one module each: `folders`, `table`, `imagenet`, `webdataset`, `parquet`. A layout gives
every picture a class and, where the source has them, a split; `listing` checks the whole and
splits validation pictures off. Built-in sets (`builtin`) are written as folders first.
"""
