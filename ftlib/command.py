"""The `ftlib` command: `ftlib phase2 --mix.mixup-alpha 0.4` runs jobs/phase2.py.

`ftlib --help` lists the jobs with a line each. Nothing but the standard library is imported before
the job itself starts, so that the list answers at once.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches

from ftlib import __version__
from ftlib.paths import jobs_folder

SECTIONS = {
    "Data": ("prepare", "audit", "preview"),
    "Training": (
        *("probe", "finetune", "from_scratch_short", "from_scratch_long"),
        *("phase1", "phase2", "phase3", "find_lr", "estimate"),
    ),
    "Search": ("sweep", "promote", "compare"),
    "Results": ("evaluate", "replay", "track"),
    "Delivery": ("export", "predict", "serve"),
    "Project": ("sample", "benchmark"),
}
"""The order of the list. A job that is missing here is listed under "More"."""

COMPLETION = {
    "bash": """_ftlib() {
  local IFS=$'\\n'
  COMPREPLY=($(compgen -W "$(ftlib --complete "${COMP_WORDS[1]}" "$COMP_CWORD")" -- \
"${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _ftlib ftlib""",
    "zsh": """#compdef ftlib
_ftlib() { compadd -- $(ftlib --complete "${words[2]}" "$((CURRENT - 1))"); _files }
compdef _ftlib ftlib""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that the first word names, with the other words as its options.

    Ends the process with the job's exit code, or with 2 for a job that does not exist.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
    elif words[0] in ("-V", "--version"):
        print(f"ftlib {__version__}")
    elif words[0] == "--completion":
        print(completion_script(words[1:]))
    elif words[0] == "--complete":
        print("\n".join(candidates(words[1:])))
    elif words[0].startswith("-"):
        near = get_close_matches(words[0], ("--help", "--version", "--completion"), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"error: there is no option {words[0][:40]}.{hint} A job comes first: `ftlib --help` "
            "lists them.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    else:
        run_job(words[0], words[1:])


def jobs() -> dict[str, str]:
    """Name of each job -> the first line of its docstring."""
    found = {}
    for path in sorted(jobs_folder().glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = " ".join(text.split("\n\n")[0].split())
    return found


def overview() -> str:
    """What `ftlib --help` prints: all jobs in sections, each with what it does."""
    known = jobs()
    listed = {name for names in SECTIONS.values() for name in names}
    sections = {**SECTIONS, "More": tuple(name for name in known if name not in listed)}
    lines = ["usage: ftlib JOB [OPTIONS]", "", "Fine-tune image classifiers on clusters.", ""]
    for title, names in sections.items():
        there = [name for name in names if name in known]
        if there:
            lines += [f"{title}:", *(f"  {n:<18}  {shortened(known[n])}" for n in there), ""]
    lines += [
        "`ftlib JOB --help` lists a job's options; `python jobs/JOB.py` runs the same code.",
        "`ftlib --completion bash` (or zsh) prints a completion script for your shell.",
        "`ftlib --version` prints the version.",
    ]
    return "\n".join(lines)


def shortened(sentence: str, width: int = 78) -> str:
    """The sentence, or its beginning where it does not fit beside a job's name in 100 columns."""
    cut = textwrap.shorten(sentence, width, placeholder="")
    whole = re.match(r"(.{20,}?)[,:;] (?!\d)", cut) if cut != sentence else None
    return (whole[1] if whole else cut).rstrip(".")


def run_job(name: str, options: list[str]) -> None:
    """Run jobs/NAME.py as `python jobs/NAME.py` would, in this process."""
    path = jobs_folder() / f"{name.removesuffix('.py').replace('-', '_')}.py"
    if not path.is_file() or path.stem.startswith("_"):
        near = get_close_matches(name, jobs(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"error: there is no job {name[:40]}.{hint} `ftlib --help` lists them.", file=sys.stderr
        )
        raise SystemExit(2)
    sys.argv = [str(path), *options]
    runpy.run_path(str(path), run_name="__main__")


def completion_script(shells: Sequence[str]) -> str:
    """A script that makes TAB complete jobs and options. The shell defaults to $SHELL."""
    shell = shells[0] if shells else os.path.basename(os.environ.get("SHELL", "bash"))
    if shell not in COMPLETION:
        print(f"error: --completion {shell}: needs bash or zsh", file=sys.stderr)
        raise SystemExit(2)
    return COMPLETION[shell]


def candidates(words: Sequence[str]) -> list[str]:
    """What may stand at position `words[1]` of a command line for the job `words[0]`."""
    job, position = (*words, "", "1")[:2]
    if position == "1":
        return sorted(jobs())
    if job not in jobs():
        return []
    return option_names(job)


def option_names(job: str) -> list[str]:
    """The flags of a job, read from its longest help text."""
    import contextlib
    import io

    text = io.StringIO()
    for flag in ("--help-all", "--help"):
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
        ):
            run_job(job, [flag])
        if "--" in text.getvalue():
            break
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text.getvalue())))


if __name__ == "__main__":
    main()
