"""The command line of a recipe: `run = parse(PHASE2)` lets flags replace its settings. The only file that imports tyro.

Every leaf of `Run` is a flag (`--optimizer.lr 1e-3`), with its unit and default in `--help`. `--optimizer sgd` (or `optimizer:sgd`) changes
the kind of optimizer, likewise `--loss` and `--schedule`; `--recipe FILE` starts from a recipe in JSON; `--show` prints the result as such
a file and ends. No torch, ray or mlflow is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import tyro

import ftlib
from ftlib.config import Run
from ftlib.settings import ConfigError, Settings, from_json, hints, nearest, override, to_json

UNIONS = ("loss", "optimizer", "schedule")


def parse(recipe: Run, argv: Sequence[str] | None = None, about: str | None = None) -> Run:
    """The recipe with its settings replaced by the flags in `argv` (default: the process's own).

    `about` is the job's docstring, shown first in `--help`. Ends the process with exit code 0 after `--help` or `--show`, and with 2 and one
    clear message for anything wrong.
    """
    try:
        return _parse(recipe, list(sys.argv[1:] if argv is None else argv), about)
    except ConfigError as error:
        _complain(error)
        raise SystemExit(2) from None


def job(main: Callable[[], Any]) -> None:
    """Run a job's `main` and end the process as a shell expects: 0, or 1 after a failure, 2 after a mistake of the user's, 130/143 after a
    signal. Mistakes and known faults print one message; only unknown ones a traceback (FTLIB_TRACEBACK=1 prints it for all)."""
    try:
        _same_checkout(main)
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it stopped.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader (`| head`) went away: nothing more to say
        raise SystemExit(0) from None
    except Exception as error:
        if not explained(error) or os.environ.get("FTLIB_TRACEBACK"):
            traceback.print_exc()
        else:
            _complain(error)
        raise SystemExit(2 if isinstance(error, ValueError) and explained(error) else 1) from None


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


def explained(error: BaseException) -> bool:
    """Whether the message says by itself what is wrong and what to do: true of the exceptions that ftlib defines."""
    return type(error).__module__.split(".")[0] == "ftlib"


def _complain(error: BaseException) -> None:
    print(f"error: {error}", file=sys.stderr)


def _parse(recipe: Run, argv: list[str], about: str | None) -> Run:
    argv, show = _without(argv, "--show")
    argv, recipe = _recipe_file(argv, recipe)
    argv, recipe = _kinds(argv, recipe)
    _foreign(argv, recipe)
    run = tyro.cli(
        Run,
        default=recipe,
        args=argv,
        description=_description(recipe, about),
        config=(tyro.conf.AvoidSubcommands,),
    )
    if show:
        print(to_json(run))
        raise SystemExit(0)
    return run


def _without(argv: list[str], flag: str) -> tuple[list[str], bool]:
    return [a for a in argv if a != flag], flag in argv


def _recipe_file(argv: list[str], recipe: Run) -> tuple[list[str], Run]:
    """Take out `--recipe FILE` and return the recipe it holds."""
    rest, file = _option(argv, "--recipe")
    if file is None:
        return rest, recipe
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--recipe {file}: cannot be read ({error}). It needs a JSON file as --show prints it"
        ) from None
    try:
        return rest, from_json(Run, text)
    except ConfigError as error:
        raise ConfigError(f"--recipe {file}: {error}") from None


def _option(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Take out `flag VALUE` or `flag=VALUE`; the last one counts."""
    rest: list[str] = []
    value = None
    words = iter(argv)
    for word in words:
        if word == flag:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{flag} needs a value")
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
    return rest, value


def _kinds(argv: list[str], recipe: Run) -> tuple[list[str], Run]:
    """Take out `--optimizer sgd` and `optimizer:sgd`. The named kind comes with its own defaults, unless it is the recipe's own kind."""
    for union in UNIONS:
        argv, name = _option(argv, f"--{union}")
        for word in [a for a in argv if a.startswith(f"{union}:")]:
            argv.remove(word)
            name = word.partition(":")[2]
        if name is None:
            continue
        known = {k.__name__.lower(): k for k in get_args(hints(Run)[union])}
        kind = known.get(re.sub(r"[-_]", "", name.lower()))
        if kind is None:
            raise ConfigError(
                f"--{union} {name}: needs one of {', '.join(known)}.{nearest(name.lower(), list(known))}"
            )
        if not isinstance(getattr(recipe, union), kind):
            recipe = override(recipe, {union: kind()})
    return argv, recipe


def _foreign(argv: list[str], recipe: Run) -> None:
    """A flag of a kind that was not chosen is answered with the flag that chooses it."""
    for word in argv:
        found = re.match(rf"--({'|'.join(UNIONS)})\.(?:no-)?([\w-]+)", word)
        if not found:
            continue
        union, field = found[1], found[2].replace("-", "_")
        chosen: type[Settings] = type(getattr(recipe, union))
        others = [k.__name__ for k in get_args(hints(Run)[union]) if field in hints(k)]
        if field not in hints(chosen) and others:  # type: ignore[arg-type]
            raise ConfigError(
                f"{word.split('=')[0]}: {chosen.__name__} has no {field}; {' and '.join(others)} {'have' if len(others) > 1 else 'has'} it. "
                f"Add --{union} {others[0].lower()}, or leave it out"
            )


def _description(recipe: Run, about: str | None) -> str:
    """The head of --help: the job's own words, then what flags alone do not show."""
    lines = [
        (about or Run.__doc__ or "").strip(),
        "",
        "Choose the kind with one flag, then set it like everything else (--optimizer sgd --optimizer.lr 0.5):",
    ]
    for union in UNIONS:
        chosen = type(getattr(recipe, union))
        names = [
            k.__name__.lower() + ("*" if k is chosen else "") for k in get_args(hints(Run)[union])
        ]
        lines.append(f"  --{union:<10} {'  '.join(names)}")
    lines += [
        "  (* is chosen now; the flags below are its)",
        "",
        "  --recipe FILE  start from a recipe in JSON instead",
        "  --show         print the recipe as JSON and end",
    ]
    return "\n".join(lines)
