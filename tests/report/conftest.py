import pytest

from tests.delivery import made


@pytest.fixture(scope="package")
def shapes(tmp_path_factory):
    """A prepared data set of three drawn classes."""
    return made.dataset(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="package")
def shapes_run(shapes, tmp_path_factory):
    """The folder of a run on it, with a model that is right more often than not."""
    return made.run_folder(tmp_path_factory.mktemp("home"), shapes)
