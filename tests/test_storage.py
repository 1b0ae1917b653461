import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ftlib import storage
from ftlib.storage import DamagedError, StorageError, join

FILES = {"a.bin": bytes(range(256)) * 64, "b.json": b'{"x": 1}'}


def test_a_folder_comes_back_as_written(tmp_path):
    uri = str(tmp_path / "x" / "step-1")
    storage.write_folder(uri, FILES, {"step": 1})
    files, manifest = storage.read_folder(uri)
    assert files == FILES and manifest["step"] == 1
    storage.write_folder(uri, {"a.bin": b"new"}, {"step": 2})  # written again, replaced whole
    files, manifest = storage.read_folder(uri)
    assert files == {"a.bin": b"new"} and manifest["step"] == 2
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda d: (d / "a.bin").write_bytes(FILES["a.bin"][:-1]), "bytes"),
        (lambda d: (d / "a.bin").write_bytes(b"\x01" + FILES["a.bin"][1:]), "sha256"),
        (lambda d: (d / "a.bin").unlink(), "missing"),
        (lambda d: (d / "manifest.json").unlink(), "never finished"),
        (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_text('{"schema": 99, "files": {}}'), "newer ftlib"),
        (
            lambda d: (d / "manifest.json").write_text(
                '{"schema": 1, "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}'
            ),
            "outside its folder",
        ),
    ],
)
def test_damage_is_always_recognised(tmp_path, harm, words):
    uri = tmp_path / "step-1"
    storage.write_folder(str(uri), FILES, {})
    harm(uri)
    with pytest.raises(DamagedError, match=words):
        storage.read_folder(str(uri))


@pytest.mark.parametrize("at", range(0, 20000, 1777))
def test_a_write_that_fails_at_any_byte_leaves_the_old_folder_whole(tmp_path, monkeypatch, at):
    """The disk fills after `at` more bytes: the old contents stay, nothing half-written remains, the message says what to do."""
    uri = str(tmp_path / "step-1")
    storage.write_folder(uri, {"a.bin": b"old"}, {})
    left = at
    real = storage._write_durably

    def full(path, data):
        nonlocal left
        if len(data) > left:
            path.write_bytes(data[:left])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        real(path, data)

    monkeypatch.setattr(storage, "_write_durably", full)
    try:
        storage.write_folder(uri, FILES, {})
        expected = FILES
    except StorageError as error:
        assert "disk is full" in str(error) and "checkpoint.storage" in str(error)
        expected = {"a.bin": b"old"}
    assert storage.read_folder(uri)[0] == expected
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_a_kill_during_writes_never_leaves_a_folder_that_verifies_wrongly(tmp_path):
    """kill -9 at arbitrary moments of a writer in a loop: what carries a final name is whole."""
    code = textwrap.dedent("""
        import sys
        from ftlib import storage
        print("go", flush=True)
        n = 0
        while True:
            n += 1
            storage.write_folder(sys.argv[1] + f"/step-{n % 3}", {"a": bytes([n % 256]) * 300_000, "b": bytes([n % 256]) * 10}, {"n": n % 256})
    """)
    seen = 0
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        process.stdout.readline()
        try:
            process.wait(0.15 + 0.037 * attempt)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name in storage.folders(str(tmp_path)):
            files, manifest = storage.read_folder(join(str(tmp_path), name))
            assert set(files["a"]) == set(files["b"]) == {manifest["n"]}
            seen += 1
    assert seen >= 6
    storage.sweep_temporary(str(tmp_path))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.ENOENT, "unmounted"),
        (errno.EIO, "reachable"),
    ],
)
def test_storage_that_refuses_says_why_and_what_to_do(tmp_path, monkeypatch, code, words):
    def refuse(path, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage, "_write_durably", refuse)
    for write in (
        lambda: storage.write_folder(str(tmp_path / "x"), FILES, {}),
        lambda: storage.write_file(str(tmp_path / "y"), b""),
    ):
        with pytest.raises(StorageError, match=words):
            write()
    assert list(tmp_path.iterdir()) == []


def test_object_stores_get_the_manifest_last(tmp_path, monkeypatch):
    """Through pyarrow's file systems, as s3:// goes; the manifest is written after everything it names."""
    import pyarrow.fs as fs

    order = []

    class Recorded(fs.SubTreeFileSystem):
        def open_output_stream(self, path, *args, **kwargs):
            order.append(path.rsplit("/", 1)[1])
            return super().open_output_stream(path, *args, **kwargs)

    store = Recorded(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda uri: (store, uri.removeprefix("s3://")))
    storage.write_folder("s3://bucket/run/step-1", FILES, {"step": 1})
    assert order == ["a.bin", "b.json", "manifest.json"]
    assert storage.read_folder("s3://bucket/run/step-1")[0] == FILES
    assert (
        list(storage.folders("s3://bucket/run")) == ["step-1"]
        and list(storage.folders("s3://bucket/none")) == []
    )
    assert storage.read_file("s3://bucket/none") is None
    storage.write_file("s3://bucket/run/one.json", b"{}")
    assert storage.read_json("s3://bucket/run/one.json") == {}
    storage.delete_folder("s3://bucket/run/step-1")
    assert list(storage.folders("s3://bucket/run")) == []
