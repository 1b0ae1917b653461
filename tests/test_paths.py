"""Where things are kept, and the environment of processes."""

import os

import pytest

import ftlib
from ftlib.paths import environment_variables, jobs_folder, spaces_folder


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("FTLIB_A", "old")
    monkeypatch.delenv("FTLIB_B", raising=False)
    with pytest.raises(RuntimeError), environment_variables(FTLIB_A="new", FTLIB_B="new"):
        assert os.environ["FTLIB_A"] == os.environ["FTLIB_B"] == "new"
        raise RuntimeError
    assert os.environ["FTLIB_A"] == "old" and "FTLIB_B" not in os.environ


def test_jobs_and_spaces_are_found_beside_the_package_and_inside_it(tmp_path, monkeypatch):
    """Beside it in a checkout, inside it where a wheel was installed."""
    package = tmp_path / "ftlib"
    package.mkdir()
    monkeypatch.setattr(ftlib, "__file__", str(package / "__init__.py"))
    assert (jobs_folder(), spaces_folder()) == (tmp_path / "jobs", tmp_path / "tune_spaces")
    (package / "jobs").mkdir()
    (package / "tune_spaces").mkdir()
    assert (jobs_folder(), spaces_folder()) == (package / "jobs", package / "tune_spaces")
