"""Checked frozen dataclasses, as JSON and back, with overrides by dotted path and fingerprints.

The machinery under `ftlib.config`, which knows nothing of what the settings mean. It imports
no library outside the standard one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ftlib.text import hide_password, printable, shorten


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field, the value and what to do."""


LONGEST = 100_000
"""Characters of the longest text and entries of the longest list that a setting may be."""
DEEPEST = 20
"""Levels of the deepest nesting of a recipe in JSON."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both included unless said otherwise."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"at most {self.high:g}"
        return low if math.isinf(self.high) or self.high >= 2**31 else f"{low} and {high}"


@dataclass(frozen=True)
class Settings:
    """Base of every node of the tree: types and bounds are checked when it is built.

    Whole numbers are taken where a float is asked for, and lists where a tuple is, since JSON and
    samplers give those.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            object.__setattr__(self, name, checked(self._path(name), getattr(self, name), hint))
        self.check()

    def check(self) -> None:
        """Combinations that cannot work; override and call `refuse`."""

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ConfigError(f"{self._path(name)} = {_shown(getattr(self, name))}: {why}")

    def _path(self, name: str) -> str:
        return f"{self.section}.{name}" if self.section else name


_HINTS: dict[type, dict[str, Any]] = {}


def hints(cls: type) -> dict[str, Any]:
    """Field name -> type, Annotated bounds included."""
    if cls not in _HINTS:
        found = get_type_hints(cls, include_extras=True)
        _HINTS[cls] = {f.name: found[f.name] for f in fields(cls)}
    return _HINTS[cls]


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or '' when nothing is near."""
    known = list(known)
    if len(word) > 200:
        return ""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not match:  # the right leaf below a wrong branch: mixup_alpha for mix.mixup_alpha
        leaf = word.split(".")[-1].lstrip("-")
        match = [k for k in known if k.split(".")[-1].lstrip("-") == leaf][:1]
    return f" Did you mean {match[0]}?" if match else ""


def _shown(value: Any) -> str:
    """A value in a message: in JSON's spelling, short and without passwords."""
    if is_dataclass(value):
        return type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, str) and len(value) > 10_000:
        value = value[:10_000]
    try:
        text = json.dumps(value, default=lambda v: type(v).__name__)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return shorten(hide_password(text))


def checked(path: str, value: Any, hint: Any) -> Any:
    """`value` in the field's exact type, or a ConfigError that says what is wrong."""
    bounds: Between | None = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((e for e in extras if isinstance(e, Between)), None)
    value = _plain(value)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _checked_union(path, value, get_args(hint))
    if origin is Literal:
        return _checked_choice(path, value, get_args(hint))
    if origin is tuple:
        return _checked_tuple(path, value, get_args(hint))
    value = _checked_leaf(path, value, hint)
    if bounds is not None and not bounds.holds(value):
        raise ConfigError(f"{path} = {_shown(value)}: must be {bounds}")
    return value


def _plain(value: Any) -> Any:
    """A numpy scalar, as samplers give them, as a plain number."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _checked_union(path: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """A member of a union of settings, or a value that may be None."""
    if type(None) in kinds:
        others = [kind for kind in kinds if kind is not type(None)]
        return None if value is None else checked(path, value, others[0])
    if not isinstance(value, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{path} = {_shown(value)}: needs one of {names}")
    return value


def _checked_choice(path: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, (list, dict)) or value not in choices:
        names = list(map(str, choices))
        near = nearest(value, names) if isinstance(value, str) else ""
        raise ConfigError(f"{path} = {_shown(value)}: needs one of {', '.join(names)}.{near}")
    return value


def _checked_tuple(path: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{path} = {_shown(value)}: needs a list of values")
    if len(value) > LONGEST:
        raise ConfigError(f"{path}: {len(value):,} values are too many; at most {LONGEST:,}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ConfigError(f"{path} = {_shown(value)}: needs {len(kinds)} values, not {len(value)}")
    return tuple(checked(f"{path}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, kinds)))


def _checked_leaf(path: str, value: Any, hint: Any) -> Any:
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path} = {_shown(value)}: needs a number")
        if abs(value) > sys.float_info.max or value != value:
            raise ConfigError(f"{path} = {_shown(value)}: needs a finite number")
        return float(value)
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path} = {_shown(value)}: needs a whole number")
        if abs(value) >= 2**64:
            raise ConfigError(f"{path} = {_shown(value)}: needs a number of at most 64 bits")
    elif not isinstance(value, hint):
        needed = {bool: "true or false", str: "text"}.get(hint, hint.__name__)
        raise ConfigError(f"{path} = {_shown(value)}: needs {needed}")
    elif isinstance(value, str):
        _check_text(path, value)
    return value


def _check_text(path: str, value: str) -> None:
    if len(value) > LONGEST:
        raise ConfigError(
            f"{path}: a text of {len(value):,} characters is too long; at most {LONGEST:,}"
        )
    if "\0" in value or value != value.encode("utf-8", "ignore").decode():
        raise ConfigError(f"{path} = {_shown(value)}: it has characters that are not text")


# --- JSON -----------------------------------------------------------------------------------------


def to_dict(node: Any) -> Any:
    """Plain JSON types; a member of a union carries its class name under `type`."""
    if isinstance(node, Settings):
        out: dict[str, Any] = {}
        for name, hint in hints(type(node)).items():
            value = getattr(node, name)
            out[name] = to_dict(value)
            if get_origin(hint) in (Union, types.UnionType):
                out[name] = {"type": type(value).__name__, **out[name]}
        return out
    return [to_dict(v) for v in node] if isinstance(node, tuple) else node


def to_json(node: Settings) -> str:
    return json.dumps(to_dict(node), indent=2)


S = TypeVar("S", bound=Settings)


def from_dict(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """The tree from `to_dict`'s form; what is missing takes its default.

    `where` is the dotted path of `values` within the whole tree. Raises ConfigError, for an
    unknown key with the nearest name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where or 'the settings'}: needs an object with named values, not {_shown(values)}"
        )
    known = hints(cls)
    for key in values:
        if key not in known:
            path = f"{where}.{key}" if where else str(key)
            near = nearest(path, [f"{where}.{name}" if where else name for name in known])
            raise ConfigError(f"unknown setting {shorten(printable(path))}.{near}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        built[name] = _node(path, value, known[name])
    return cls(**built)


def _node(path: str, value: Any, hint: Any) -> Any:
    """A section or a union's member from its JSON form; a leaf as it is."""
    if isinstance(value, Settings):
        return value
    if get_origin(hint) in (Union, types.UnionType) and type(None) not in get_args(hint):
        return _member(path, value, get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Settings):
        return from_dict(hint, value, path)
    return value


def from_json(cls: type[S], text: str) -> S:
    """The tree from JSON. Raises ConfigError for text that is no JSON, or not of this tree."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not a recipe: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise ConfigError("not a recipe: it is nested too deeply") from None
    except ValueError:
        raise ConfigError("not a recipe: it has a number of too many digits") from None
    if _depth(values) > DEEPEST:
        raise ConfigError(f"not a recipe: it is nested more than {DEEPEST} levels deep")
    return from_dict(cls, values)


def _depth(values: Any) -> int:
    """Levels of nesting, counted without recursion; counting ends beyond DEEPEST."""
    level, depth = [values], 0
    while level and depth <= DEEPEST:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                inner.extend(value.values() if isinstance(value, dict) else value)
        level = [v for v in inner if isinstance(v, (dict, list))]
        depth += 1
    return depth


def _member(path: str, value: Any, kinds: tuple[type[Settings], ...]) -> Settings:
    """A union's member from its name, or from an object whose `type` names it."""
    name: Any = None
    rest: dict[str, Any] = {}
    if isinstance(value, str):
        name = value
    elif isinstance(value, Mapping):
        name = value.get("type")
        rest = {k: v for k, v in value.items() if k != "type"}
    known = {kind.__name__.lower(): kind for kind in kinds}
    kind = known.get(name.replace("_", "").lower()) if isinstance(name, str) else None
    if kind is None:
        names = [kind.__name__ for kind in kinds]
        near = nearest(name, names) if isinstance(name, str) else ""
        raise ConfigError(f"{path} = {_shown(value)}: needs one of {', '.join(names)}.{near}")
    return from_dict(kind, rest, path)


# --- paths ----------------------------------------------------------------------------------------


def leaves(node: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf; of a union's member also (path, its class name)."""
    for name, hint in hints(type(node)).items():
        value, path = getattr(node, name), f"{prefix}{name}"
        if isinstance(value, Settings):
            if get_origin(hint) in (Union, types.UnionType):
                yield path, type(value).__name__
            yield from leaves(value, path + ".")
        else:
            yield path, value


def flat(node: Settings) -> dict[str, Any]:
    """Dotted path -> value, for parameters and comparisons."""
    return dict(leaves(node))


def override(node: S, changes: Mapping[str, Any]) -> S:
    """A copy with the leaves at dotted paths replaced.

    A union is replaced as a whole, by a member, its name or its object. Parents go first, so
    {"optimizer": "SGD", "optimizer.lr": 0.1} means what it says. Raises ConfigError.
    """
    if not changes:
        return node
    known = hints(type(node))
    direct: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if head not in known:
            near = nearest(node._path(path), [node._path(p) for p, _ in leaves(node)])
            raise ConfigError(f"unknown setting {shorten(printable(node._path(path)))}.{near}")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    built = {name: _node(node._path(name), value, known[name]) for name, value in direct.items()}
    for name, inner in below.items():
        child = built.get(name, getattr(node, name))
        if not isinstance(child, Settings):
            path = node._path(name)
            leaf = shorten(printable(next(iter(inner))))
            raise ConfigError(f"unknown setting {path}.{leaf}: {path} is a single value")
        built[name] = override(child, inner)
    return dataclasses.replace(node, **built)


def fingerprint(
    node: Settings,
    leave_out: tuple[str, ...] = (),
    leave_out_at_default: tuple[str, ...] = (),
    **extra: Any,
) -> str:
    """sha256 (hex) of the leaves and `extra`.

    Leaves at or below the paths in `leave_out` do not count, and those in `leave_out_at_default`
    only where they differ from what the tree has without any value given.
    """
    defaults = flat(type(node)()) if leave_out_at_default else {}
    kept = {
        path: value
        for path, value in leaves(node)
        if not any(path == out or path.startswith(out + ".") for out in leave_out)
        and not (path in leave_out_at_default and value == defaults[path])
    }
    return hashlib.sha256(
        json.dumps({**kept, **extra}, sort_keys=True, default=list).encode()
    ).hexdigest()


def differences(a: Settings, b: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (value in a, value in b) where they differ; None where there is no leaf."""
    left, right = flat(a), flat(b)
    return {
        p: (left.get(p), right.get(p)) for p in {**left, **right} if left.get(p) != right.get(p)
    }
