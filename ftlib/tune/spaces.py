"""Spaces: which settings a sweep varies, and over which values.

A space is a file of `tune_spaces/` with a dict `SPACE` from dotted paths into `Run` to Ray Tune
domains (`tune.uniform`, `tune.choice` ...):

    SPACE = {
        "model.dropout": tune.quniform(0, 0.1, 0.01),
        "augment.crop_scale[0]": tune.uniform(0.08, 0.5),   # one entry of a tuple
        "augment.randaugment_n": tune.randint(0, 4),
        "augment.randaugment_m": When(
            tune.uniform(1, 10), given=lambda v: v["augment.randaugment_n"] > 0, otherwise=0.0
        ),
        "augment.randaugment_p": 0.5,                       # not searched, equal in every trial
    }
    POINTS = [{"model.dropout": 0.02}]    # optional, tried first; what is missing is the recipe's

Paths, types and bounds are checked when the file is loaded, combinations of values when a sweep
starts with a recipe.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from ftlib.checks import check_space
from ftlib.config import Run
from ftlib.paths import spaces_folder
from ftlib.settings import ConfigError, Settings, checked, flat, hints, nearest, override

KEEP = type("KEEP", (), {"__repr__": lambda self: "the recipe's value"})()
"""`When(otherwise=KEEP)`: the recipe's value stays where the condition does not hold."""
INDEXED = re.compile(r"(.+)\[(\d+)\]")

DEPENDENTS: tuple[tuple[str, Any, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("mix.off_epochs", 0, lambda v: not (v["mix.mixup_alpha"] or v["mix.cutmix_alpha"])),
    ("model.dropout_in", "both", lambda v: v["model.dropout"] == 0),
    ("augment.randaugment_m", 0.0, lambda v: v["augment.randaugment_n"] == 0),
    (
        "augment.randaugment_ops",
        (),
        lambda v: v["augment.randaugment_n"] == 0 and not v["augment.trivialaugment"],
    ),
)
"""(path, neutral value, when): settings that only qualify another one. They go back to neutral
when a trial switches that one off. Otherwise a recipe that ends with two epochs without mixing
could not be combined with a trial that never mixes."""


@dataclass(frozen=True)
class When:
    """A setting that is searched only where `given(values)` holds; elsewhere it is `otherwise`.

    `given` sees the values of the settings above it in SPACE. Where the setting was not searched,
    the search's model leaves it out too.
    """

    domain: Any
    given: Callable[[Mapping[str, Any]], bool]
    otherwise: Any = KEEP


@dataclass(frozen=True)
class Axis:
    """One searched setting: a range of numbers or a list of choices."""

    path: str
    kind: Literal["float", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    """Distance between two values, counted from `low`."""
    choices: tuple[Any, ...] = ()
    condition: Callable[[Mapping[str, Any]], bool] | None = field(default=None, compare=False)
    """See `When.given`."""
    default: Any = field(default=KEEP, compare=False)
    """Value where the condition does not hold."""

    def holds(self, value: Any) -> bool:
        """Whether the search could draw `value`."""
        if self.kind == "choice":
            return value in self.choices
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and self.cast(value) == value
        )

    def cast(self, value: float) -> Any:
        """The nearest value that the axis can take."""
        if self.kind == "choice":
            return value
        if self.step:
            value = self.low + round((value - self.low) / self.step) * self.step
        return (
            round(value)
            if self.kind == "int"
            else min(max(float(f"{value:.10g}"), self.low), self.high)
        )

    def grid(self, points: int) -> list[Any]:
        """All choices, or at most `points` values spread evenly over the range, ends included.

        With `log` they are even in the logarithm.
        """
        if self.kind == "choice":
            return list(self.choices)
        if self.kind == "int" or self.step:
            values = np.arange(self.low, self.high + (self.step or 1) / 2, self.step or 1)
            if len(values) <= points:
                return [self.cast(v) for v in values]
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        even = np.linspace(*ends, points)
        return list(dict.fromkeys(self.cast(math.exp(v) if self.log else v) for v in even))

    def draw(self, rng: np.random.Generator) -> Any:
        if self.kind == "choice":
            return self.choices[int(rng.integers(len(self.choices)))]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.kind == "int" and not self.log:
            step = int(self.step or 1)
            return int(self.low) + step * int(
                rng.integers(0, int(self.high - self.low) // step + 1)
            )
        value = rng.uniform(low, high)
        return min(
            max(self.cast(math.exp(value) if self.log else value), self.cast(self.low)),
            self.cast(self.high),
        )

    def __str__(self) -> str:
        if self.kind == "choice":
            text = "one of " + ", ".join(map(str, self.choices))
        else:
            text = (
                f"{self.low:g} to {self.high:g}"
                + (f" in steps of {self.step:g}" if self.step else "")
                + (", logarithmic" if self.log else "")
            )
        return text + (f", or {self.default} by a condition" if self.condition else "")


@dataclass(frozen=True)
class Space:
    name: str
    axes: tuple[Axis, ...]
    constants: Mapping[str, Any]
    """Paths that every trial but the recipe's own sets to the same value."""
    points: tuple[Mapping[str, Any], ...]
    """Tried first, after the recipe's own values."""
    purpose: str
    """First line of the file's docstring."""

    def describe(self) -> dict[str, str]:
        """Path -> its values in words; two spaces with the same description are the same space."""
        return {a.path: str(a) for a in self.axes} | {p: repr(v) for p, v in self.constants.items()}

    def axis(self, path: str) -> Axis:
        return next(a for a in self.axes if a.path == path)


# --- loading ---------------------------------------------------------------------------------


def load(name: str) -> Space:
    """The space `name` of tune_spaces/, or a path to such a file.

    Raises ConfigError with the nearest name, or with what is wrong in the file.
    """
    check_space(name)
    path = Path(name) if name.endswith(".py") else spaces_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tune_spaces.{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "SPACE", None), dict):
        raise ConfigError(
            f"{path.name}: a space needs SPACE = {{'model.dropout': tune.uniform(0, 0.1), ...}}"
        )
    purpose = (module.__doc__ or path.stem).strip().splitlines()[0]
    return build(path.stem, module.SPACE, getattr(module, "POINTS", ()), purpose)


def build(name: str, space: Mapping[str, Any], points: Any = (), purpose: str = "") -> Space:
    """A checked Space from the contents of a space file."""
    axes: list[Axis] = []
    constants: dict[str, Any] = {}
    for path, domain in space.items():
        hint = _hint(path)
        condition = domain if isinstance(domain, When) else None
        inner = condition.domain if condition else domain
        if not _is_domain(inner):
            if condition:
                raise ConfigError(
                    f"{path}: When needs a Ray Tune domain such as tune.uniform(0, 1), "
                    f"not {inner!r}"
                )
            constants[path] = checked(path, inner, hint) if not _is_union(hint) else inner
            continue
        axis = _axis(path, inner, condition)
        for value in (
            axis.choices if axis.kind == "choice" else (axis.cast(axis.low), axis.cast(axis.high))
        ):
            _check_value(path, value, hint)
        if condition and condition.otherwise is not KEEP:
            _check_value(path, condition.otherwise, hint)
        axes.append(axis)
    if not axes:
        raise ConfigError(
            f"space {name}: it varies nothing. Give at least one path a range, such as "
            "tune.uniform(0, 0.1)"
        )
    known = [a.path for a in axes]
    for point in points:
        for path in point:
            if path not in known:
                raise ConfigError(
                    f"space {name}: POINTS has {path}, which SPACE does not vary."
                    f"{nearest(path, known)}"
                )
            axis = next(a for a in axes if a.path == path)
            if not axis.holds(point[path]) and point[path] != axis.default:
                raise ConfigError(
                    f"space {name}: POINTS has {path} = {point[path]!r}, outside its range ({axis})"
                )
    return Space(name, tuple(axes), constants, tuple(dict(p) for p in points), purpose)


def known_paths(cls: type = Run, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> type of every setting there can be, with those of all kinds of a union."""
    found: dict[str, Any] = {}
    for name, hint in hints(cls).items():
        path = f"{prefix}{name}"
        kinds = get_args(hint) if _is_union(hint) else (hint,)
        nodes = [k for k in kinds if isinstance(k, type) and issubclass(k, Settings)]
        if not nodes or len(nodes) > 1:
            found[path] = hint
        for node in nodes:
            for inner, kind in known_paths(node, f"{path}.").items():
                found.setdefault(inner, kind)
    return found


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _hint(path: str) -> Any:
    known = known_paths()
    match = INDEXED.fullmatch(path)
    hint = known.get(match[1] if match else path)
    if hint is None:
        raise ConfigError(f"unknown setting {path}.{nearest(path, list(known))}")
    if match:
        kinds = get_args(hint) if get_origin(hint) is tuple else ()
        if not kinds or int(match[2]) >= len(kinds):
            has = f"{len(kinds)} entries, counted from 0" if kinds else "one value, no list"
            raise ConfigError(f"{path}: {match[1]} has {has}")
        return kinds[int(match[2])]
    return hint


def _check_value(path: str, value: Any, hint: Any) -> None:
    if _is_union(hint):
        names = [k.__name__ for k in get_args(hint)]
        if value not in names:
            raise ConfigError(
                f"{path} = {value!r}: needs one of {', '.join(names)}.{nearest(str(value), names)}"
            )
    else:
        checked(path, value, hint)


def _is_domain(value: Any) -> bool:
    from ray.tune.search.sample import Domain

    return isinstance(value, Domain) or (isinstance(value, dict) and set(value) == {"grid_search"})


def _axis(path: str, domain: Any, condition: When | None) -> Axis:
    from ray.tune.search import sample

    extra: dict[str, Any] = {}
    if condition:
        extra = {"condition": condition.given, "default": condition.otherwise}
    if isinstance(domain, dict):
        return Axis(path, "choice", choices=tuple(domain["grid_search"]), **extra)
    if isinstance(domain, sample.Categorical):
        return Axis(path, "choice", choices=tuple(domain.categories), **extra)
    sampler = domain.get_sampler() if isinstance(domain, (sample.Float, sample.Integer)) else None
    step = None
    if isinstance(sampler, sample.Quantized):
        step, sampler = float(sampler.q), sampler.get_sampler()
    if not isinstance(sampler, (sample.Uniform, sample.LogUniform)):
        raise ConfigError(
            f"{path}: a space takes uniform, loguniform, quniform, randint, lograndint, qrandint "
            "and choice. For a value that depends on others use When"
        )
    whole = isinstance(domain, sample.Integer)
    log = isinstance(sampler, sample.LogUniform)
    # randint leaves its upper end out, qrandint does not
    high = float(domain.upper) - (1 if whole and step is None else 0)
    if whole and step == 1:
        step = None
    if log and step:
        raise ConfigError(
            f"{path}: a logarithmic range in steps is not supported. Use tune.choice for the "
            "values, or leave the steps out"
        )
    kind: Literal["int", "float"] = "int" if whole else "float"
    return Axis(path, kind, low=float(domain.lower), high=high, log=log, step=step, **extra)


# --- values ----------------------------------------------------------------------------------


def own_values(space: Space, run: Run) -> dict[str, Any]:
    """The recipe's own values of the searched settings, of those that it has.

    OneCycle, for example, has no `schedule.warmup_epochs`.
    """
    values = flat(run)
    own: dict[str, Any] = {}
    for axis in space.axes:
        match = INDEXED.fullmatch(axis.path)
        if match and match[1] in values:
            own[axis.path] = values[match[1]][int(match[2])]
        elif axis.path in values:
            own[axis.path] = values[axis.path]
    return own


def choose(space: Space, pick: Callable[[Axis], Any]) -> dict[str, Any]:
    """Values for all axes. `pick` is called only for those whose condition holds."""
    values: dict[str, Any] = {}
    for axis in space.axes:
        if axis.condition is None or axis.condition(values):
            values[axis.path] = pick(axis)
        elif axis.default is not KEEP:
            values[axis.path] = axis.default
    return values


def searched(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that the search chose: on axes whose condition holds."""
    return {
        a.path: values[a.path]
        for a in space.axes
        if a.path in values and (a.condition is None or a.condition(values))
    }


def grid(space: Space, points: int) -> Iterator[dict[str, Any]]:
    """Every combination once, with the conditions applied."""
    seen = set()
    for combination in itertools.product(*(a.grid(points) for a in space.axes)):
        picked = dict(zip((a.path for a in space.axes), combination))
        values = choose(space, functools.partial(_picked, picked))
        if (key := repr(sorted(values.items()))) not in seen:
            seen.add(key)
            yield values


def _picked(values: Mapping[str, Any], axis: Axis) -> Any:
    return values[axis.path]


def apply(run: Run, values: Mapping[str, Any]) -> Run:
    """`run` with `values` at their paths; `path[i]` is one entry of a tuple.

    A member of a union that already is of the wanted kind keeps its settings. Settings that only
    qualify a part which is switched off go back to neutral (DEPENDENTS).
    """
    current = flat(run)
    changes: dict[str, Any] = {}
    for path, value in values.items():
        if match := INDEXED.fullmatch(path):
            entries = list(changes.get(match[1], current[match[1]]))
            entries[int(match[2])] = value
            changes[match[1]] = tuple(entries)
        elif not (_is_union(_hint(path)) and current.get(path) == value):
            changes[path] = value
    resulting = {**current, **changes}
    if changes:
        changes |= {
            p: neutral
            for p, neutral, idle in DEPENDENTS
            if p not in values and resulting[p] != neutral and idle(resulting)
        }
    return override(run, changes)


def check(space: Space, run: Run, samples: int = 200, seed: int = 0) -> None:
    """Every point and `samples` random draws must give a legal run.

    Raises ConfigError with an example of one that does not.
    """
    rng = np.random.default_rng(seed)
    own = own_values(space, run)
    tried = [(f"the point {dict(p)}", {**own, **p}) for p in space.points]
    for _ in range(samples):
        values = choose(space, lambda axis: axis.draw(rng))
        tried.append((", ".join(f"{p} = {v}" for p, v in values.items()), values))
    for what, values in tried:
        try:
            apply(run, {**space.constants, **values})
        except ConfigError as error:
            raise ConfigError(
                f"space {space.name} asks for impossible values with this recipe. {error}.\n"
                f"Tried: {what}"
            ) from None


def short_names(space: Space) -> dict[str, str]:
    """Path -> its last part, or the whole path where two last parts are equal."""
    last = {a.path: a.path.split(".")[-1] for a in space.axes}
    names = list(last.values())
    return {p: n if names.count(n) == 1 else p for p, n in last.items()}
