"""The files of a source: names, sizes and where their bytes lie, without their contents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.picture import EXTENSIONS, FOREIGN_EXTENSIONS
from ftlib.preparation.sources.places import LARGEST_FILE, Place, read_file

JUNK = frozenset(
    {
        "thumbs.db",
        "desktop.ini",
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__pycache__",
    }
)
"""Files and folders that systems leave behind, in lower case; they are passed over like hidden
ones."""
NOT_PICTURES = frozenset(
    [
        "txt",
        "csv",
        "tsv",
        "json",
        "jsonl",
        "ndjson",
        "parquet",
        "xml",
        "yaml",
        "yml",
        "md",
        "html",
        "htm",
        "log",
        "db",
        "ini",
        "npy",
        "npz",
        "pt",
        "pth",
        "pkl",
        "mat",
        "h5",
        "py",
        "ipynb",
        "sh",
        "zip",
        "tar",
        "gz",
        "tgz",
        "mp4",
        "mov",
        "avi",
        "wav",
        "pdf",
        "lock",
    ]
)
"""Extensions of files that are never examined, only counted. Everything else is examined."""
PICTURES = frozenset(FOREIGN_EXTENSIONS).union(*EXTENSIONS.values())
"""Extensions of pictures: what is counted as a picture before anything is opened."""


@dataclass(frozen=True, slots=True)
class File:
    """One file. `path` is its name below the tree's root, with slashes."""

    path: str
    bytes: int
    mtime_ns: int
    place: Place | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def extension(self) -> str:
        """In lower case, without the dot; the whole name where there is no dot."""
        return extension(self.path)


@dataclass(frozen=True)
class Link:
    """A name that could not be followed, and why."""

    path: str
    why: str
    is_folder: bool = False


@dataclass
class Tree:
    """Every visible file below a root."""

    root: str
    """A folder, an address, or the path of an archive."""
    files: list[File] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    """Names of all visible folders, so that empty ones are noticed."""
    links: list[Link] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Files passed over for their names, by kind."""

    @property
    def is_folder(self) -> bool:
        """Whether files lie on disk as files of their own."""
        return os.path.isdir(self.root)

    def read(self, file: File, limit: int = LARGEST_FILE) -> bytes:
        """A file's bytes. Raises OSError."""
        return file.place.read() if file.place else read_file(self.root, file.path, limit)

    def within(self, folder: str) -> Tree:
        """What lies below one of the tree's folders, named from there."""
        prefix = folder + "/"

        def cut(path: str) -> str:
            return path[len(prefix) :]

        in_container = any(file.place for file in self.files)
        return Tree(
            self.root if in_container else storage.join(self.root, folder),
            [replace(f, path=cut(f.path)) for f in self.files if f.path.startswith(prefix)],
            {cut(name) for name in self.folders if name.startswith(prefix)},
            [replace(k, path=cut(k.path)) for k in self.links if k.path.startswith(prefix)],
            self.skipped,
        )

    def select(self, keep: Callable[[File], bool]) -> list[File]:
        return [file for file in self.files if keep(file)]

    def sort(self) -> Tree:
        """The same tree with its files in the order of their names."""
        self.files.sort(key=lambda file: file.path)
        self.links.sort(key=lambda link: link.path)
        return self


def extension(path: str) -> str:
    """A file's extension in lower case, without the dot; its whole name where it has none."""
    return path.rpartition("/")[2].rpartition(".")[2].lower()


def is_picture_name(path: str) -> bool:
    """Whether a file is a picture by its name."""
    return extension(path) in PICTURES and "." in path.rpartition("/")[2]


def is_junk(name: str) -> bool:
    """Whether a file or folder of that name is passed over: hidden, or left by a system."""
    return name.startswith(".") or name.lower() in JUNK or name.endswith(":Zone.Identifier")


def junk_in(path: str) -> bool:
    """Whether any part of a path is passed over."""
    return any(is_junk(part) for part in path.split("/"))


def walk(root: str, follow_links: bool = False) -> Tree:
    """List a folder on disk, without leaving it unless `follow_links`. Raises DataError."""
    tree = Tree(root)
    walker = _Walker(tree, follow_links)
    try:
        walker.folder("", ())
    except PermissionError as error:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}). Make it readable, or move it "
            "out of the source"
        ) from error
    return tree.sort()


class _Walker:
    """Lists files below a root."""

    def __init__(self, tree: Tree, follow_links: bool) -> None:
        self.tree = tree
        self.follow = follow_links
        self.real = os.path.realpath(tree.root)

    def folder(self, folder: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(os.path.join(self.tree.root, folder))
        if real in above:  # a link to a folder that it lies in
            return
        with os.scandir(os.path.join(self.tree.root, folder)) as items:
            for item in sorted(items, key=lambda item: item.name):
                path = f"{folder}/{item.name}" if folder else item.name
                if is_junk(item.name):
                    self.tree.skipped["hidden files and system folders"] += 1
                elif item.is_symlink() and not os.path.exists(item.path):
                    self.tree.links.append(Link(path, "the link leads nowhere"))
                elif item.is_symlink() and not self.follow and not self._inside(item.path):
                    to = os.path.realpath(item.path)
                    why = f"the link leads out of the source folder, to {to}"
                    self.tree.links.append(Link(path, why, item.is_dir()))
                elif item.is_dir():
                    self.tree.folders.add(path)
                    self.folder(path, (*above, real))
                elif not item.is_file():
                    why = "neither a file nor a folder (a pipe, a socket or a device)"
                    self.tree.links.append(Link(path, why))
                else:
                    info = item.stat()
                    self.tree.files.append(File(path, info.st_size, info.st_mtime_ns))

    def _inside(self, path: str) -> bool:
        return os.path.commonpath([self.real, os.path.realpath(path)]) == self.real


def parents_of(root: str, levels: int) -> list[Path]:
    """The folder `root` and its parents, nearest first, at most `levels` of them."""
    here = Path(root)
    return [here, *here.parents][: levels + 1]
