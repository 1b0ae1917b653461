"""The command line of a job, and how a job ends. The only module that imports tyro.

A job that trains a recipe calls `run = parse(PHASE2, about=__doc__)`: every leaf of `Run` is a flag
(`--optimizer.lr 1e-3`). `--optimizer sgd` (or `optimizer:sgd`) changes the kind of optimizer, and
likewise `--loss` and `--schedule`; `--recipe FILE` starts from a recipe in JSON; `--show` prints
the result as such a file. Any other job calls `options(Options, __doc__)`, where `Options` is a
dataclass of its flags, or `options_and_recipe` if it takes a recipe too.

`--help` lists the flags that are used most, `--help-all` all of them. No torch, ray or mlflow is
imported for that, so that it answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

import ftlib
from ftlib import flags as flags_
from ftlib.config import Run
from ftlib.flags import Commas, Flag, FormerValue, OptionalFile, Repeatable, flags_of
from ftlib.settings import ConfigError, Settings, from_json, hints, nearest, override, to_json
from ftlib.storage import write_file
from ftlib.text import WIDTH, hide_password, printable, shorten

UNIONS = ("loss", "optimizer", "schedule")
MOST_USED = (
    "name",
    "data.path",
    "data.subset",
    "model.arch",
    "model.init_from",
    "augment.size",
    "mix.mixup_alpha",
    "mix.cutmix_alpha",
    "optimizer.lr",
    "optimizer.weight_decay",
    "train.epochs",
    "train.batch_size",
    "train.precision",
    "cluster.workers",
    "gates.val_top1",
    "seed",
)
"""The settings of a recipe that `--help` lists."""
HELP = {"-h", "--help", "--help-all"}
LAST = ("quiet", "json")
"""Options that every help text lists at its end."""


@dataclass(frozen=True)
class JobOptions(Settings):
    """Base of a job's options: types and bounds are checked, and messages name the flag."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:  # as it is typed: "--port 0" for "--port = 0"
            raise ConfigError(str(error).replace(" = ", " ", 1)) from None

    def _path(self, name: str) -> str:
        return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ResultOptions(JobOptions):
    """Options of a job that prints a result."""

    quiet: bool = False
    """Print problems only."""
    json: Annotated[str, OptionalFile(".json"), flags_.Metavar("[FILE.json]")] = ""
    """Print the result as JSON, and all else to standard error. With a file: write it there."""


O = TypeVar("O")  # noqa: E741

# --- how a job ends -------------------------------------------------------------------------------


def job(main: Callable[[], Any], *, deliver_leftovers: bool = True) -> None:
    """Run a job's `main` and end the process with the exit code that all jobs share.

    0: done (or what `main` returns, if that is a number). 1: it failed. 2: what the user wrote is
    wrong. 130 and 143: Ctrl-C and SIGTERM. Faults that are understood print one message; others a
    traceback, and with FTLIB_TRACEBACK=1 all do. While `main` works, what earlier runs on this home
    could not deliver to MLflow is delivered, unless `deliver_leftovers` is off.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A console that lacks a character must not end a job whose work is done.
            stream.reconfigure(errors="backslashreplace")
    _end_on_sigterm()
    # Else the end of the process looks through all that was imported, for seconds.
    atexit.register(gc.freeze)
    try:
        _same_checkout(main)
        from ftlib.track import background  # a job that ends at once does without it

        with background.delivery() if deliver_leftovers else contextlib.nullcontext():
            code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command starts again or goes on.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # the reader (`| head`) is gone, and with it all interest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as error:
        _end_at_once(error, error.code)
        raise
    except Exception as error:
        if os.environ.get("FTLIB_TRACEBACK") or not _understood(error):
            traceback.print_exc()
        else:
            _complain(error)
        wrong_input = isinstance(error, ValueError) and explained(error)
        code = 2 if wrong_input else 1
        _end_at_once(error, code)
        raise SystemExit(code) from None
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _end_at_once(error: BaseException, code: Any) -> None:
    """End the process without exit handlers, where `error` is a Ray that is gone: Ray's own wait
    for it, up to a minute."""
    if getattr(error, "ends_at_once", False):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def explained(error: BaseException) -> bool:
    """Whether the message says what is wrong and what to do: true of ftlib's own exceptions."""
    return type(error).__module__.split(".")[0] == "ftlib"


def _understood(error: BaseException) -> bool:
    return explained(error) or (isinstance(error, OSError) and error.filename is not None)


def _complain(error: BaseException) -> None:
    if getattr(error, "said", False):
        return
    text = str(error)
    if isinstance(error, OSError) and not explained(error):
        text = f"{error.filename}: {error.strerror}"
    print(f"error: {hide_password(text)}", file=sys.stderr)


def _end_on_sigterm() -> None:
    """Let SIGTERM end the job through its `finally` blocks, as Ctrl-C does."""

    def end(number: int, frame: object) -> None:
        # Not `print`: the signal may have come within one.
        os.write(2, b"\nTerminated. The same command starts again or goes on.\n")
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def _same_checkout(main: Callable[[], Any]) -> None:
    """Refuse a job of one checkout that runs on the ftlib of another one."""
    code = getattr(main, "__code__", None)
    checkout = Path(code.co_filename).resolve().parents[1] if code else None
    imported = Path(ftlib.__file__).resolve().parent
    if checkout and (checkout / "ftlib" / "cli.py").is_file() and checkout / "ftlib" != imported:
        raise ConfigError(
            f"this job is of the checkout {checkout}, but ftlib comes from {imported.parent}. "
            f"Run `make install` in {checkout} and use its .venv/bin/python"
        )


@contextlib.contextmanager
def reporting(asked: ResultOptions) -> Iterator[dict[str, Any]]:
    """A dict that the job fills with its result, printed as JSON at the end if that was asked for.

    Meanwhile what the job prints goes to standard error with --json, and nowhere with --quiet.
    """
    result: dict[str, Any] = {}
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if asked.json == "-":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if asked.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        ended: SystemExit | None = None
        try:
            yield result
        except SystemExit as error:  # an exit code can be part of the result
            ended = error
        text = json.dumps(_plain(result), indent=1, allow_nan=False)
        if asked.json == "-":
            print(text, file=stdout, flush=True)
        elif asked.json:
            write_file(asked.json, text.encode() + b"\n")
        if ended is not None:
            raise ended


def _plain(value: Any) -> Any:
    """`value` as JSON has it: dataclasses, mappings, tuples, numpy scalars; NaN is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


# --- reading the command line ---------------------------------------------------------------------


def parse(recipe: Run, argv: Sequence[str] | None = None, about: str | None = None) -> Run:
    """The recipe, its settings replaced by the flags in `argv` (default: the process's own).

    `about` is the job's docstring, which `--help` begins with. Ends the process with 0 after
    `--help` and `--show`, and with 2 and one message if anything is wrong.
    """
    with _ending():
        words = _words(argv)
        _answer_help(words, [], recipe, about)
        return _parse_recipe(words, recipe)


def options(cls: type[O], about: str, argv: Sequence[str] | None = None) -> O:
    """The options of a job, an instance of the dataclass `cls`, from `argv`.

    Ends the process like `parse`.
    """
    with _ending():
        words, own = _words(argv), flags_of(cls)
        _answer_help(words, own, None, about)
        return _build(cls, None, _read(words, own))


def options_and_recipe(
    cls: type[O],
    about: str,
    load: Callable[[O], Run],
    argv: Sequence[str] | None = None,
    shown: Run | None = None,
) -> tuple[O, Run]:
    """The options of a job that takes a recipe, and the recipe with its own flags applied.

    `load` gives the recipe that the options name. `--help` shows the values of `shown`, or of the
    recipe that is named beside it. A flag of both is the job's. Ends the process like `parse`.
    """
    with _ending():
        words, own = _words(argv), flags_of(cls)
        if HELP & set(words):
            known = shown or _named_recipe(cls, words, load)
            _answer_help(words, own, known or Run(), about, defaults=known is not None)
        mine, rest = _split(words, own)
        asked = _build(cls, None, _read(mine, own))
        return asked, _parse_recipe(rest, load(asked), [f.name for f in own if not f.position])


def command(
    commands: Mapping[str, type[Any]], about: str, argv: Sequence[str] | None = None
) -> tuple[str, Any]:
    """(name, options) of a job with commands: the first word names one, the others are its own.

    The docstring of a command's dataclass says what it does. Ends the process like `parse`.
    """
    with _ending():
        words = _words(argv)
        if not words or words[0] in ("-h", "--help", "--help-all"):
            print("\n".join(_command_help(commands, about)))
            raise SystemExit(0 if words else 2)
        name, *rest = words
        if name not in commands:
            near = nearest(name, commands)
            raise ConfigError(
                f"{shorten(printable(name), 80)}: needs one of {', '.join(commands)}.{near}"
            )
        cls, own = commands[name], flags_of(commands[name])
        _answer_help(rest, own, None, cls.__doc__, name)
        return name, _build(cls, None, _read(rest, own))


def _command_help(commands: Mapping[str, type[Any]], about: str) -> Iterator[str]:
    yield f"usage: {program()} COMMAND [OPTIONS]"
    yield ""
    yield about.strip()
    yield from ("", "commands (COMMAND --help lists the options of one):")
    for name, cls in commands.items():
        yield from flags_.entry(name, _summary(cls))


def _named_recipe(cls: type[O], words: Sequence[str], load: Callable[[O], Run]) -> Run | None:
    """The recipe that a command line names, if it is right but for its `--help`."""
    own = flags_of(cls)
    mine, _ = _split([word for word in words if word not in HELP], own)
    try:
        return load(_build(cls, None, _read(mine, own)))
    except ConfigError:
        return None


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        _complain(error)
        raise SystemExit(2) from None


def _words(argv: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if argv is None else argv)


def _parse_recipe(words: list[str], recipe: Run, others: Sequence[str] = ()) -> Run:
    show = "--show" in words
    words = [word for word in words if word != "--show"]
    words, recipe = _recipe_file(words, recipe)
    words, recipe = _kinds(words, recipe)
    _refuse_other_kinds(words, recipe)
    run = _build(Run, recipe, _read(words, flags_of(Run, recipe), others))
    if show:
        print(to_json(run))
        raise SystemExit(0)
    return run


def _recipe_file(words: list[str], recipe: Run) -> tuple[list[str], Run]:
    """Take out `--recipe FILE`; return the other words, and the recipe that the file holds."""
    rest, file = _option(words, "--recipe")
    if file is None:
        return rest, recipe
    try:
        return rest, from_json(Run, Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--recipe {file}: cannot be read ({error}). It needs a JSON file as --show prints it"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"--recipe {file}: {error}") from None


def _option(words: list[str], flag: str) -> tuple[list[str], str | None]:
    """Take out `flag VALUE` or `flag=VALUE`; the last one counts."""
    rest: list[str] = []
    value = None
    following = iter(words)
    for word in following:
        if word == flag:
            value = next(following, None)
            if value is None:
                raise ConfigError(f"{flag} needs a value")
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
    return rest, value


def _kinds(words: list[str], recipe: Run) -> tuple[list[str], Run]:
    """Take out `--optimizer sgd` and `optimizer:sgd`.

    Another kind than the recipe's comes with its own defaults.
    """
    for union in UNIONS:
        words, name = _option(words, f"--{union}")
        for word in [word for word in words if word.startswith(f"{union}:")]:
            words.remove(word)
            name = word.partition(":")[2]
        if name is None:
            continue
        known = {kind.__name__.lower(): kind for kind in get_args(hints(Run)[union])}
        kind = known.get(re.sub(r"[-_]", "", name.lower()))
        if kind is None:
            near = nearest(name.lower(), list(known))
            raise ConfigError(f"--{union} {name}: needs one of {', '.join(known)}.{near}")
        if not isinstance(getattr(recipe, union), kind):
            recipe = override(recipe, {union: kind()})
    return words, recipe


def _refuse_other_kinds(words: list[str], recipe: Run) -> None:
    """Answer a flag of a kind that was not chosen with the flag that chooses it."""
    for word in words:
        found = re.match(rf"--({'|'.join(UNIONS)})\.(?:no-)?([\w-]+)", word)
        if not found:
            continue
        union, field = found[1], found[2].replace("-", "_")
        chosen = type(getattr(recipe, union))
        others = [k.__name__ for k in get_args(hints(Run)[union]) if field in hints(k)]
        if field not in hints(chosen) and others:
            have = "have" if len(others) > 1 else "has"
            raise ConfigError(
                f"{word.split('=')[0]}: {chosen.__name__} has no {field}; "
                f"{' and '.join(others)} {have} it. "
                f"Add --{union} {others[0].lower()}, or leave it out"
            )


def _all_recipe_flags() -> list[Flag]:
    """The flags of every kind of loss, optimizer and schedule."""
    found = {flag.name: flag for flag in flags_of(Run, Run())}
    for union in UNIONS:
        for kind in get_args(hints(Run)[union]):
            found |= {f.name: f for f in flags_of(kind, kind(), f"{union}.")}
    return list(found.values())


def _split(words: list[str], own: Sequence[Flag]) -> tuple[list[str], list[str]]:
    """(words of the job's own flags and its plain words, words of the recipe's flags)."""
    mine: list[str] = []
    rest: list[str] = []
    own_names = {name for flag in own for name in flag.names if not flag.position}
    arity = {name: flag.words for flag in _all_recipe_flags() for name in flag.names}
    arity |= {f"--{union}": 1 for union in UNIONS} | {"--recipe": 1, "--show": 0}
    arity |= {name: flag.words for flag in own for name in flag.names}
    following = list(words)
    while following:
        word = following.pop(0)
        name, equals, _ = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--"):
            to_recipe = word.split(":")[0] in UNIONS and ":" in word
            (rest if to_recipe else mine).append(word)
            continue
        target = mine if name in own_names else rest
        target.append(word)
        count = 0 if equals else arity.get(name)
        while following and count != 0 and not following[0].startswith("--"):
            target.append(following.pop(0))
            count = None if count is None else count - 1
    return mine, rest


# --- from words to values -------------------------------------------------------------------------


def _read(
    words: Sequence[str], flags: Sequence[Flag], others: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Path of each flag -> its words, with `--no-x` as ["False"].

    `others` are more names to suggest for one that does not exist. Raises ConfigError for unknown
    flags, stray words, and values that are missing or of another type.
    """
    by_name = {name: flag for flag in flags for name in flag.names if not flag.position}
    plain: list[str] = []
    found: dict[str, list[str]] = {}
    following = list(words)
    switch = ""
    while following:
        word = following.pop(0)
        if not _is_flag(word):
            if switch:
                raise ConfigError(
                    f"{word}: {switch} takes no value. {_opposite(by_name[switch], switch)}"
                )
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        flag = by_name.get(name)
        if flag is None:
            raise ConfigError(_unknown(name, [*by_name, *others]))
        values = [value] if equals else _values(flag, following)
        if flag.hint is bool:
            if equals:
                raise ConfigError(f"{word}: {name} takes no value. {_opposite(flag, name)}")
            values = [str(name == flag.name)]
        _check_values(flag, name, values)
        added = found.get(flag.path, []) if Repeatable in flag.extras else []
        found[flag.path] = [*added, *values]
        switch = name if flag.hint is bool and not any(f.position for f in flags) else ""
    return found | _plain_words(plain, flags, found)


def _unknown(name: str, known: Sequence[str]) -> str:
    """The message for a flag that does not exist; dashes do not count as likeness."""
    by_word = {flag.lstrip("-"): flag for flag in known}
    found = re.search(r"mean (.+)\?", nearest(name.lstrip("-"), by_word))
    advice = f"Did you mean {by_word[found[1]]}?" if found else "--help lists the options"
    return f"unknown option {shorten(printable(name), 80)}. {advice}"


def _is_flag(word: str) -> bool:
    """Whether it is a flag; -1 and -1e-3 are numbers."""
    return word.startswith("-") and not re.fullmatch(r"-|-\.?\d.*", word)


def _opposite(flag: Flag, name: str) -> str:
    other = flag.names[1] if name == flag.name else flag.name
    return f"{other} is its opposite"


def _values(flag: Flag, following: list[str]) -> list[str]:
    """Take the words of `flag` from the front of `following`."""
    optional = next((e for e in flag.extras if isinstance(e, OptionalFile)), None)
    if optional is not None:
        is_file = bool(following) and following[0].endswith(optional.suffix)
        return [following.pop(0)] if is_file else ["-"]
    count = len(following) if flag.words is None else flag.words
    if following and count > 1 and following[0].count(",") == count - 1:
        return following.pop(0).split(",")
    taken: list[str] = []
    while following and len(taken) < count and not _is_flag(following[0]):
        taken.append(following.pop(0))
    return taken


def _check_values(flag: Flag, name: str, values: list[str]) -> None:
    """Replace former names of values, and raise ConfigError for words that cannot be values."""
    if flag.words is not None and flag.words and len(values) != flag.words:
        words = "a value" if flag.words == 1 else f"{flag.words} values"
        raise ConfigError(f"{name} needs {words}: {name} {flag.metavar}")
    for extra in flag.extras:
        if isinstance(extra, FormerValue):
            values[:] = [extra.new if value == extra.old else value for value in values]
    if Commas in flag.extras:
        values[:] = [part for value in values for part in value.split(",") if part]
    kinds: tuple[Any, ...] = (flag.hint,)
    if get_origin(flag.hint) is tuple:
        kinds = get_args(flag.hint)
        if Ellipsis in kinds:
            kinds = (kinds[0],) * len(values)
    for value, kind in zip(values, kinds):
        _check_value(f"{name} {shorten(printable(value), 80)}", value, kind)


def _check_value(said: str, value: str, kind: Any) -> None:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        choices = list(map(str, get_args(kind)))
        if value not in choices:
            near = nearest(value, choices)
            raise ConfigError(f"{said}: needs one of {', '.join(choices)}.{near}")
    elif kind in (int, float):
        try:
            kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{said}: needs {what}") from None


def _plain_words(
    plain: list[str], flags: Sequence[Flag], found: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The words without a flag, by the positions they fill."""
    placed: dict[str, list[str]] = {}
    left = list(plain)
    for flag in (f for f in flags if f.position):
        count = len(left) if flag.words is None else flag.words
        taken, left = left[:count], left[count:]
        if taken:
            placed[flag.path] = taken
    if left:
        raise ConfigError(f"unexpected word {shorten(printable(left[0]), 80)!r}")
    missing = [f for f in flags if f.needed and f.path not in {**found, **placed}]
    if missing:
        flag = missing[0]
        said = flag.metavar if flag.position else f"{flag.name} {flag.metavar}"
        raise ConfigError(f"{said} is missing: {flag.text}")
    return placed


def _build(cls: type[O], default: Any, found: Mapping[str, list[str]]) -> O:
    """An instance of `cls` from the words of its flags."""
    words: list[str] = []
    for path, values in found.items():
        flag = f"--{path.replace('_', '-')}"
        section, dot, leaf = flag.removeprefix("--").rpartition(".")
        if values == ["False"]:
            words.append(f"--{section}{dot}no-{leaf}")
        elif values == ["True"]:
            words.append(flag)
        elif len(values) == 1:
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *values]
    given = {} if default is None else {"default": default}
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(cls, args=words, config=(tyro.conf.AvoidSubcommands,), **given)
    except SystemExit:
        raise ConfigError(_without_frame(message.getvalue())) from None


def _without_frame(text: str) -> str:
    """tyro's message as one line: without its box, its title and its advice."""
    lines = [line.strip("│| ") for line in text.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.strip("─-╰╯+"):
            kept.append(line)
        elif kept:
            break
    return re.sub(r"^Error parsing (?!--)[\w. {}]+: ", "", " ".join(kept)).strip()


# --- help -----------------------------------------------------------------------------------------


def _answer_help(
    words: Sequence[str],
    own: Sequence[Flag],
    recipe: Run | None,
    about: str | None,
    command: str = "",
    defaults: bool = True,
) -> None:
    """Print a help text and end the process, if one was asked for."""
    if not HELP & set(words):
        return
    everything = "--help-all" in words
    only: list[str] = []
    if everything and recipe is not None:
        following = words[words.index("--help-all") + 1 :]
        only = [word for word in following if word in _sections(recipe)]
        words_of_the_job = any(flag.position for flag in own)
        stray = [w for w in following if w not in only and not w.startswith("-")]
        stray = [] if words_of_the_job else stray
        if stray:
            near = nearest(stray[0], _sections(recipe))
            raise ConfigError(f"--help-all {stray[0]}: there is no such section.{near}")
    lines = _help(
        own,
        recipe,
        (about or Run.__doc__ or "").strip(),
        usage=flags_.usage(f"{program()} {command}".strip(), own),
        everything=everything,
        only=only,
        defaults=defaults,
    )
    print("\n".join(lines))
    raise SystemExit(0)


def program() -> str:
    """How the job is started, for `usage:` and for advice."""
    return f"python jobs/{Path(sys.argv[0]).name}"


def _help(
    own: Sequence[Flag],
    recipe: Run | None,
    about: str,
    *,
    usage: str,
    everything: bool,
    only: Sequence[str],
    defaults: bool,
) -> Iterator[str]:
    """The lines of a help text.

    `everything` lists all settings of the recipe, `only` those of some sections; without
    `defaults` it leaves their values out.
    """
    settings = [] if recipe is None else flags_of(Run, recipe)
    if not defaults:
        settings = [dataclasses.replace(flag, default=None) for flag in settings]
    if recipe is not None and only:
        yield from _all_settings(recipe, settings, only)
        return
    yield from (usage, "", about)
    first = flags_.by_importance([flag for flag in own if flag.path not in LAST])
    common = [flag for flag in first if flags_.Common in flag.extras]
    if common:
        yield from ("", "options that are used most:", *flags_.describe(common))
        first = [flag for flag in first if flag not in common]
    if first:
        yield from ("", "more options:" if common else "options:", *flags_.describe(first))
    if recipe is not None and everything:
        yield from _all_settings(recipe, settings)
    elif recipe is not None:
        yield from _most_used(recipe, settings, {flag.path for flag in own})
    yield ""
    yield from flags_.describe([flag for flag in own if flag.path in LAST])
    if recipe is not None:
        if "recipe" not in {flag.path for flag in own}:
            yield from flags_.entry("--recipe FILE", "Start from a recipe in JSON instead.")
        yield from flags_.entry("--show", "Print the recipe as JSON and end.")
        yield from flags_.entry("--help-all [SECTION]", "Print all settings, or those of one.")
    yield from flags_.entry("-h, --help", "Print this text.")


def _most_used(recipe: Run, settings: Sequence[Flag], taken: set[str]) -> Iterator[str]:
    by_path = {flag.path: flag for flag in settings}
    used = [by_path[path] for path in MOST_USED if path in by_path and path not in taken]
    yield from ("", "the recipe's settings that are used most:", *flags_.describe(used))
    yield from _kinds_of(recipe)
    yield from ("", "all settings of the recipe (listed by --help-all):")
    for section, cls in _sections(recipe).items():
        count = sum(path.startswith(f"{section}.") for path in by_path)
        yield from flags_.entry(f"--{section}.*", f"{count:2}: {_summary(cls)}")


def _kinds_of(recipe: Run) -> Iterator[str]:
    yield from ("", "kinds, each with its own settings (* is the recipe's):")
    for union in UNIONS:
        chosen = type(getattr(recipe, union))
        kinds = get_args(hints(Run)[union])
        marked = [k.__name__.lower() + ("*" if k is chosen else "") for k in kinds]
        yield from flags_.entry(f"--{union} KIND", "  ".join(marked))


def _all_settings(recipe: Run, settings: Sequence[Flag], only: Sequence[str] = ()) -> Iterator[str]:
    """All settings by section, or those of the sections `only`."""
    if not only:
        yield from _kinds_of(recipe)
        yield from ("", "the run:")
        yield from flags_.describe([flag for flag in settings if "." not in flag.path])
    for section, cls in _sections(recipe).items():
        if only and section not in only:
            continue
        kind = f" ({cls.__name__.lower()})" if section in UNIONS else ""
        yield ""
        yield textwrap.fill(f"{section}{kind}: {_summary(cls)}", WIDTH)
        yield from flags_.describe([f for f in settings if f.path.startswith(f"{section}.")])


def _sections(recipe: Run) -> dict[str, type]:
    found: dict[str, type] = {}
    for name in hints(Run):
        value = getattr(recipe, name)
        if isinstance(value, Settings):
            found[name] = type(value)
    return found


def _summary(cls: type) -> str:
    """The first sentence of a section's docstring."""
    return " ".join((cls.__doc__ or "").split()).split(". ")[0].rstrip(".") + "."
