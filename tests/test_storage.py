"""Folders that are whole or not there, names that stay inside, and what failures say."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftlib import storage
from ftlib.storage import DamagedError, StorageError, UnsafeNameError, inside, join, safe_name

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
            "path separator",
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
    """The disk fills after `at` bytes: the old contents stay, and the message says what to do."""
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
            files = {"a": bytes([n % 256]) * 300_000, "b": bytes([n % 256]) * 10}
            storage.write_folder(sys.argv[1] + f"/step-{n % 3}", files, {"n": n % 256})
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
    storage.delete_temporary(str(tmp_path))
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
    """The manifest is written after everything it names."""
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


def test_a_replacement_on_an_object_store_never_pairs_new_files_with_the_old_manifest(
    tmp_path, monkeypatch
):
    """Killed after any object: the folder reads as the old one, the new one, or as unfinished."""
    import pyarrow.fs as fs

    class Dies(fs.SubTreeFileSystem):
        left = 10**9

        def open_output_stream(self, path, *args, **kwargs):
            Dies.left -= 1
            if Dies.left < 0:
                raise KeyboardInterrupt
            return super().open_output_stream(path, *args, **kwargs)

    store = Dies(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem", lambda uri: (store, uri.removeprefix("s3://")))
    for objects in range(4):
        Dies.left = 10**9
        storage.write_folder("s3://b/step-1", FILES, {"step": 1})
        Dies.left = objects
        new = {"a.bin": b"new", "b.json": b"[]"}
        try:
            storage.write_folder("s3://b/step-1", new, {"step": 2})
        except KeyboardInterrupt:
            with pytest.raises(DamagedError, match="never finished"):
                storage.read_folder("s3://b/step-1")
        else:
            assert objects == 3 and storage.read_folder("s3://b/step-1")[0] == new


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    ".hidden",
    "a\nb",
    "a\x00b",
    "a\x1b[31m",
    "x" * 256,
    "\udcff",
    None,
    7,
    ["a"],
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_more_than_a_name_is_refused(tmp_path, name):
    for call in (lambda: safe_name(name, "m.json"), lambda: inside(str(tmp_path), name)):
        with pytest.raises(UnsafeNameError) as error:
            call()
        assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "name", ["train-00000.parquet", "my photos", "Müller", "数据", "a..b", "~"]
)
def test_usual_names_are_taken_as_they_are(tmp_path, name):
    assert safe_name(name) == name
    assert inside(str(tmp_path), "x", name) == f"{tmp_path}/x/{name}"
    assert inside("s3://bucket/x", name) == f"s3://bucket/x/{name}"


def test_a_link_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root")
    with pytest.raises(UnsafeNameError, match="leads out of"):
        inside(str(tmp_path / "root"), "out", "x")
    assert inside(str(tmp_path / "root"), "in", "x")


@pytest.mark.parametrize("manifest", ['{"schema": 1, "files": {"a": 3}}', "[" * 100_000, "[1]"])
def test_a_manifest_of_the_wrong_shape_is_damage(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "a").touch()
    with pytest.raises(DamagedError):
        storage.read_folder(str(tmp_path))


def test_messages_hide_passwords():
    uri = "s3://key:sec#ret/x@bucket/runs"
    assert "sec" not in storage.explain(uri, OSError(errno.EIO, f"no {uri}"))
    with pytest.raises(StorageError) as error:
        storage.filesystem("gopher://key:sec#ret@bucket/runs")
    assert "sec" not in str(error.value)


class _Forbidden(BaseHTTPRequestHandler):
    """An object store that allows nothing."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


def test_a_bucket_without_rights_is_said_to_deny_access(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidden)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        for door in (
            lambda uri: storage.write_file(uri, b"x"),
            storage.read_file,
            storage.delete_file,
            storage.delete_folder,
            lambda uri: list(storage.folders(uri)),
        ):
            with pytest.raises(StorageError, match=r"s3://bucket/runs/a: access denied\. Allow"):
                door("s3://bucket/runs/a")
    finally:
        server.shutdown()
        server.server_close()
