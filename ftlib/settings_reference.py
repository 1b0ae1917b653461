"""docs/settings.md, written from `ftlib.config`: every setting, its values, default and meaning.

python -m ftlib.settings_reference > docs/settings.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import get_args

from ftlib.config import Run
from ftlib.flags import Flag, flags_of, metavar_of
from ftlib.settings import Between, Settings, hints

HEAD = """\
# Settings

<!-- Written by `python -m ftlib.settings_reference > docs/settings.md`. Do not edit by hand. -->

Every setting of a run, as `ftlib/config.py` defines it. On the command line a setting is a flag:
`train.batch_size` is `--train.batch-size`; a switch is turned off with `no-`, as in
`--train.no-channels-last`. In Python and in a search space it is the dotted path itself. Defaults
are those of `Run`. A recipe has its own values: `python jobs/phase2.py --show` prints them.
[recipes.md](recipes.md) says which choice suits what."""
KINDS = """\
One kind is chosen by its name, as in `--{section} {name}`. The recipe's kind keeps the recipe's
values; another kind starts from the defaults here."""
COLUMNS = ("| setting | value | default | meaning |", "|---|---|---|---|")


def page() -> str:
    """The whole text of docs/settings.md."""
    run = Run()
    own = [flag for flag in flags_of(Run, run) if "." not in flag.path]
    lines = [HEAD, "", "## The run", "", *COLUMNS, *map(_row, own)]
    for name, hint in hints(Run).items():
        value = getattr(run, name)
        if not isinstance(value, Settings):
            continue
        kinds = get_args(hint)
        if kinds:
            lines += _section_of_kinds(name, kinds)
        else:
            flags = flags_of(type(value), value, f"{name}.")
            lines += ["", f"## {name}", "", _about(type(value)), "", *COLUMNS, *map(_row, flags)]
    return "\n".join(lines) + "\n"


def _section_of_kinds(section: str, kinds: Sequence[type[Settings]]) -> Iterator[str]:
    example = kinds[-1].__name__.lower()
    yield from ("", f"## {section}", "", KINDS.format(section=section, name=example))
    for kind in kinds:
        yield from ("", f"### {section}: {kind.__name__.lower()}", "", _about(kind))
        flags = flags_of(kind, kind(), f"{section}.")
        if flags:
            yield from ("", *COLUMNS, *map(_row, flags))


def _about(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _row(flag: Flag) -> str:
    cells = (f"`{flag.path}`", _value(flag), _default(flag), flag.text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(flag: Flag) -> str:
    """What may be given: choices, or the type with its bounds."""
    if flag.hint is bool:
        return "true or false"
    kind = metavar_of(flag.hint).replace("|", ", ")
    words = {"N": "whole number", "X": "number", "TEXT": "text", "TEXT ...": "texts"}
    name = words.get(kind, f"{kind.count('X')} numbers" if set(kind) == {"X", " "} else kind)
    bounds = [str(extra) for extra in flag.extras if isinstance(extra, Between)]
    return ", ".join([name, *bounds])


def _default(flag: Flag) -> str:
    if flag.default in ("", ()):
        return "empty"
    if isinstance(flag.default, tuple):
        return " ".join(_number(value) for value in flag.default)
    return str(flag.default).lower() if flag.hint is bool else _number(flag.default)


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(page(), end="")
