"""The machinery under `ftlib.config`: checked frozen dataclasses, JSON both ways, overrides by dotted path, fingerprints.

Knows nothing of what the settings mean. Imports nothing outside the standard library.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
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


class ConfigError(ValueError):
    """A setting that cannot be: the message names the field, the value and what to do."""


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

    Whole numbers are taken where a float is asked for and lists where a tuple is, since JSON and samplers give those.
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


@cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> type, Annotated bounds included."""
    found = get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """' Did you mean X?', or '' when nothing is near."""
    known = list(known)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not match:  # a right leaf below a wrong branch: mixup_alpha for mix.mixup_alpha
        match = [k for k in known if k.split(".")[-1] == word.split(".")[-1]][:1]
    return f" Did you mean {match[0]}?" if match else ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str) if not is_dataclass(value) else type(value).__name__


def checked(path: str, value: Any, hint: Any) -> Any:
    """`value` in the field's exact type, or a ConfigError that says what is wrong."""
    bounds: Between | None = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((e for e in extras if isinstance(e, Between)), None)
    if (
        hasattr(value, "item")
        and not isinstance(value, (str, bytes))
        and getattr(value, "shape", None) == ()
    ):
        value = value.item()  # a numpy scalar from a sampler
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        kinds = get_args(hint)
        if not isinstance(value, kinds):
            raise ConfigError(
                f"{path} = {_shown(value)}: needs one of {', '.join(k.__name__ for k in kinds)}"
            )
        return value
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"{path} = {_shown(value)}: needs one of {', '.join(map(str, get_args(hint)))}.{nearest(str(value), list(get_args(hint)))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path} = {_shown(value)}: needs a list of values")
        kinds = get_args(hint)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            raise ConfigError(
                f"{path} = {_shown(value)}: needs {len(kinds)} values, not {len(value)}"
            )
        return tuple(checked(f"{path}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, kinds)))
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path} = {_shown(value)}: needs a number")
        value = float(value)
        if not math.isfinite(value):
            raise ConfigError(f"{path} = {value}: needs a finite number")
    elif hint is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path} = {_shown(value)}: needs a whole number")
    elif not isinstance(value, hint):
        raise ConfigError(
            f"{path} = {_shown(value)}: needs {'true or false' if hint is bool else 'text' if hint is str else hint.__name__}"
        )
    if bounds is not None and not bounds.holds(value):
        raise ConfigError(f"{path} = {value}: must be {bounds}")
    return value


# --- JSON -------------------------------------------------------------------------------------------------------------------------


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
    """The tree from `to_dict`'s form. Unknown keys are refused with the nearest name; missing ones take their defaults."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where or 'the settings'}: needs an object with named values, not {_shown(values)}"
        )
    known = hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown setting {where + '.' if where else ''}{key}.{nearest(str(key), list(known))}"
            )
    built: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        hint = known[name]
        if get_origin(hint) in (Union, types.UnionType):
            built[name] = _member(path, value, get_args(hint))
        elif isinstance(hint, type) and issubclass(hint, Settings):
            built[name] = from_dict(hint, value, path)
        else:
            built[name] = value
    return cls(**built)


def from_json(cls: type[S], text: str) -> S:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not a recipe: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    return from_dict(cls, values)


def _member(path: str, value: Any, kinds: tuple[type, ...]) -> Settings:
    """A union's member from its name, or from an object whose `type` names it."""
    if isinstance(value, kinds):
        return value
    name, rest = (
        (value, {})
        if isinstance(value, str)
        else (value.get("type"), {k: v for k, v in value.items() if k != "type"})
        if isinstance(value, Mapping)
        else (None, {})
    )
    plain = {k.__name__.lower(): k for k in kinds}
    kind = plain.get(str(name).replace("_", "").lower())
    if kind is None:
        raise ConfigError(
            f"{path} = {_shown(value)}: needs one of {', '.join(k.__name__ for k in kinds)}.{nearest(str(name), [k.__name__ for k in kinds])}"
        )
    return from_dict(kind, rest, path)


# --- paths ------------------------------------------------------------------------------------------------------------------------


def leaves(node: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf; a union's member also under its own path, as its class name."""
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
    """A copy with the leaves at dotted paths replaced. A union is replaced whole, by a member, its name or its object;
    parents go first, so {"optimizer": "SGD", "optimizer.lr": 0.1} means what it says."""
    if not changes:
        return node
    known = hints(type(node))
    direct: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if head not in known:
            raise ConfigError(
                f"unknown setting {node._path(path)}.{nearest(node._path(path), [node._path(p) for p, _ in leaves(node)])}"
            )
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    built: dict[str, Any] = {}
    for name, value in direct.items():
        hint = known[name]
        if get_origin(hint) in (Union, types.UnionType):
            value = _member(node._path(name), value, get_args(hint))
        elif isinstance(hint, type) and issubclass(hint, Settings) and not isinstance(value, hint):
            value = from_dict(hint, value, node._path(name))
        built[name] = value
    for name, inner in below.items():
        child = built.get(name, getattr(node, name))
        if not isinstance(child, Settings):
            raise ConfigError(
                f"unknown setting {node._path(name)}.{next(iter(inner))}: {node._path(name)} is a single value"
            )
        built[name] = override(child, inner)
    return dataclasses.replace(node, **built)


def fingerprint(
    node: Settings,
    leave_out: tuple[str, ...] = (),
    leave_out_at_default: tuple[str, ...] = (),
    **extra: Any,
) -> str:
    """sha256 (hex) of the leaves and `extra`.

    Leaves at or below the paths in `leave_out` do not count, and those in `leave_out_at_default` only
    where they differ from what the tree has without any value given.
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
    """Dotted path -> (value in a, value in b) where they differ; None where one has no such leaf."""
    left, right = flat(a), flat(b)
    return {
        p: (left.get(p), right.get(p)) for p in {**left, **right} if left.get(p) != right.get(p)
    }
