"""The flags of a dataclass: their names, how many words follow each, and the text of `--help`.

Every leaf of a tree of settings is a flag: `mix.off_epochs` is `--mix.off-epochs`. The docstring
under a field is its help. Reading the command line is left to `ftlib.cli`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ftlib.settings import Settings, differences, hints, override
from ftlib.text import WIDTH

"""Columns of a help text."""
COLUMN = 30
"""Column at which the texts of the flags begin."""


@dataclass(frozen=True)
class Metavar:
    """What stands for a flag's value in help texts: `Annotated[str, Metavar("FOLDER")]`."""

    word: str


class Position:
    """Marks a field that is given as a plain word, without a flag."""


class Repeatable:
    """Marks a tuple that grows by one value each time its flag is given."""


class Hidden:
    """Marks a field that is no flag."""


class Common:
    """Marks a field that is used most, so that help lists it first."""


class Commas:
    """Marks a tuple that is given as one word with commas in it."""


@dataclass(frozen=True)
class OptionalFile:
    """Marks text that is a file's name where the next word ends in `suffix`, and "-" where not."""

    suffix: str


@dataclass(frozen=True)
class FormerValue:
    """A value's old name, which is still taken."""

    old: str
    new: str


@dataclass(frozen=True)
class Flag:
    """One field that can be set on the command line."""

    path: str
    """Dotted path in the dataclass, such as mix.off_epochs."""
    hint: Any
    """Its type, without Annotated."""
    default: Any
    """dataclasses.MISSING where a value is needed."""
    text: str = ""
    """Its help."""
    metavar: str = ""
    extras: tuple[Any, ...] = ()
    """The markers above that its annotation has."""
    inherited: bool = False
    """Whether a base of the dataclass defines it."""

    @property
    def position(self) -> bool:
        return Position in self.extras

    @property
    def name(self) -> str:
        """The flag, such as --mix.off-epochs; a plain word's own name, such as RUN."""
        if self.position:
            return self.metavar
        return f"--{self.path.replace('_', '-')}"

    @property
    def names(self) -> tuple[str, ...]:
        """All spellings: a switch has one to turn it off, too."""
        if self.hint is not bool:
            return (self.name,)
        section, dot, leaf = self.path.replace("_", "-").rpartition(".")
        return self.name, f"--{section}{dot}no-{leaf}"

    @property
    def words(self) -> int | None:
        """How many words follow the flag; None for as many as there are up to the next flag."""
        if self.hint is bool:
            return 0
        if Repeatable in self.extras or Commas in self.extras:
            return 1
        if get_origin(self.hint) is tuple:
            kinds = get_args(self.hint)
            return None if Ellipsis in kinds else len(kinds)
        return 1

    @property
    def needed(self) -> bool:
        return self.default is dataclasses.MISSING


def flags_of(cls: type, default: Any = None, prefix: str = "") -> list[Flag]:
    """The flags of the dataclass `cls`, with defaults of the instance `default` where it is given.

    A member of a union has the fields of the kind that it is in `default`.
    """
    found: list[Flag] = []
    texts = field_texts(cls)
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name) if default is not None else _default(field)
        if isinstance(value, Settings):
            found += flags_of(type(value), value, f"{prefix}{field.name}.")
        else:
            flag = _flag(prefix + field.name, hints(cls)[field.name], value)
            inherited = any(field.name in inspect.get_annotations(base) for base in cls.__mro__[1:])
            text = texts.get(field.name, "")
            found.append(dataclasses.replace(flag, text=text, inherited=inherited))
    return [flag for flag in found if Hidden not in flag.extras]


def words_for(base: Settings, changed: Settings) -> list[str]:
    """The words on a command line that turn `base` into `changed`, of the same class.

    Another kind of a union (`--optimizer sgd`) comes first, since it brings its own defaults.
    """
    other_kinds = {
        path: kind
        for path, (_, kind) in differences(base, changed).items()
        if isinstance(getattr(changed, path, None), Settings)
    }
    words = [word for path, kind in other_kinds.items() for word in (f"--{path}", kind.lower())]
    known = {flag.path: flag for flag in flags_of(type(changed), changed)}
    for path, (_, value) in differences(override(base, other_kinds), changed).items():
        if path in known:
            words += _as_typed(known[path], value)
    return words


def _as_typed(flag: Flag, value: Any) -> list[str]:
    if flag.hint is bool:
        return [flag.names[0 if value else 1]]
    if not isinstance(value, tuple):
        return [flag.name, str(value)]
    if Commas in flag.extras:
        return [flag.name, ",".join(map(str, value))]
    if Repeatable in flag.extras:
        return [word for entry in value for word in (flag.name, str(entry))]
    return [flag.name, *map(str, value)]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag(path: str, hint: Any, default: Any) -> Flag:
    extras: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0]
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            extras += more
    word = next((extra.word for extra in extras if isinstance(extra, Metavar)), "")
    if not word:
        word = path.upper() if Position in extras else metavar_of(hint)
    return Flag(path, hint, default, metavar=word, extras=tuple(extras))


def metavar_of(hint: Any) -> str:
    """What stands for a value of this type: N for a whole number, a|b|c for choices."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if Ellipsis in kinds:
            return f"{metavar_of(kinds[0])} ..."
        return " ".join(map(metavar_of, kinds))
    return {int: "N", float: "X", bool: ""}.get(hint, "TEXT")


@cache
def field_texts(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, of `cls` or of the base that documents the field."""
    texts: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        texts |= _texts_of_module(kind.__module__).get(kind.__name__, {})
    return texts


@cache
def _texts_of_module(name: str) -> dict[str, dict[str, str]]:
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file or not file.endswith(".py"):
        return {}
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    return {
        node.name: _texts_of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)
    }


def _texts_of_class(node: ast.ClassDef) -> dict[str, str]:
    texts: dict[str, str] = {}
    for field, after in zip(node.body, node.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = _constant(after)
            if text:
                texts[field.target.id] = " ".join(text.split())
    return texts


def _constant(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


# --- help -----------------------------------------------------------------------------------------


def usage(program: str, flags: Sequence[Flag]) -> str:
    """The first line of every help text."""
    words = [_word(flag) for flag in flags if flag.position]
    needed = [f"{f.name} {_short_metavar(f)}" for f in flags if f.needed and not f.position]
    return " ".join(["usage:", program, *words, *needed, "[OPTIONS]"])


def _short_metavar(flag: Flag) -> str:
    """A list of choices stands at the flag's own line."""
    return flag.name.lstrip("-").upper() if "|" in flag.metavar else flag.metavar


def _word(flag: Flag) -> str:
    word = flag.metavar if flag.needed else f"[{flag.metavar}]"
    return f"{word} ..." if flag.words is None else word


def by_importance(flags: Sequence[Flag]) -> list[Flag]:
    """Plain words first, then what is needed, then the job's own flags, then inherited ones."""
    return sorted(flags, key=lambda flag: (not flag.position, not flag.needed, flag.inherited))


def describe(flags: Sequence[Flag]) -> Iterator[str]:
    """Lines that describe the flags, at most WIDTH columns wide."""
    for flag in flags:
        yield from entry(_head(flag), flag.text + _suffix(flag))


def entry(head: str, text: str) -> Iterator[str]:
    """`head` and, from COLUMN on, the text."""
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_long_words=False) or [""]
    if len(head) <= COLUMN - 4:
        yield f"  {head:<{COLUMN - 2}}{lines.pop(0)}".rstrip()
    else:
        yield f"  {head}"
    yield from (" " * COLUMN + line for line in lines)


def _head(flag: Flag) -> str:
    if flag.position:
        return flag.metavar
    if flag.hint is bool:
        return flag.names[1] if flag.default is True else flag.name
    return f"{flag.name} {flag.metavar}"


def _suffix(flag: Flag) -> str:
    if flag.hint is bool:
        return " (on by default)" if flag.default is True else ""
    if flag.needed or flag.default in ("", None, ()):
        return ""
    joint = "," if "," in flag.metavar else " "
    return f" (default: {_shown(flag.default, joint)})"


def _shown(value: Any, joint: str = " ") -> str:
    if isinstance(value, tuple):
        return joint.join(_shown(entry_) for entry_ in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
