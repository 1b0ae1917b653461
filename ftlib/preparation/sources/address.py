"""Addresses as sources: s3://, gs://, abfss:// and hf:// are listed, files at https:// fetched.

An object store is listed folder by folder with a bounded number of requests at a time; gs:// as a
whole, since pyarrow finds folders there only where an object marks them. A single
file at https:// (an archive, a table, Parquet) is copied to $FTLIB_HOME/sources/downloads, and an
interrupted copy goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftlib import paths, storage
from ftlib.data.shards import DataError
from ftlib.preparation.sources.places import ATTEMPTS, FIRST_WAIT, filesystem, retried
from ftlib.preparation.sources.tree import File, Tree, is_junk, junk_in
from ftlib.text import hide_password

REQUESTS_AT_ONCE = 16
"""Folders listed at a time."""
BLOCK = 1 << 20
SECONDS_WITHOUT_DATA = 60.0


def list_address(address: str) -> Tree:
    """The files below an address. Raises DataError: no access, nothing there."""
    fs, root = filesystem(address)
    tree = Tree(address)
    root = root.rstrip("/")
    try:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            for path, items in _folders(pool, fs, root):
                _add(tree, path, items, len(root) + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"--source {address}: there is nothing at this address") from None
    except OSError as error:
        raise DataError(
            f"--source {address} cannot be listed ({error}). Check the address, the credentials "
            "and the network; then give the same command again"
        ) from error
    if not tree.files:
        raise DataError(f"--source {address}: there is nothing at this address")
    return tree.sort()


def _folders(pool: ThreadPoolExecutor, fs: Any, root: str) -> Iterator[tuple[str, list[Any]]]:
    """(folder, what lies in it) of a folder and all below it, in no special order."""
    from pyarrow.fs import FileSelector, FileType

    whole = fs.type_name.endswith("gcs")

    def items(folder: str) -> list[Any]:
        return list(retried(lambda: fs.get_file_info(FileSelector(folder, recursive=whole))))

    running: dict[Future[list[Any]], str] = {pool.submit(items, root): root}
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            found = future.result()
            yield running.pop(future), found
            for item in () if whole else found:
                if item.type == FileType.Directory and not is_junk(item.base_name):
                    running[pool.submit(items, item.path)] = item.path


def _add(tree: Tree, folder: str, items: list[Any], skip: int) -> None:
    from pyarrow.fs import FileType

    for item in items:
        path = item.path.rstrip("/")[skip:]
        if junk_in(path):
            tree.skipped["hidden files and system folders"] += 1
        elif item.type == FileType.Directory:
            tree.folders.add(path)
        elif path:
            tree.folders |= {path[:at] for at, letter in enumerate(path) if letter == "/"}
            tree.files.append(File(path, int(item.size or 0), int(item.mtime_ns or 0)))


def fetch(address: str) -> Path:
    """The file at an https:// address, copied to this machine once. Raises DataError."""
    name = address.split("?")[0].rstrip("/").rpartition("/")[2] or "file"
    folder = paths.home() / "sources" / "downloads" / hashlib.sha256(address.encode()).hexdigest()
    target, part = folder / name, folder / f"{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for pause in (*storage.pauses(FIRST_WAIT, ATTEMPTS), None):
            if target.exists():
                return target
            try:
                _go_on(address, part)
                os.replace(part, target)
                return target
            except (OSError, ValueError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or pause is None:
                    raise DataError(
                        f"--source {hide_password(address)} cannot be fetched ({error}). Check the "
                        "address and the network; the same command goes on where the copy stopped"
                    ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _go_on(address: str, part: Path) -> None:
    """Add to `part` what is missing of the file at an address. Raises OSError when it is cut."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS_WITHOUT_DATA)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing follows what is there
            return
        raise
    with answer:
        resumed = answer.status == 206
        expected = int(answer.headers.get("Content-Length") or -1)
        with open(part, "ab" if resumed else "wb") as file:
            written = 0
            while block := answer.read(BLOCK):
                file.write(block)
                written += len(block)
    if expected >= 0 and written < expected:
        raise OSError(f"the connection ended after {written:,} of {expected:,} bytes")
