"""Folders that exist whole or not at all: on a local disk, a shared one, or an object store.

A folder is written under a temporary name: first its files, then `manifest.json` with the size and
sha256 of each, then a rename. Files and folders reach the disk (fsync) before the rename, so after
a crash of the machine either the old folder is there or the new one.

An object store has no rename. There the manifest is the last object written, and replacing a
folder deletes the old manifest first. After a crash the folder is there, or reads as unfinished;
whoever replaces folders keeps an older one beside it. A folder without a manifest that matches its
files is never read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlib.text import hide_password, printable, shorten

MANIFEST = "manifest.json"
SCHEMA = 1


class StorageError(RuntimeError):
    """Storage that refuses to work; the message says where and what to do."""


class DamagedError(ValueError):
    """A folder whose contents do not match its manifest."""


class UnsafeNameError(DamagedError):
    """A name from a file, an archive or a server that could lead out of the folder it is for."""


# --- addresses and names --------------------------------------------------------------------------


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def safe_name(name: object, what: str = "name") -> str:
    """`name`, if it can name a file or folder and nothing else.

    For every name that comes from outside: a manifest, an archive, a server, a checkpoint. It is
    text of 1 to 255 bytes, without separators and control characters, and does not begin with a
    dot. Raises UnsafeNameError with `what` (say, "train/files of s3://...") and the name.
    """
    reason = ""
    if not isinstance(name, str) or not name:
        reason = "it must be text"
    elif re.search(r"[/\\\x00-\x1f\x7f]", name):
        reason = "it has a path separator or a control character in it"
    elif name.startswith("."):
        reason = "it begins with a dot"
    elif len(name.encode("utf-8", "surrogatepass")) > 255:
        reason = "it is longer than 255 bytes"
    elif name != name.encode("utf-8", "ignore").decode():
        reason = "it is not valid Unicode"
    if reason:
        shown = shorten(printable(str(name)), 80)
        raise UnsafeNameError(f"{what}: the name {shown!r} is refused: {reason}")
    return str(name)


def inside(root: str, *names: object, what: str = "name") -> str:
    """The path or address of `names`, each checked by `safe_name`, below the folder `root`.

    For places that are written: on a local disk a link that leads out of `root` is refused too.
    (To read a file, `join(root, safe_name(name))` is enough, and lets people link their shards.)
    Raises UnsafeNameError.
    """
    path = join(root, *(safe_name(name, what) for name in names))
    if not is_remote(root):
        top, end = (os.path.realpath(p.removeprefix("file://")) for p in (root, path))
        if os.path.commonpath([top, end]) != top:
            raise UnsafeNameError(f"{what}: {path} is a link that leads out of {root}")
    return path


def filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path within it) of an address such as s3://bucket/runs."""
    import pyarrow as pa
    import pyarrow.fs

    try:
        return pa.fs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{hide_password(uri)}: this storage address cannot be opened "
            f"({hide_password(str(error))}). "
            "Use a folder that every node reaches, or an address such as s3://... or gs://..."
        ) from None


# --- writing --------------------------------------------------------------------------------------


def write_folder(uri: str, files: Mapping[str, bytes], info: Mapping[str, Any]) -> None:
    """Write `files` and `info` as the folder `uri`, and replace a folder that is there already.

    Atomic on a disk; see above for object stores. Raises StorageError with the place and the
    remedy when the storage is full, read-only or gone; nothing half-written stays behind.
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


_ELSEWHERE = "name another place (checkpoint.storage for a run's checkpoints)"
_REMEDIES = {
    errno.ENOSPC: f"the disk is full. Free some space, or {_ELSEWHERE}",
    errno.EDQUOT: f"the quota is used up. Free some space, or {_ELSEWHERE}",
    errno.EFBIG: (
        "the file would be larger than is allowed here. Raise the limit (ulimit -f), "
        f"or {_ELSEWHERE}"
    ),
    errno.EROFS: f"the disk is read-only: {_ELSEWHERE}",
    errno.EACCES: f"permission denied: {_ELSEWHERE} that this user may write to",
    errno.ENOENT: "the folder is gone. Was the disk unmounted?",
}


def pauses(first: float, tries: int) -> Iterator[float]:
    """Seconds to wait after each of `tries` attempts but the last: `first`, then doubled, of which
    each is half to all, by chance, so that many workers do not ask again at once."""
    # Not a run's random numbers: no seed makes workers wait alike.
    chance = random.SystemRandom()
    for attempt in range(tries - 1):
        yield first * 2**attempt * chance.uniform(0.5, 1.0)


def explain(uri: str, error: OSError, doing: str = "write") -> str:
    """The message of an error at `uri`: what happened and what to do. doing: write, read, list or
    delete."""
    remedy = _REMEDIES.get(error.errno or 0) if doing == "write" else None
    if "ACCESS_DENIED" in str(error):  # of an object store, by its name in Arrow
        remedy = (
            "access denied. Allow it to the credentials in use (AWS_ACCESS_KEY_ID, AWS_PROFILE or "
            f"the machine's role), or {_ELSEWHERE}"
        )
    if remedy is None:
        reason = hide_password(str(error.strerror or error))
        remedy = f"{reason}. Check that the storage is reachable"
    return f"cannot {doing} {hide_password(uri)}: {remedy}"


@contextlib.contextmanager
def _explained(uri: str, doing: str) -> Iterator[None]:
    """Raise what an object store refuses as a StorageError; that nothing is there stays as it is.

    (Errors of a local disk name their file themselves.)
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(explain(uri, error, doing)) from error


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
        if target.exists():  # a step that is repeated writes the same folder again
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
    if MANIFEST in contents:
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(f"{path}/{MANIFEST}")
    for name, data in contents.items():  # the manifest is the last entry
        with fs.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)


# --- reading --------------------------------------------------------------------------------------


def read_file(uri: str) -> bytes | None:
    """The file's bytes, or None when there is no such file.

    Raises StorageError where an object store refuses, OSError where a disk does.
    """
    if not is_remote(uri):
        try:
            return Path(uri.removeprefix("file://")).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    fs, path = filesystem(uri)
    try:
        with _explained(uri, "read"), fs.open_input_stream(path) as stream:
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
    except RecursionError:
        raise DamagedError(f"{uri} is not valid JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise DamagedError(f"{uri} is not valid JSON ({error})") from None


def read_folder(uri: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files, manifest) of a folder; each file has the size and sha256 of the manifest.

    Raises DamagedError.
    """
    manifest = _read_manifest(uri)
    return {name: _read_checked(uri, name, manifest) for name in manifest["files"]}, manifest


def _read_manifest(uri: str) -> dict[str, Any]:
    manifest = read_json(join(uri, MANIFEST))
    if manifest is None:
        raise DamagedError(f"{uri} has no {MANIFEST}: it was never finished")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{uri}/{MANIFEST} is not a manifest")
    schema = manifest.get("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise DamagedError(
            f"{uri} was written by a newer ftlib (schema {schema}, this one knows {SCHEMA})"
        )
    return manifest


def _read_checked(uri: str, name: str, manifest: Mapping[str, Any]) -> bytes:
    data = read_file(join(uri, safe_name(name, f"{uri}/{MANIFEST}")))
    known = manifest["files"][name]
    if not isinstance(known, dict):
        raise DamagedError(f"{uri}/{MANIFEST} is not a manifest")
    if data is None:
        raise DamagedError(f"{uri}/{name} is missing")
    if len(data) != known.get("bytes"):
        raise DamagedError(
            f"{uri}/{name} has {len(data)} bytes, its manifest says {known.get('bytes')}"
        )
    if hashlib.sha256(data).hexdigest() != known.get("sha256"):
        raise DamagedError(
            f"{uri}/{name} does not have the sha256 of its manifest: its contents were altered"
        )
    return data


def folders(uri: str) -> Iterator[str]:
    """Names of the folders in `uri`, in no special order; temporary ones are left out."""
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
    with _explained(uri, "list"):
        entries = fs.get_file_info(FileSelector(path, allow_not_found=True))
    for entry in entries:
        if entry.type == FileType.Directory and not entry.base_name.startswith("."):
            yield entry.base_name


def delete_file(uri: str) -> None:
    """Delete one file; one that does not exist is no error."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError), _explained(uri, "delete"):
            fs.delete_file(path)
    else:
        Path(uri.removeprefix("file://")).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it; one that does not exist is no error."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        with contextlib.suppress(FileNotFoundError), _explained(uri, "delete"):
            fs.delete_dir(path)
    else:
        shutil.rmtree(uri.removeprefix("file://"), ignore_errors=True)


def delete_temporary(uri: str) -> None:
    """Delete what crashed writers left in `uri`. Only the holder of the run's lease may do so."""
    if not is_remote(uri):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(uri.removeprefix("file://")):
                if entry.name.startswith(".tmp-"):
                    shutil.rmtree(entry.path, ignore_errors=True)
