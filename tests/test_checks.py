"""Quick answers to typing errors."""

import pytest

from ftlib import recipes
from ftlib.checks import check_data, nearest_path
from ftlib.data.shards import DataError
from ftlib.settings import ConfigError


def test_a_mistyped_path_gets_the_nearest_name_and_not_one_of_the_same_ending(tmp_path):
    for name in ("flowers", "Dockerfile", "README.md", "other.jpg"):
        (tmp_path / name).touch()
    assert nearest_path(f"{tmp_path}/flwers") == f" Did you mean {tmp_path}/flowers?"
    assert nearest_path(f"{tmp_path}/cat7.jpg") == ""
    assert nearest_path(f"{tmp_path}/away/flowers") == ""


def test_a_mistyped_set_and_a_set_for_a_recipe_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_HOME", str(tmp_path))
    (tmp_path / "data/bugs").mkdir(parents=True)
    (tmp_path / "data/bugs/manifest.json").touch()
    with pytest.raises(DataError, match=r"no such data set. Did you mean bugs\? Prepare one: "):
        check_data("bgs")
    with pytest.raises(ConfigError, match="a data set: name a recipe first, then --data.path bugs"):
        recipes.load("bugs")
