"""What keeps the code readable: short functions, named arguments, imports that point one way."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "ftlib").rglob("*.py")) + sorted((ROOT / "jobs").glob("*.py"))
LONGEST, MOST_POSITIONAL = 60, 5
LONG_FOR_A_REASON = {
    "mixing_section": "one row per kind of mixing, in the order of the sheet",
    "measure": "the pieces of an epoch, measured one after the other",
    "package": "one package, written file by file in the order that a reader finds them",
    "prepare": "most of it is the documentation of its arguments",
    "score": "half of it is the documentation of its arguments",
    "benchmark": "the table of loaders is read as a whole",
    "execute": "Tune's settings, each with the reason for its value",
    "paired_difference": "one derivation, step by step",
}
FLOORS = [
    {
        "console",
        "settings",
        "text",
        "clock",
        "cpus",
        "gc_pause",
        "process_identity",
        "picture",
        "lettering",
    },
    {"storage", "config"},
    {
        "console",
        "paths",
        "checks",
        "recipes",
        "flags",
        "cli",
        "command",
        "runs",
        "settings_reference",
    },
    {"data"},
    {"preparation", "training"},
    {"track", "packaging", "report"},
    {"launch", "deploy"},
    {"tune"},
    {"benchmark", "api"},
]
"""Rooms from the ground up. A room imports its own floor and those below; jobs import all."""


def functions():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file.relative_to(ROOT), node


def test_no_function_is_long_without_a_reason():
    long = {
        f"{file}:{node.name} {node.end_lineno - node.lineno + 1}"
        for file, node in functions()
        if node.end_lineno - node.lineno + 1 > LONGEST and node.name not in LONG_FOR_A_REASON
    }
    assert not long


def test_no_call_has_more_than_five_positional_arguments():
    piles = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) == "struct.pack":
                continue
            starred = any(isinstance(a, ast.Starred) for a in node.args)
            if len(node.args) > MOST_POSITIONAL and not starred:
                piles.append(f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}")
    assert not piles


def test_percentages_have_one_form():
    """12.3 %, by ftlib.text.percent; Python's own format leaves the space out."""
    pattern = re.compile(r":[^{}\"'\s]*%\}")
    wrong = [str(f.relative_to(ROOT)) for f in SOURCES if pattern.search(f.read_text("utf-8"))]
    assert not wrong


WRITES_HALF = re.compile(
    r"\.write_(?:text|bytes)$|\.savefig$|^(?:np\.save.*|pq\.write_table|save_file|shutil\.copy.*)$"
)
"""Calls that leave half a file behind on a full disk, unless they write into memory."""
WRITTEN_ELSEWHERE = {
    "ftlib/packaging/package.py": "below a temporary folder, which then gets its name",
    "ftlib/preparation/sources/builtin.py": "below a temporary folder, which then gets its name",
    "ftlib/track/tracker_actor.py": "a copy that is sent and deleted",
    "ftlib/track/writer.py": "a copy that the journal names only when it is whole",
    "ftlib/track/logged_model.py": "a copy that the journal names only when it is whole",
    "ftlib/track/journal.py": "a temporary file, which then gets its name",
    "ftlib/launch/lease.py": "a temporary file, which then gets its name",
    "ftlib/launch/worker.py": "a pointer of Ray's, of which nobody reads the contents",
    "ftlib/training/evaluate.py": "takes a file in memory too",
}


def test_results_are_written_whole_or_not_at_all():
    """All that a reader may find goes through storage.write_file and write_folder."""
    half = {}
    for file in (file for file in SOURCES if "benchmark" not in str(file.relative_to(ROOT))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            to = {ast.unparse(argument) for argument in node.args} if name else set()
            if WRITES_HALF.search(name) and not to & {"out", "buffer", "packed", "drawn"}:
                half.setdefault(str(file.relative_to(ROOT)), []).append(f"{node.lineno} {name}")
    assert {k: v for k, v in half.items() if k not in WRITTEN_ELSEWHERE} == {}
    assert set(WRITTEN_ELSEWHERE) <= set(half)


def imported_rooms(file):
    """Rooms of ftlib that a file imports at its top level, not inside functions."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ftlib":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_down(floor):
    allowed = set().union(*FLOORS[: floor + 1]) | {"__version__"}
    upward = []
    for room in FLOORS[floor]:
        file, folder = ROOT / "ftlib" / f"{room}.py", ROOT / "ftlib" / room
        for source in [file] if file.exists() else sorted(folder.rglob("*.py")):
            above = set(imported_rooms(source)) - allowed
            upward += [f"{source.relative_to(ROOT)} imports {name}" for name in sorted(above)]
    assert not upward


def imported_modules(tree, modules):
    """Names of the modules that a file imports when it is imported or later, not for types only."""
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    skipped = {id(node) for block in typing for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped or node.level:
            continue
        for alias in node.names:
            yield from {node.module, f"{node.module}.{alias.name}"} & modules


def test_no_imports_go_in_a_circle():
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in SOURCES}
    graph = {
        name: set(imported_modules(ast.parse(file.read_text(encoding="utf-8")), set(files)))
        - {name}
        for name, file in files.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_room_has_its_floor():
    rooms = {p.stem for p in (ROOT / "ftlib").glob("*.py")} - {"__init__", "__main__"}
    rooms |= {p.parent.name for p in (ROOT / "ftlib").glob("*/__init__.py")}
    assert rooms == set().union(*FLOORS)


def test_every_module_has_its_tests():
    """By its name, or named in the docstring of a test file."""
    named = {p.stem.removeprefix("test_") for p in (ROOT / "tests").rglob("test_*.py")}
    words = " ".join(
        (ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "")
        for p in (ROOT / "tests").rglob("*.py")
    )
    missing = [
        str(file.relative_to(ROOT))
        for file in SOURCES
        if file.is_relative_to(ROOT / "ftlib")
        and file.stem not in named | {"__init__"}
        and file.stem not in words
    ]
    assert not missing
