"""How a source is read, as plain values. Imports nothing heavy, so that `--help` stays fast."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ftlib.settings import ConfigError

LayoutName = Literal["auto", "folders", "table", "imagenet", "webdataset", "parquet"]
LAYOUTS: tuple[str, ...] = get_args(LayoutName)


@dataclass(frozen=True)
class SourceOptions:
    """What to take from a source and how to split it. Raises ConfigError for impossible values."""

    layout: LayoutName = "auto"
    """How labels are found; auto looks at what lies there."""
    val_fraction: float | None = None
    """Share of each class held out for validation where the source has no val; 0 for none."""
    seed: int = 42
    """Chooses the pictures that --val-fraction holds out."""
    labels: str = ""
    """File with a column of file names and a column of labels: CSV, TSV, JSON, JSONL, Parquet."""
    file_column: str = ""
    """Column of file names; guessed where there is one choice."""
    label_column: str = ""
    """Column of labels; guessed where there is one choice."""
    split_column: str = ""
    """Column of splits (train, val, test); guessed where there is one choice."""
    label_pattern: str = ""
    """Regular expression over file names whose first group is the label, for labels in names."""
    group_column: str = ""
    """Column of groups, such as patients: no group is put into two splits."""
    group_pattern: str = ""
    """Regular expression over file names whose first group names the picture's group."""
    class_names: str = ""
    """File with the classes' names: one a line in the order of the numbers, or label,name."""
    nested: bool = False
    """Every folder that holds pictures is a class of its own, named a.b for a/b."""
    follow_links: bool = False
    """Take files and folders that are symbolic links out of the source."""
    singles: Literal["refuse", "train"] = "refuse"
    """Classes of one picture, when --val-fraction splits: refuse them, or keep them in train."""
    allow_similar_names: bool = False
    """Accept classes whose names differ only in case, spaces or Unicode form."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"--layout {self.layout}: needs to be one of {', '.join(LAYOUTS)}")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"--val-fraction {self.val_fraction:g}: needs to be from 0 to below 1, such as 0.1"
            )
        if self.group_column and self.group_pattern:
            raise ConfigError("--group-column and --group-pattern: give one of them")
        _check_pattern("--group-pattern", self.group_pattern, "(patient[0-9]+)")
        _check_pattern("--label-pattern", self.label_pattern, "([a-z]+)_[0-9]+")
        if self.label_pattern and (self.labels or self.layout != "auto"):
            raise ConfigError("--label-pattern: leave out --labels and --layout beside it")

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


def _check_pattern(option: str, pattern: str, example: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{option} {pattern}: not a regular expression ({error}). Example: {option} '{example}'"
        ) from None
