"""Where things are kept, and the environment of processes."""

import os

import pytest

from ftlib.paths import environment


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("FTLIB_A", "old")
    monkeypatch.delenv("FTLIB_B", raising=False)
    with pytest.raises(RuntimeError), environment(FTLIB_A="new", FTLIB_B="new"):
        assert os.environ["FTLIB_A"] == os.environ["FTLIB_B"] == "new"
        raise RuntimeError
    assert os.environ["FTLIB_A"] == "old" and "FTLIB_B" not in os.environ
