"""Copies of a remote set's files: on storage that fails, below a limit, fetched ahead of training.

Also `ftlib.data.fetch_ahead`.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest

from ftlib import config, storage
from ftlib.benchmark import scale
from ftlib.data import cache, fetch_ahead
from ftlib.data.cache import Cache
from ftlib.data.fetch_ahead import FetchAhead, shard_blocks, warm_up
from ftlib.data.loader import train_batches
from ftlib.data.sampler import Microbatch, step_plan
from ftlib.data.shards import BLOCKS_IN_CACHE, DataError, Dataset
from ftlib.settings import ConfigError, override
from ftlib.training import loop
from ftlib.training.worker_context import WorkerContext

SHARDS = 6
RUN = config.Run(
    seed=3,
    augment=config.Augment(size=16, color_jitter_p=0),
    train=config.Train(epochs=2, batch_size=512, microbatch_size=256),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set of 6 shards with 384 tiny pictures each."""
    root = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "ROWS_PER_SHARD", 384)
        scale.repeated(root / "set", SHARDS * 384)
    return root / "set"


class Store:
    """Storage that counts, waits and fails: every third time something is opened."""

    def __init__(self, root):
        self.inside = pyarrow.fs.SubTreeFileSystem(str(root), pyarrow.fs.LocalFileSystem())
        self.opened, self.failing, self.calls = [], True, 0

    def open_input_stream(self, path):
        self.calls += 1
        if self.failing and self.calls % 3 == 0:
            raise OSError("503 Slow Down")
        time.sleep(0.002)
        self.opened.append(path.rpartition("/")[2])
        return self.inside.open_input_stream(path)


@pytest.fixture
def store(made, monkeypatch, home):
    """s3://bucket/... leads to the made set through a Store."""
    found = Store(made.parent)
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (found, uri.removeprefix("s3://bucket/"))
    )
    monkeypatch.setattr(cache, "FIRST_WAIT", 0.002)
    return found


def limit_for(made, shards):
    """GB that hold so many shards."""
    return (shards * (made / "train-00000.parquet").stat().st_size + 100) / 1e9


def copies(home):
    return sorted(path.name for path in (home / "cache").rglob("*.parquet"))


# --- copying ------------------------------------------------------------------------------------


def test_storage_that_fails_now_and_then_is_asked_again(store, made):
    dataset = Dataset.open("s3://bucket/set")
    dataset.fetch()
    dataset.verify(deep=True)
    assert store.calls > len(store.opened) and len(store.opened) == len(set(store.opened))


def test_storage_that_stays_away_is_a_storage_error_that_says_so(store, home, monkeypatch):
    dataset = Dataset.open("s3://bucket/set")

    def missing(path):
        raise FileNotFoundError(2, "No such file", path)

    monkeypatch.setattr(store, "open_input_stream", missing)
    with pytest.raises(DataError, match="No such file"):
        dataset.split("train").image(0)

    def fail(path):
        store.calls += 1
        raise OSError("timed out")

    monkeypatch.setattr(store, "open_input_stream", fail)
    before = store.calls
    with pytest.raises(storage.StorageError, match=r"train-00000.parquet cannot be fetched: timed"):
        dataset.split("train").image(0)
    assert store.calls - before == cache.TRIES and not copies(home)
    with (
        pytest.raises(storage.StorageError, match="Check the network"),
        train_batches(
            dataset, np.arange(99), RUN, rank=0, world=1, start_step=0, stop_step=1, workers=0
        ) as batches,
    ):
        next(batches)


def test_workers_that_were_refused_together_do_not_ask_again_together(store, monkeypatch):
    dataset = Dataset.open("s3://bucket/set")
    waits = []
    monkeypatch.setattr(cache.time, "sleep", waits.append)

    def fail(path):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(store, "open_input_stream", fail)
    for _ in range(2):
        with pytest.raises(storage.StorageError):
            dataset.split("train").image(0)
    first, second = waits[: cache.TRIES - 1], waits[cache.TRIES - 1 :]
    assert len(first) == len(second) and not set(first) & set(second)
    most = [cache.FIRST_WAIT * 2**i for i in range(cache.TRIES - 1)]
    for found in (first, second):
        assert all(m / 2 <= wait <= m for wait, m in zip(found, most, strict=True))


def test_what_a_killed_copy_left_is_deleted(store, home):
    dataset = Dataset.open("s3://bucket/set")
    left = dataset._cache.folder / ".tmp-train-00002.parquet-1"
    left.write_bytes(b"half")
    dataset.split("train").fetch(2)
    assert not left.exists() and copies(home) == ["train-00002.parquet"]


# --- a limit ------------------------------------------------------------------------------------


def test_below_a_limit_the_longest_unused_files_make_room(tmp_path):
    files = {f"{i}.parquet": bytes([i]) * 100 for i in range(6)}
    source = tmp_path / "source"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    found = Cache.of(str(source), name="x", digest="0" * 64, root=str(tmp_path / "c"), limit=300)

    def get(number):
        data = files[f"{number}.parquet"]
        path = found.get(f"{number}.parquet", 100, hashlib.sha256(data).hexdigest())
        os.utime(path, ns=(next(clock), next(clock)))  # files of one moment have no order
        assert path.read_bytes() == data

    clock = iter(range(10**18, 2 * 10**18))
    for number in (0, 1, 2, 0, 3):
        get(number)
    assert sorted(p.name for p in found.folder.glob("*.parquet")) == [
        "0.parquet",
        "2.parquet",
        "3.parquet",
    ]
    get(1)
    assert not (found.folder / "2.parquet").exists()


def test_training_below_a_limit_sees_every_image_once_and_stays_below_it(store, made, home):
    """In the order of blocks, from slow storage that fails now and then, with few copies twice."""
    limit = limit_for(made, BLOCKS_IN_CACHE)
    run = config.Run(**{**vars(RUN), "data": config.Data(cache_limit=limit)})
    dataset = Dataset.open("s3://bucket/set", limit=limit)
    rows = np.arange(len(dataset.split("train")))
    local = Dataset.open(str(made))
    seen, most = [], 0
    with (
        train_batches(
            dataset, rows, run, rank=0, world=1, start_step=0, stop_step=10, workers=0
        ) as batches,
        train_batches(
            local, rows, run, rank=0, world=1, start_step=0, stop_step=10, workers=0
        ) as expected,
    ):
        for batch, other in zip(batches, expected, strict=True):
            assert np.array_equal(batch.rows, other.rows)
            assert np.array_equal(batch.images, other.images)
            seen += batch.rows.tolist()
            most = max(most, len(copies(home)))
    assert sorted(seen[: len(rows)]) == rows.tolist() and sorted(seen[len(rows) :]) == rows.tolist()
    assert most <= BLOCKS_IN_CACHE
    shards = [file for file in store.opened if file.startswith("train-0")]
    assert set(shards) == {f"train-0000{i}.parquet" for i in range(SHARDS)}
    assert len(shards) <= 2 * SHARDS + 2


def test_a_run_below_a_limit_trains_on_the_images_of_its_blocks(made, tmp_path, monkeypatch):
    limit = limit_for(made, BLOCKS_IN_CACHE)
    run = override(
        RUN,
        {
            "data.cache_limit": limit,
            "data.subset": 0.2,
            "train.epochs": 1,
            "model.arch": "resnet18",
        },
    )
    dataset, seen = Dataset.open(str(made), limit=limit), []
    monkeypatch.setattr(
        loop.Training, "microbatch", lambda self, batch, *_: seen.append(batch.rows.numpy())
    )
    training = loop.Training(WorkerContext(run, dataset, str(tmp_path)))
    training.update_frozen(0)
    split = dataset.split("train")
    blocks = shard_blocks(split, training.rows, limit)
    with contextlib.closing(training.batches()) as batches:
        training.train_step(batches, ask=False)
    plan = step_plan(run.seed, 0, training.rows, 512, 256, blocks)
    assert [rows.tolist() for rows in seen] == [mb.rows.tolist() for mb in plan]
    assert split.path(int(plan[0].rows[0])) in training.log.nonfinite_message([0])


def test_mappings_of_earlier_blocks_are_given_up(store, made):
    limit = limit_for(made, BLOCKS_IN_CACHE)
    split = Dataset.open("s3://bucket/set", limit=limit).split("train")
    first = bytes(split.image(0))
    for shard in range(SHARDS):
        split.image(shard * 384)
        assert sum(view is not None for view in split._maps) == 1
    assert bytes(split.image(0)) == first


def test_a_limit_without_room_for_three_shards_is_refused(made):
    split = Dataset.open(str(made)).split("train")
    rows = np.arange(len(split))
    assert shard_blocks(split, rows, 0.0) is None
    with pytest.raises(
        ConfigError, match=r"data.cache_limit = .*must hold 3 shards.*at least; more"
    ):
        shard_blocks(split, rows, limit_for(made, 2))
    assert shard_blocks(split, rows, limit_for(made, 3)) is not None


def test_the_present_and_the_next_block_are_fetched_ahead(store, made, home):
    limit = limit_for(made, BLOCKS_IN_CACHE)
    dataset = Dataset.open("s3://bucket/set", limit=limit)
    split = dataset.split("train")
    blocks = shard_blocks(split, np.arange(len(split)), limit)
    order = [int(block[0]) for block in blocks.of_epoch(3, 0)]
    ahead = FetchAhead(split, blocks, 3)
    try:
        for number in range(SHARDS):
            row = order[number] * 384 + 5
            ahead.reached(Microbatch(0, 0, 0, np.array([row]), 1))
            following = order[number + 1] if number + 1 < SHARDS else blocks.of_epoch(3, 1)[0][0]
            wanted = {f"train-{shard:05d}.parquet" for shard in (order[number], following)}
            end = time.monotonic() + 20
            while not wanted <= set(copies(home)):
                assert time.monotonic() < end
                time.sleep(0.005)
    finally:
        ahead.close()


def test_two_workers_copy_what_a_run_needs_once_and_no_more_at_a_time_than_asked(store, made, home):
    """Each in threads; all but the last shard, of which no row is needed."""
    dataset = Dataset.open("s3://bucket/set")
    split = dataset.split("train")
    needed = [(split, np.arange((SHARDS - 1) * 384))]
    store.failing = False
    open_stream, lines, now, most = store.open_input_stream, [], [], []
    end = time.monotonic() + 60

    def open_input_stream(path):
        now.append(path)
        most.append(len(now))
        while max(most) < 2:  # until another thread has come
            assert time.monotonic() < end
            time.sleep(0.005)
        try:
            return open_stream(path)
        finally:
            now.remove(path)

    store.open_input_stream = open_input_stream
    with contextlib.ExitStack() as stack:
        for worker in range(2):
            stack.enter_context(warm_up(needed, worker=worker, workers=2, say=lines.append))
        while not lines or len(copies(home)) < SHARDS - 1:
            assert time.monotonic() < end
            time.sleep(0.005)
    assert copies(home) == [f"train-0000{i}.parquet" for i in range(SHARDS - 1)]
    shards = [file for file in store.opened if file.endswith(".parquet")]
    assert len(shards) == len(set(shards)) == SHARDS - 1
    assert 1 < max(most) <= fetch_ahead.REQUESTS
    size = sum(shard.bytes for shard in split.shards[: SHARDS - 1]) / 1e9
    (line,) = lines
    assert line.startswith("data: 5 of 5 shards in the cache of ")
    assert f" ({size:.2f} of {size:.2f} GB, " in line
    with warm_up(needed, say=pytest.fail):  # all there: no thread, nothing to say
        pass


def test_copies_that_fail_ahead_are_left_to_training(store, made, monkeypatch):
    split = Dataset.open("s3://bucket/set").split("train")
    monkeypatch.setattr(cache, "TRIES", 1)
    monkeypatch.setattr(store, "open_input_stream", lambda path: 1 / 0)
    with warm_up([(split, np.arange(384))], say=pytest.fail):
        pass
    with pytest.raises(ZeroDivisionError):
        split.image(0)


# --- over the network, by several processes -----------------------------------------------------


class S3(BaseHTTPRequestHandler):
    """The little of S3 that reading takes, slow; every fifth request fails."""

    protocol_version = "HTTP/1.1"
    root = Path()
    requests = 0
    lock = threading.Lock()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        with S3.lock:
            S3.requests += 1
            fails = S3.requests % 5 == 0
        time.sleep(0.005)
        path = self.root / self.path.partition("?")[0].removeprefix("/bucket/")
        status, data = 404, b""
        if fails:
            status = 503
        elif path.is_file():
            status, data = 200, path.read_bytes()
        length = len(data)
        if status == 200 and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 00:00:00 GMT")
        if status == 206:
            end = int(first) + len(data) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{length}")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_two_processes_below_a_limit_read_from_a_slow_and_failing_s3_what_lies_there(
    made, tmp_path
):
    S3.root = made.parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = tmp_path / "read.py"
    script.write_text(
        textwrap.dedent("""
        import hashlib, sys
        import numpy as np
        from ftlib import config
        from ftlib.data.loader import train_batches
        from ftlib.data.shards import Dataset

        if __name__ == "__main__":
            limit = float(sys.argv[2])
            train = config.Train(epochs=2, batch_size=512, microbatch_size=64)
            augment = config.Augment(size=16, color_jitter_p=0)
            data = config.Data(cache_limit=limit)
            run = config.Run(augment=augment, data=data, train=train)
            digest = hashlib.sha256()
            dataset = Dataset.open(sys.argv[1], limit=limit)
            rows = np.arange(len(dataset.split("train")))
            places = {"rank": 0, "world": 1, "start_step": 0, "stop_step": 10}
            with train_batches(dataset, rows, run, **places, workers=2) as batches:
                for batch in batches:
                    digest.update(batch.images.numpy().tobytes())
            print(digest.hexdigest())
        """)
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    limit = str(limit_for(made, BLOCKS_IN_CACHE))
    try:
        digests = [
            subprocess.run(
                [sys.executable, str(script), place, limit],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            ).stdout
            for place in (str(made), "s3://bucket/set")
        ]
    finally:
        server.shutdown()
        server.server_close()
    assert digests[0] == digests[1] and S3.requests > 20
