"""Quick answers to typing errors."""

from ftlib.checks import nearest_path


def test_a_mistyped_path_gets_the_nearest_name_and_not_one_of_the_same_ending(tmp_path):
    for name in ("flowers", "Dockerfile", "README.md", "other.jpg"):
        (tmp_path / name).touch()
    assert nearest_path(f"{tmp_path}/flwers") == f" Did you mean {tmp_path}/flowers?"
    assert nearest_path(f"{tmp_path}/cat7.jpg") == ""
    assert nearest_path(f"{tmp_path}/away/flowers") == ""
