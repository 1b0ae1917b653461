"""Where things are kept, commands to paste, and the environment of processes."""

import os
import sys

import pytest

import ftlib
from ftlib.paths import (
    environment_variables,
    job_command,
    jobs_folder,
    run_words,
    spaces_folder,
)


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("FTLIB_A", "old")
    monkeypatch.delenv("FTLIB_B", raising=False)
    with pytest.raises(RuntimeError), environment_variables(FTLIB_A="new", FTLIB_B="new"):
        assert os.environ["FTLIB_A"] == os.environ["FTLIB_B"] == "new"
        raise RuntimeError
    assert os.environ["FTLIB_A"] == "old" and "FTLIB_B" not in os.environ


def test_a_command_names_a_run_by_what_finds_it(home):
    assert run_words(str(home / "runs" / "r")) == "r"
    assert run_words("/elsewhere/my runs/r") == "'/elsewhere/my runs/r'"
    assert run_words("s3://bucket/runs/r") == "s3://bucket/runs/r"


def test_jobs_and_spaces_are_found_beside_the_package_and_inside_it(tmp_path, monkeypatch):
    """Beside it in a checkout, inside it where a wheel was installed."""
    package = tmp_path / "ftlib"
    package.mkdir()
    monkeypatch.setattr(ftlib, "__file__", str(package / "__init__.py"))
    assert (jobs_folder(), spaces_folder()) == (tmp_path / "jobs", tmp_path / "tune_spaces")
    (package / "jobs").mkdir()
    (package / "tune_spaces").mkdir()
    assert (jobs_folder(), spaces_folder()) == (package / "jobs", package / "tune_spaces")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with jobs/ and an environment in .venv, started from it."""
    for folder in ("jobs", ".venv/bin", "my work"):
        (tmp_path / folder).mkdir(parents=True)
    for program in ("python", "ftlib"):
        (tmp_path / ".venv/bin" / program).write_text("#!/bin/sh\n")
        (tmp_path / ".venv/bin" / program).chmod(0o755)
    monkeypatch.setattr(ftlib, "__file__", str(tmp_path / "ftlib" / "__init__.py"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "jobs/prepare.py"])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_fits_the_folder_and_the_python_that_the_shell_finds(checkout, monkeypatch):
    assert job_command("probe", "pets") == ".venv/bin/python jobs/probe.py pets"
    monkeypatch.setenv("PATH", f"{checkout}/.venv/bin:/usr/bin:/bin")
    assert job_command("probe", "pets") == "python jobs/probe.py pets"
    monkeypatch.chdir(checkout / "my work")
    assert job_command("probe") == f"python {checkout}/jobs/probe.py"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert job_command("probe") == f"{checkout}/.venv/bin/python {checkout}/jobs/probe.py"


def test_a_command_is_ftlibs_where_ftlib_was_typed(checkout, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", f"{checkout}/.venv/bin/ftlib", "prepare"])
    assert job_command("probe", "pets") == ".venv/bin/ftlib probe pets"
    monkeypatch.setenv("PATH", f"{checkout}/.venv/bin:/usr/bin:/bin")
    assert job_command("probe", "pets") == "ftlib probe pets"


def test_a_command_that_a_cluster_prints_is_that_of_a_checkout(checkout, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.chdir("/")
    assert job_command("probe", "pets") == "python jobs/probe.py pets"
