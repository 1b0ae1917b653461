"""Folders that are there whole or not at all, on a local disk, a shared one, or an object store.

A folder is written under a temporary name: its files, then `manifest.json` with the sizes and sha256 of all of them, then a rename
(where the storage can rename; on an object store the manifest is simply the last object written). A folder without a manifest that
verifies is never read. Writes go to disk (fsync of files and folders) before the rename, so a crash of the machine leaves either the
old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SCHEMA = 1


class StorageError(RuntimeError):
    """Storage that refuses to work; the message says where and what to do."""


class DamagedError(ValueError):
    """A folder whose contents do not match its manifest."""


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path within it) of an address such as s3://bucket/runs."""
    import pyarrow as pa
    import pyarrow.fs

    try:
        return pa.fs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{uri}: this storage address cannot be opened ({error}). Use a folder that every node reaches, s3://... or gs://..."
        ) from error


# --- writing ----------------------------------------------------------------------------------------------------------------------


def write_folder(uri: str, files: Mapping[str, bytes], info: Mapping[str, Any]) -> None:
    """Write `files` and `info` as the folder `uri`, atomically; a folder that is there already is replaced.

    Raises StorageError naming the place and the remedy when the storage is full, read-only or gone; nothing half-written stays behind.
    """
    manifest = {
        "schema": SCHEMA,
        **info,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    contents = {**files, MANIFEST: json.dumps(manifest, indent=2).encode()}
    try:
        if is_remote(uri):
            _upload(uri, contents)
        else:
            _write_local(Path(uri.removeprefix("file://")), contents)
    except OSError as error:
        raise StorageError(explain(uri, error)) from error


def write_file(uri: str, data: bytes) -> None:
    """Replace one small file, atomically."""
    try:
        if is_remote(uri):
            _upload(uri.rsplit("/", 1)[0], {uri.rsplit("/", 1)[1]: data})
            return
        path = Path(uri.removeprefix("file://"))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            _write_durably(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(explain(uri, error)) from error


def explain(uri: str, error: OSError) -> str:
    remedy = {
        errno.ENOSPC: "the disk is full. Free some space, or set checkpoint.storage to another place",
        errno.EDQUOT: "the quota is used up. Free some space, or set checkpoint.storage to another place",
        errno.EFBIG: "the file would be larger than is allowed here. Raise the limit (ulimit -f), or set checkpoint.storage to another place",
        errno.EROFS: "the disk is read-only. Set checkpoint.storage to a place that can be written",
        errno.EACCES: "permission denied. Set checkpoint.storage to a place that this user can write",
        errno.ENOENT: "the folder is gone. Was the disk unmounted?",
    }.get(error.errno or 0, f"{error.strerror or error}. Check that the storage is reachable")
    return f"cannot write {uri}: {remedy}"


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_local(target: Path, contents: Mapping[str, bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        for name, data in contents.items():
            _write_durably(temporary / name, data)
        _sync_folder(temporary)
        if target.exists():  # a re-executed step writes the same folder again
            old = target.parent / f".tmp-old-{uuid.uuid4().hex[:8]}"
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _upload(uri: str, contents: Mapping[str, bytes]) -> None:
    fs, path = filesystem(uri)
    fs.create_dir(path, recursive=True)
    for name, data in contents.items():  # the manifest is the last entry
        with fs.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)


# --- reading ----------------------------------------------------------------------------------------------------------------------


def read_file(uri: str) -> bytes | None:
    """The file's bytes, or None when there is no such file."""
    if not is_remote(uri):
        try:
            return Path(uri.removeprefix("file://")).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path) as stream:
            return stream.readall()
    except FileNotFoundError:
        return None


def read_json(uri: str) -> Any | None:
    """The file as JSON; None when there is none. Raises DamagedError when it is not JSON."""
    data = read_file(uri)
    if data is None:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise DamagedError(f"{uri} is not valid JSON ({error})") from None


def read_folder(uri: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files, manifest) of a folder, every file checked against its size and sha256. Raises DamagedError."""
    manifest = read_json(join(uri, MANIFEST))
    if manifest is None:
        raise DamagedError(f"{uri} has no {MANIFEST}: it was never finished")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{uri}/{MANIFEST} is not a manifest")
    if manifest.get("schema", 0) > SCHEMA:
        raise DamagedError(
            f"{uri} was written by a newer ftlib (schema {manifest['schema']}, this one knows {SCHEMA})"
        )
    files: dict[str, bytes] = {}
    for name, known in manifest["files"].items():
        if "/" in name or name.startswith("."):
            raise DamagedError(f"{uri}/{MANIFEST} names a file outside its folder: {name!r}")
        data = read_file(join(uri, name))
        if data is None:
            raise DamagedError(f"{uri}/{name} is missing")
        if len(data) != known["bytes"]:
            raise DamagedError(
                f"{uri}/{name} has {len(data)} bytes, its manifest says {known['bytes']}"
            )
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise DamagedError(
                f"{uri}/{name} does not have the sha256 of its manifest: its contents were altered"
            )
        files[name] = data
    return files, manifest


def folders(uri: str) -> Iterator[str]:
    """Names of the folders below `uri`, temporary ones left out, in no special order."""
    if not is_remote(uri):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from (
                entry.name
                for entry in os.scandir(uri.removeprefix("file://"))
                if entry.is_dir() and not entry.name.startswith(".")
            )
        return
    from pyarrow.fs import FileSelector, FileType

    fs, path = filesystem(uri)
    for entry in fs.get_file_info(FileSelector(path, allow_not_found=True)):
        if entry.type == FileType.Directory and not entry.base_name.startswith("."):
            yield entry.base_name


def delete_folder(uri: str) -> None:
    if is_remote(uri):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError):
            fs.delete_dir(path)
    else:
        shutil.rmtree(uri.removeprefix("file://"), ignore_errors=True)


def sweep_temporary(uri: str) -> None:
    """Remove what crashed writers left behind. Only the holder of the run's lease may call this."""
    if not is_remote(uri):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(uri.removeprefix("file://")):
                if entry.name.startswith(".tmp-"):
                    shutil.rmtree(entry.path, ignore_errors=True)
