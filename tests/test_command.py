"""The `ftlib` command (also as `python -m ftlib`: `__main__`): list, jobs, completion, wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ftlib import command

ROOT = Path(__file__).resolve().parents[1]


def ftlib(*words, cwd=None, env=None):
    """Run the command in a process of its own, as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "ftlib.command", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=120,
    )


@pytest.fixture
def environment(monkeypatch):
    """The package under test, whatever is installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_help_lists_every_job_with_a_line_of_at_most_100_columns():
    text = command.overview()
    for job in (p.stem for p in (ROOT / "jobs").glob("[!_]*.py")):
        line = next(line for line in text.splitlines() if line.split()[:1] == [job])
        assert len(line) <= 100 and len(line.split()) > 2, line


def test_help_imports_nothing_heavy(environment):
    code = (
        "import sys; from ftlib import command; command.main(['--help']); "
        "print(sorted({'torch', 'ray', 'mlflow', 'tyro', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_typo_names_the_nearest_job_and_exits_with_2(environment, tmp_path):
    done = ftlib("phse2", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean phase2?" in done.stderr and "Traceback" not in done.stderr


def test_a_job_runs_with_its_options_and_its_exit_code(environment, tmp_path):
    shown = ftlib("phase2", "--mix.mixup-alpha", "0.4", "--show", cwd=tmp_path)
    assert shown.returncode == 0 and '"mixup_alpha": 0.4' in shown.stdout
    wrong = ftlib("phase2", "--mix.mixup-alhpa", "0.4", cwd=tmp_path)
    assert wrong.returncode == 2


def test_a_mistyped_option_gets_the_nearest_and_the_package_runs_as_a_module():
    typed = [sys.executable, "-m", "ftlib"]
    wrong = subprocess.run([*typed, "--versoin"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "Did you mean --version?" in wrong.stderr
    right = subprocess.run([*typed, "--version"], capture_output=True, text=True, timeout=60)
    assert right.stdout == f"ftlib {command.__version__}\n"


def test_completion_offers_jobs_and_then_the_flags_of_the_job():
    assert "sweep" in command.candidates(["", "1"])
    assert "--mix.mixup-alpha" in command.candidates(["phase2", "2"])
    assert command.candidates(["no-such-job", "2"]) == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_is_valid_in_its_shell(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = command.completion_script([shell])
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_bash_completes_a_job_and_a_flag(environment, tmp_path):
    executable = tmp_path / "ftlib"
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} -m ftlib.command "$@"\n')
    executable.chmod(0o755)
    script = f"""PATH={tmp_path}:$PATH
{command.completion_script(["bash"])}
COMP_WORDS=(ftlib pha); COMP_CWORD=1; _ftlib; echo "${{COMPREPLY[@]}}"
COMP_WORDS=(ftlib phase2 --mix.mixup); COMP_CWORD=2; _ftlib; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["phase1 phase2 phase3", "--mix.mixup-alpha"], done.stderr


def test_the_wheel_brings_jobs_and_spaces_and_works_from_another_folder(tmp_path, monkeypatch):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", "images")
    shutil.copytree(ROOT, source, ignore=kept, symlinks=True)
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, timeout=300)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(site)
    for folder, inside in (("ftlib", ""), ("jobs", "ftlib/"), ("tune_spaces", "ftlib/")):
        for file in (ROOT / folder).rglob("*.py"):
            assert inside + str(file.relative_to(ROOT)) in names
    assert "ftlib/py.typed" in names and any(n.endswith("LICENSE") for n in names)

    monkeypatch.setenv("PYTHONPATH", str(site))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "phase2" in ftlib("--help", cwd=elsewhere).stdout
    shown = ftlib("phase2", "--show", cwd=elsewhere)
    assert shown.returncode == 0 and '"stage": "phase2"' in shown.stdout, shown.stderr
    code = "from ftlib.paths import space_names; import ftlib; print(space_names(), ftlib.__file__)"
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere, timeout=120
    )
    assert "regularisation" in listed.stdout and str(site) in listed.stdout, listed.stderr
