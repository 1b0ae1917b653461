"""Archives as sources: .zip, .tar and .tar.gz, listed and read without unpacking.

Names are only names: nothing is written, so that `../` reaches nothing. An archive whose contents
claim to be absurdly larger than itself, or whose members overlap, is refused before it is read.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
from typing import IO

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.preparation.sources.places import (
    LARGEST_FILE,
    DeflatedSpan,
    GzipSpan,
    Place,
    Span,
    filesystem,
    gzip_reader,
    opened,
)
from ftlib.preparation.sources.tree import File, Link, Tree, junk_in

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
LARGEST_RATIO = 100
"""Contents over size of an archive. Pictures hardly compress; more is a decompression bomb."""
RATIO_FROM = 1 << 30
"""Bytes of contents from which the ratio is checked."""
LARGEST_HEADER = 16 << 20
"""Bytes that listing a tar reads at once. A header of more is damage, or an attack."""
MOST_MEMBERS = 50_000_000
HEADER = struct.Struct("<4s5H3I2H")
"""A zip member's local header: signature ... length of its name, length of its extra field."""


def is_archive(path: str) -> bool:
    """Whether a file is an archive by its name."""
    return path.lower().endswith(ENDINGS)


def list_archive(path: str) -> Tree:
    """The files in an archive. Raises DataError: damaged, encrypted, absurd sizes, empty."""
    try:
        tree = _list_zip(path) if path.lower().endswith(".zip") else list_tar(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be read as an archive ({error}). Is it complete? Download or pack it "
            "again"
        ) from error
    return tree.sort()


class _Lister:
    """Collects the members of one archive and checks their sizes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tree = Tree(path)
        self.size, self.mtime_ns = size_and_time(path)
        self.contents = 0
        self.members = 0

    def add(self, name: str, length: int, place: Place) -> None:
        self.members += 1
        self.contents += length
        path = clean(name)
        if not path or junk_in(path):
            self.tree.skipped["hidden files and system folders"] += 1
        elif length > LARGEST_FILE:
            self.tree.links.append(Link(path, f"a file of {length:,} bytes"))
        else:
            self.tree.files.append(File(path, length, self.mtime_ns, place))
            self.add_folders(path.rpartition("/")[0])
        self.check()

    def add_folders(self, path: str) -> None:
        while path and path not in self.tree.folders:
            self.tree.folders.add(path)
            path = path.rpartition("/")[0]

    def check(self) -> None:
        if self.contents > max(RATIO_FROM, LARGEST_RATIO * self.size):
            raise DataError(
                f"{self.path} has {self.size:,} bytes and claims contents of over "
                f"{self.contents:,}: a decompression bomb, or damaged. Pictures do not compress "
                "like that; unpack it yourself if you trust it"
            )
        if self.members > MOST_MEMBERS:
            raise DataError(f"{self.path} names over {MOST_MEMBERS:,} files")


def size_and_time(path: str) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds) of a file or an object."""
    if not storage.is_remote(path):
        info = os.stat(path)
        return info.st_size, info.st_mtime_ns
    fs, inner = filesystem(path)
    found = fs.get_file_info(inner)
    return int(found.size or 0), int(found.mtime_ns or 0)


def clean(name: str) -> str:
    """A member's name without `.`, `..`, empty parts and backslashes."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _list_zip(path: str) -> Tree:
    lister = _Lister(path)
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > lister.size:
            raise DataError(f"{path} has members that overlap: a decompression bomb, or damaged")
        for member in members:
            name = member.filename
            mode = member.external_attr >> 16
            if member.is_dir():
                if not junk_in(clean(name) or "."):
                    lister.add_folders(clean(name))
            elif member.flag_bits & 1:
                raise DataError(f"{path} is encrypted ({name}). Unpack it and name the folder")
            elif stat.S_ISLNK(mode):
                lister.tree.links.append(Link(clean(name), "a link inside an archive"))
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{path} is packed with a method that is not read ({name}). Pack it again "
                    "with the usual one, or unpack it and name the folder"
                )
            else:
                lister.add(name, member.file_size, _zip_place(path, file, member))
    return lister.tree


def _zip_place(path: str, file: IO[bytes], member: zipfile.ZipInfo) -> Place:
    file.seek(member.header_offset)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:4] != b"PK\3\4":
        raise DataError(f"{path} is damaged: no header of {member.filename}")
    *_, name_length, extra_length = HEADER.unpack(header)
    offset = member.header_offset + HEADER.size + name_length + extra_length
    if member.compress_type == zipfile.ZIP_STORED:
        return Span(path, offset, member.file_size)
    return DeflatedSpan(path, offset, member.compress_size, member.file_size)


class _GzipContents(io.RawIOBase):
    """The contents of a gzip file, for listing a tar; see `GzipReader`."""

    def __init__(self, path: str) -> None:
        self._reader, self._at = gzip_reader(path), 0
        self._last, self._last_at = b"", 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise OSError(f"a header of {size:,} bytes")
        skip = self._at - self._last_at
        if skip >= 0 and skip + size <= len(self._last):  # tarfile looks back by one byte
            data = self._last[skip : skip + size]
        else:
            data = self._reader.read(self._at, size)
            self._last, self._last_at = data, self._at
        self._at += len(data)
        return data


def list_tar(path: str, inner: tuple[int, int] | None = None) -> Tree:
    """The files of a tar. `inner` is (offset, length) of a tar that lies within the file `path`."""
    lister = _Lister(path)
    packed = path.lower().endswith((".gz", ".tgz"))
    start = inner[0] if inner else 0
    with opened(path) as file:
        source: IO[bytes] = _GzipContents(path) if packed else file  # type: ignore[assignment]
        source.seek(start)
        with tarfile.open(fileobj=source, mode="r:", errorlevel=1) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if member.isdir():
                    if not junk_in(clean(member.name) or "."):
                        lister.add_folders(clean(member.name))
                elif not member.isreg() or member.issparse():
                    why = "a link, a device or a sparse file inside an archive"
                    lister.tree.links.append(Link(clean(member.name), why))
                else:
                    kind = GzipSpan if packed else Span
                    lister.add(
                        member.name, member.size, kind(path, member.offset_data, member.size)
                    )
    if not packed and lister.contents > lister.size:
        raise DataError(f"{path} is cut short: its members need more bytes than it has")
    return lister.tree
