"""README and docs: links lead somewhere, commands parse, and names of files and settings exist.

Also holds the test of `ftlib.settings_reference`, which writes docs/settings.md.
"""

import ast
import re
import runpy
import shlex
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from ftlib import cli, command, settings_reference
from ftlib.config import Run
from ftlib.flags import flags_of
from ftlib.paths import jobs_folder, spaces_folder
from ftlib.settings import Settings, hints, to_json
from ftlib.track import background

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = ("", "bash", "sh", "console")
JOB = re.compile(
    r"^(?:[A-Z_]+=\S+ |eval \"\$\(|.*submit .*-- |sbatch .*slurm\.sh |while true; do )*"
    r"(?:\S*python3? jobs/(\w+)\.py|ftlib ([a-z][\w-]*))(?=[\s;)]|$)"
)
PLACEHOLDERS = ("JOB", "NAME", "X")
VALUES = {"%a": "0", "S": "1"}
"""What stands for placeholders where a number is wanted."""
OTHER_PROGRAMS = (
    "--artifacts-destination",
    "--completion",
    "--require-hashes",
    "--shm-size",
    "--signal",
)
"""Flags of programs that are no job of ftlib."""
PIPELINE = '{"transform": {"__class_fullname__": "RandomFog", "p": 0.2}}'


def relative(page):
    return str(page.relative_to(ROOT))


def pages(pages_=PAGES):
    return pytest.mark.parametrize("page", pages_, ids=relative)


# --- links ----------------------------------------------------------------------------------------


def anchors(page):
    """GitHub's anchors of a page's headings."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    counts = Counter()
    for slug in slugs:
        yield f"{slug}-{counts[slug]}" if counts[slug] else slug
        counts[slug] += 1


@pages()
def test_relative_links_and_anchors_resolve(page):
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{relative(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{relative(page)} links to {target}: no such heading"


def test_readme_links_every_page():
    linked = set(LINK.findall((ROOT / "README.md").read_text("utf-8")))
    missing = {relative(page) for page in PAGES if page.parent != ROOT} - linked
    assert not missing, f"README.md has no link to {sorted(missing)}"


# --- layout ---------------------------------------------------------------------------------------


@pages()
def test_lines_end_at_100_columns(page):
    """But for tables, addresses and what stands in code blocks."""
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text("utf-8"))
    long = [
        f"{relative(page)}:{number}"
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > 100 and not line.lstrip().startswith("|") and "://" not in line
    ]
    assert not long, f"longer than 100 columns: {', '.join(long)}"


def test_no_table_is_in_two_pages():
    """Tables of facts: one that shares most of its rows' names with another says them twice."""
    tables = {}
    for page in PAGES:
        if page.name == "settings.md":
            continue
        for block in re.findall(r"(?:^\|.*\n){3,}", page.read_text("utf-8"), re.MULTILINE):
            rows = [line.strip().strip("|").split("|")[0].strip() for line in block.splitlines()]
            tables[relative(page), rows[0], rows[2]] = set(rows[2:])
    for one, rows in tables.items():
        for other, theirs in tables.items():
            # A few names in common are no copy: the README's table of jobs has names like theirs.
            if one < other and len(rows) > 4:
                assert len(rows & theirs) * 2 < len(rows), f"{one} and {other} have the same rows"


# --- names ----------------------------------------------------------------------------------------


def code_spans(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pages()
def test_files_that_are_named_exist(page):
    for span in code_spans(page):
        path, *tests = re.sub(r":\d+$", "", span.split(": ")[0]).split("::")
        if not re.fullmatch(r"(ftlib|jobs|tests|tune_spaces|docs)/[\w./-]+", path):
            continue
        if "..." in span or any(word in path for word in PLACEHOLDERS):
            continue
        assert (ROOT / path).exists(), f"{relative(page)} names {path}, which does not exist"
        for test in tests:
            text = (ROOT / path).read_text("utf-8")
            assert f"def {test}" in text, f"{relative(page)} names {span}, which does not exist"


def settings_paths():
    """Every dotted path into `Run`, of every kind of loss, optimizer and schedule."""
    found = {flag.path for flag in flags_of(Run, Run())}
    for section, hint in hints(Run).items():
        for kind in get_args(hint):
            if isinstance(kind, type) and issubclass(kind, Settings):
                found |= {flag.path for flag in flags_of(kind, kind(), f"{section}.")}
    return found


@pages()
def test_settings_that_are_named_exist(page):
    known = settings_paths()
    sections = {path.partition(".")[0] for path in known if "." in path}
    for span in code_spans(page):
        path = re.split(r"[ =\[]", span)[0]
        if not re.fullmatch(rf"({'|'.join(sections)})\.[a-z_0-9]+", path):
            continue
        if re.search(r"\.(py|json|yaml|csv|txt|npy|parquet|safetensors)$", path):
            continue
        assert path in known, f"{relative(page)} names the setting {path}, which does not exist"


@pages()
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    code = [block for _, block in FENCE.findall(page.read_text("utf-8"))]
    for text in [*code, *code_spans(page)]:
        for target in re.findall(r"^make (?:[A-Z]+=\S+ )*([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{relative(page)}: there is no `make {target}`"


def python_blocks():
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text("utf-8")):
            if language == "python":
                yield pytest.param(block, id=f"{relative(page)}: {block.splitlines()[0][:40]}")


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_examples_use_names_that_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ftlib"):
            module = ROOT.joinpath(*node.module.split("."))
            file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ftlib":
            file, names = ROOT / "ftlib" / "__init__.py", [node.attr]
        else:
            continue
        for name in names:
            assert re.search(rf"\b{name}\b", file.read_text("utf-8")), f"{file} has no {name}"


def test_pages_that_code_names_exist():
    for folder in ("ftlib", "jobs", "tune_spaces", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[a-z_-]+\.md\b", file.read_text("utf-8")):
                assert (ROOT / name).is_file(), f"{relative(file)} names {name}: no such page"


# --- commands -------------------------------------------------------------------------------------


def commands():
    """(page, job, words) of every command line of a job that README and docs print."""
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [
            line
            for shell, block in FENCE.findall(text)
            if shell in SHELLS
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"^    (.*\bjobs/.*)$", FENCE.sub("", text), re.MULTILINE)
        spans = code_spans(page)
        for line in [*lines, *spans]:
            found = JOB.search(line)
            if found is None or (found[1] or found[2]) in PLACEHOLDERS or "..." in line:
                continue
            lexer = shlex.shlex(
                line[found.end() :].split(')"')[0], posix=True, punctuation_chars=";|&>)"
            )
            lexer.wordchars += ":%,@=+*{}[]$^!"
            words = list(lexer)
            if not words and line in spans:
                continue  # the job by its name
            stop = next((i for i, word in enumerate(words) if word[0] in ";|&>)"), len(words))
            yield relative(page), found[1] or found[2], words[:stop]


def case(page, job, words):
    return pytest.param(page, job, words, id=f"{page}: {job} {' '.join(words)}"[:90])


class ParsedError(Exception):
    """Raised when a job has read its command line."""


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """Jobs end when they have read their command line. Folders and files of the examples exist."""

    def parsing(name):
        real = getattr(cli, name)

        def parse(*args, **kwargs):
            real(*args, **kwargs)
            raise ParsedError

        return parse

    for name in ("options", "options_and_recipe", "command"):
        monkeypatch.setattr(cli, name, parsing(name))
    from ftlib.launch import train_job

    monkeypatch.setattr(train_job, "options_and_recipe", cli.options_and_recipe)
    monkeypatch.setattr(background, "delivery", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_examples(folder, words):
    for word in words:
        file = folder / word
        if file.suffix in (".json", ".yaml"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(to_json(Run()) if file.suffix == ".json" else PIPELINE)
        elif re.fullmatch(r"[A-Z_0-9]+", word):
            file.mkdir(exist_ok=True)


@pytest.mark.parametrize("page, job, words", [case(*found) for found in commands()])
def test_commands_parse(page, job, words, parse_only, monkeypatch, capsys):
    file = jobs_folder() / f"{job.replace('-', '_')}.py"
    assert file.is_file(), f"{page} prints a command of {job}, and there is no such job"
    make_examples(parse_only, words)
    words = [VALUES.get(word, word) for word in words]
    monkeypatch.setattr("sys.argv", [str(file), *words])
    main = runpy.run_path(str(file), run_name="docs")["main"]
    try:
        main()
    except ParsedError:
        pass
    except SystemExit as error:  # --help, --show
        assert not error.code, f"{page}: {job} {' '.join(words)}\n{capsys.readouterr().err}"
    if "--space" in words:
        space = words[words.index("--space") + 1]
        assert space.isupper() or (spaces_folder() / f"{space}.py").is_file()


@pytest.fixture(scope="module")
def known_flags():
    """Every flag of every job -> whether it takes no value."""
    recipe = cli._all_recipe_flags()
    found = {name: flag.hint is bool for flag in recipe for name in flag.names}
    found |= dict.fromkeys(("--show", "--help"), True)
    found |= dict.fromkeys(("--help-all", "--recipe", *(f"--{u}" for u in cli.UNIONS)), False)
    for file in jobs_folder().glob("[!_]*.py"):
        for value in runpy.run_path(str(file), run_name="docs").values():
            if isinstance(value, type) and issubclass(value, cli.JobOptions):
                flags = flags_of(value)
                found |= {name: flag.hint is bool for flag in flags for name in flag.names}
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "settings.md"], ids=relative)
def test_flags_that_are_named_exist(page, known_flags):
    for span in code_spans(page):
        flag, _, value = span.partition(" ")
        name = flag.partition("=")[0]
        if not flag.startswith("--") or name in OTHER_PROGRAMS:
            continue
        section = name.rstrip("*.") + "."
        assert name in known_flags or any(known.startswith(section) for known in known_flags), (
            f"{relative(page)} names {name}, and no job has that option"
        )
        if known_flags.get(name) and value:
            assert value.startswith("-"), f"{relative(page)}: {name} takes no value ({span})"


def test_the_first_page_names_every_job():
    text = (ROOT / "README.md").read_text("utf-8")
    missing = [job for job in command.jobs() if f"`{job}`" not in text and job != "sample"]
    assert not missing, f"README.md does not name {missing}"


# --- the settings' reference ----------------------------------------------------------------------


def test_the_settings_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == settings_reference.page(), (
        "write it again: python -m ftlib.settings_reference > docs/settings.md"
    )


def test_the_settings_page_has_every_setting_once_per_kind():
    rows = re.findall(r"^\| `([\w.]+)` \|", settings_reference.page(), re.MULTILINE)
    assert set(rows) == settings_paths()
    repeated = {path for path, count in Counter(rows).items() if count > 1}
    assert {path.partition(".")[0] for path in repeated} == {"loss", "optimizer", "schedule"}
