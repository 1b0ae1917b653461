"""Addresses: listing, reading and fetching from storage that is slow and fails now and then.

Also the tests of `places`, which reads bytes wherever they lie.
"""

from __future__ import annotations

import http.server
import random
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs
import pytest

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.preparation.prepare import prepare
from ftlib.preparation.sources import address, places
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import jpeg, many, rows, tree

NO_VAL = SourceOptions(val_fraction=0)


class FaultyHandler(pyarrow.fs.FileSystemHandler):
    """A file system that fails on every third request and counts how many run at a time."""

    def __init__(self, root: Path, every: int = 3) -> None:
        self.inner = pyarrow.fs.SubTreeFileSystem(str(root), pyarrow.fs.LocalFileSystem())
        self.every, self.requests, self.running, self.most = every, 0, 0, 0
        self.lock = threading.Lock()

    def request(self, call: Any) -> Any:
        with self.lock:
            self.requests += 1
            self.running += 1
            self.most = max(self.most, self.running)
            fails = self.every and self.requests % self.every == 0
        try:
            if fails:
                raise OSError("503 Slow Down")
            return call()
        finally:
            with self.lock:
                self.running -= 1

    def get_file_info(self, paths: Any) -> Any:
        return self.request(lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.request(lambda: self.inner.get_file_info(selector))

    def open_input_file(self, path: str) -> Any:
        return self.request(lambda: self.inner.open_input_file(path))

    def open_input_stream(self, path: str) -> Any:
        return self.request(lambda: self.inner.open_input_stream(path))

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def _unused(self, *arguments: Any, **more: Any) -> Any:
        raise AssertionError("preparation only reads")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _unused
    delete_file = move = copy_file = open_output_stream = open_append_stream = _unused


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyHandler:
    """s3://bucket as a faulty store over tmp_path/bucket with two classes of five pictures."""
    for i, name in enumerate(many("train/a", "train/b", "val/a", "val/b", n=5)):
        tree(tmp_path / "bucket" / "pets", name, data=jpeg(i))
    handler = FaultyHandler(tmp_path / "bucket")
    fs = pyarrow.fs.PyFileSystem(handler)
    monkeypatch.setattr(storage, "filesystem", lambda uri: (fs, uri.removeprefix("s3://bucket/")))
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    return handler


def test_a_faulty_store_gives_the_set_that_its_folder_gives(
    bucket: FaultyHandler, tmp_path: Path
) -> None:
    found = scan("s3://bucket/pets")
    assert rows(found) == rows(scan(tmp_path / "bucket" / "pets"))
    there = prepare("s3://bucket/pets", tmp_path / "there", progress=False)
    here = prepare(tmp_path / "bucket" / "pets", tmp_path / "here", progress=False)
    assert there.dataset.digest == here.dataset.digest
    assert bucket.most <= max(places.ATTEMPTS, address.REQUESTS_AT_ONCE) and bucket.requests > 30
    again = prepare("s3://bucket/pets", tmp_path / "there", progress=False)
    assert again.already_done


def test_a_store_that_hides_folders_without_a_marker_is_listed_as_a_whole(
    bucket: FaultyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "bucket" / "pets", ".cache/train/a/x.jpg", "train/a/.hidden.jpg")

    def as_gcs(handler: FaultyHandler, selector: Any) -> Any:
        found = handler.inner.get_file_info(selector)
        files = [info for info in found if info.type == pyarrow.fs.FileType.File]
        return files if selector.recursive else []

    monkeypatch.setattr(FaultyHandler, "get_file_info_selector", as_gcs)
    monkeypatch.setattr(FaultyHandler, "get_type_name", lambda _: "gcs")
    found = scan("s3://bucket/pets")
    assert rows(found) == rows(scan(tmp_path / "bucket" / "pets"))
    assert found.aside == {"hidden files and system folders": 2}


def test_an_archive_at_an_address_is_read_by_ranges(bucket: FaultyHandler, tmp_path: Path) -> None:
    bucket.every = 0
    folder = tmp_path / "bucket" / "pets"
    with zipfile.ZipFile(tmp_path / "bucket" / "pets.zip", "w") as out:
        for file in sorted(folder.rglob("*.jpg")):
            out.write(file, file.relative_to(folder))
    found = scan("s3://bucket/pets.zip")
    assert rows(found) == rows(scan(folder))
    bucket.every = 3
    for entry in found.entries:
        assert entry.place is not None
        assert entry.place.read() == (folder / entry.file).read_bytes()


def test_a_store_that_stays_away_is_an_error_that_goes_on_later(
    bucket: FaultyHandler, tmp_path: Path
) -> None:
    bucket.every = 1
    with pytest.raises(DataError, match=r"cannot be listed .503 Slow Down.*same command again"):
        scan("s3://bucket/pets")
    bucket.every = 0
    with pytest.raises(DataError, match=r"there is nothing at this address"):
        scan("s3://bucket/dogs")


def test_a_preparation_from_a_store_goes_on_where_it_was_interrupted(
    bucket: FaultyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.preparation import shard_task

    monkeypatch.setattr(shard_task, "ROWS_PER_SHARD", 5)
    bucket.every = 0
    whole = prepare("s3://bucket/pets", tmp_path / "whole", progress=False)
    read = shard_task.read_file

    def gone(root: str, path: str) -> bytes:
        if path == "val/a/00.jpg":
            raise OSError("the network is gone")
        return read(root, path)

    monkeypatch.setattr(shard_task, "read_file", gone)
    with pytest.raises(DataError, match=r"val/a/00.jpg cannot be read.*goes on where it stopped"):
        prepare("s3://bucket/pets", tmp_path / "set", workers=1, progress=False)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.parquet")}
    assert len(kept) == 2
    monkeypatch.setattr(shard_task, "read_file", read)
    done = prepare("s3://bucket/pets", tmp_path / "set", workers=1, progress=False)
    assert done.dataset.digest == whole.dataset.digest
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.parquet")}
    assert kept.items() <= now.items()


# --- https ---


class Server(http.server.BaseHTTPRequestHandler):
    """One file, of which each answer sends at most `most` bytes before the connection ends."""

    data: ClassVar[bytes] = b""
    most: ClassVar[int] = 0
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        start = 0
        value = self.headers.get("Range", "")
        self.asked.append(value)
        if value and self.ranges:
            start = int(value.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.data):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        rest = self.data[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.most or len(rest)])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(address, "FIRST_WAIT", 0.01)
    path = tmp_path / "pets.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i, name in enumerate(many("a", "b", n=5)):
            out.writestr(name, random.Random(i).randbytes(2000))
    Server.data, Server.most, Server.ranges, Server.asked = path.read_bytes(), 0, True, []
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_an_archive_is_fetched_once_and_read(server: str) -> None:
    found = scan(f"{server}/pets.zip?token=x", NO_VAL)
    assert found.counts == {"train": 10}
    scan(f"{server}/pets.zip?token=x", NO_VAL)
    assert Server.asked == [""]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(server: str, ranges: bool) -> None:
    Server.most, Server.ranges = len(Server.data) // 3 + 1, ranges
    if ranges:
        assert scan(f"{server}/pets.zip", NO_VAL).counts == {"train": 10}
        assert Server.asked[1:] == [f"bytes={Server.most}-", f"bytes={2 * Server.most}-"]
        return
    with pytest.raises(DataError, match=r"cannot be fetched .the connection ended after"):
        scan(f"{server}/pets.zip", NO_VAL)
    Server.most = 0
    assert scan(f"{server}/pets.zip", NO_VAL).counts == {"train": 10}


def test_what_is_not_there_is_asked_for_once(server: str) -> None:
    with pytest.raises(DataError, match=r"cannot be fetched .*404"):
        scan(f"{server}/missing.zip")


def test_data_sets_of_the_hub_are_read_through_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:

    import pyarrow as pa
    import pyarrow.parquet as pq
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("hf://").strip("/")

    monkeypatch.setitem(_registry, "hf", Hub)
    images = [{"bytes": b"%d" % i, "path": f"{i}.jpg"} for i in range(4)]
    table = pa.table({"image": images, "label": ["cat", "dog", "cat", "dog"]})
    with Hub().open("/datasets/org/pets/data/train-0.parquet", "wb") as file:
        pq.write_table(table, file)
    found = scan("hf://datasets/org/pets", NO_VAL)
    assert found.classes == ("cat", "dog") and found.counts == {"train": 4}
    assert [e.place.read() for e in found.entries if e.place] == [b"0", b"1", b"2", b"3"]
