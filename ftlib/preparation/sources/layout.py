"""The values that sources and layouts exchange, and the protocol of a layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.places import Place
from ftlib.preparation.sources.tree import File, Tree


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture to prepare. `file` is its name below the source's root, with slashes."""

    file: str
    split: str
    label: int
    bytes: int
    """Size of the file; an estimate where the source does not say it."""
    mtime_ns: int
    """When the file, or the archive that holds it, was last changed."""
    place: Place | None = None
    """Where its bytes lie; None for a file of its own below the source's root."""


class Labelled(NamedTuple):
    """A file whose class is known. `split` is empty where the source has no splits."""

    file: File
    split: str
    label: str
    group: str = ""


class Rejected(NamedTuple):
    """A file that belongs to a class but cannot be read, with the reason."""

    file: str
    split: str
    label: str
    why: str


@dataclass
class LabelledFiles:
    """What a layout found."""

    layout: str
    """What the source was taken for, in words."""
    tree: Tree
    rows: list[Labelled]
    classes: tuple[str, ...] | None = None
    """Labels in their order; None to sort the names of `rows`."""
    titles: dict[str, str] = field(default_factory=dict)
    """Names to show for labels, where the source has a list of them."""
    split_origins: dict[str, str] = field(default_factory=dict)
    """Split -> what it was read from, such as `Training/`."""
    empty: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Split -> class folders without pictures."""
    aside: Counter[str] = field(default_factory=Counter)
    """Files that are not used, counted by the reason."""
    rejected: list[Rejected] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    group_column: str = ""
    """Column that looks like groups though no option names it; `rows` have its values."""
    hint: str = ""
    """Why a table beside the pictures is not used, for the message where there is one class."""
    keep_order: bool = False
    """Keep the rows' order within a split: another one would read the source many times over."""


class Layout(Protocol):
    """A way in which pictures and their labels are laid out."""

    name: str

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        """Whether `tree` is laid out like this. Reads names and small files only."""
        ...

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        """Every picture with its label. Raises DataError where the layout is not complete."""
        ...
