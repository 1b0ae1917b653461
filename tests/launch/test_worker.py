"""What a worker does before it trains."""

import shutil
from pathlib import Path

import pytest

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.launch.worker import is_final, open_again
from ftlib.storage import StorageError


@pytest.fixture
def dataset(shapes, tmp_path):
    return Path(shutil.copytree(shapes, tmp_path / "set"))


def test_a_data_set_that_is_gone_is_storage_that_is_away(dataset):
    """A worker that starts while the shared folder is unmounted does not end the run."""
    away = dataset.rename(dataset.with_name("away"))
    with pytest.raises(StorageError, match="is gone. Was its disk unmounted") as e:
        open_again(str(dataset), 0)
    assert not is_final(e.value)
    away.rename(dataset)
    assert len(open_again(str(dataset), 0).split("train")) > 0


def test_a_data_set_that_cannot_be_read_is_storage_that_is_away(dataset, monkeypatch):
    def refuse(uri):
        raise StorageError(f"{uri}: no answer")

    monkeypatch.setattr(storage, "read_file", refuse)
    with pytest.raises(StorageError, match="no answer") as e:
        open_again(str(dataset), 0)
    assert not is_final(e.value)


def test_a_damaged_data_set_ends_the_run(dataset):
    (dataset / "manifest.json").write_text("{")
    with pytest.raises(DataError) as e:
        open_again(str(dataset), 0)
    assert is_final(e.value)
