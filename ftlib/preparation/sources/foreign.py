"""Sets that are no pictures with one label each: recognized by their marks, refused by name."""

from __future__ import annotations

import re

from ftlib.data.shards import DataError
from ftlib.preparation.sources.naming import counted, listed, split_of
from ftlib.preparation.sources.tree import File, Tree, is_picture_name

YOLO_LINE = re.compile(rb"[0-9]+(\s+[0-9.eE+-]+){4,}\s*")
COCO = re.compile(r"(.*/)?(instances_[^/]*|_annotations\.coco)\.json")
LOOKED_AT = 5
"""Files of boxes that are read: some are empty."""
LARGEST_BOXES = 1 << 20
CUT_OUT = (
    "has boxes or outlines of objects, where a classifier needs one label a picture. Cut the "
    "objects out into a folder for each class, or write a table of file and label and name it with "
    "--labels (--layout folders takes folders for classes all the same)"
)
PACKED = (
    (
        re.compile(r"(.*/)?(data_batch(_[0-9])?(\.bin)?|test_batch(\.bin)?|train|test)"),
        "CIFAR's own files",
        "--source cifar10 or cifar100 downloads and reads the set",
    ),
    (
        re.compile(r".*-(images|labels)[-.]idx[0-9]-ubyte(\.gz)?"),
        "MNIST's own files",
        "--source mnist or fashionmnist downloads and reads the set",
    ),
    (
        re.compile(r".*\.arrow"),
        "an Arrow folder of Hugging Face's datasets",
        "Write it as Parquet: datasets.load_from_disk(FOLDER)[SPLIT].to_parquet(FILE)",
    ),
    (re.compile(r".*\.tfrec(ords?)?(-[0-9].*)?"), "TFRecord files", ""),
    (re.compile(r".*\.np[yz]"), "NumPy arrays", ""),
    (re.compile(r".*\.(h5|hdf5)"), "HDF5 files", ""),
    (re.compile(r".*\.mdb"), "an LMDB database", ""),
    (re.compile(r".*\.(rec|beton)"), "record files", ""),
    (re.compile(r".*\.(pkl|pickle)"), "Python pickles, which could run code", ""),
)
"""(name of a file, what it is, what to do) of forms that are not read."""
UNPACK = "Write the pictures as files, in a folder for each class or with a table of labels"


def refuse_foreign(tree: Tree) -> None:
    """Raise DataError for sets of object detection and for packed forms that are not read."""
    pictures = [file for file in tree.files if is_picture_name(file.path)]
    if pictures:
        if form := _boxes(tree, pictures):
            raise DataError(f"{tree.root} is a set for object detection ({form}): it {CUT_OUT}")
        return
    for pattern, what, remedy in PACKED:
        named = [file.path for file in tree.files if pattern.fullmatch(file.path)]
        if named:
            raise DataError(
                f"{tree.root} holds no pictures as files but {what} ({listed(named, 3)}), which "
                f"are not read. {remedy or UNPACK}"
            )


def _boxes(tree: Tree, pictures: list[File]) -> str:
    """The form in which boxes lie beside the pictures; empty where there are none."""
    if coco := [file.path for file in tree.files if COCO.fullmatch(file.path)]:
        return f"COCO, {listed(coco, 3)}"
    files = {file.path: file for file in tree.files if file.extension in ("txt", "xml")}
    if not files:
        return ""
    found = [files[path] for p in pictures for path in _box_files(p.path) if path in files]
    if xml := [file.path for file in found if file.extension == "xml"]:
        return f"Pascal VOC, {counted(len(xml), 'XML file')} such as {xml[0]}"
    lines = [file for file in found if file.extension == "txt" and file.bytes <= LARGEST_BOXES]
    if any(_is_yolo(tree.read(file)) for file in lines[:LOOKED_AT]):
        return f"YOLO, {counted(len(lines), 'file')} of boxes such as {lines[0].path}"
    return ""


def _box_files(picture: str) -> set[str]:
    """Where the boxes of a picture may lie: in a folder beside images/ or JPEGImages/, or next to
    it (an XML file only where that is no class folder)."""
    stem = picture.rpartition(".")[0]
    folder = picture.rpartition("/")[0]
    annotations = re.sub(r"(^|/)JPEGImages/", r"\1Annotations/", stem)
    found = {re.sub(r"(^|/)images/", r"\1labels/", stem) + ".txt"}
    if annotations != stem or not folder or split_of(folder):
        found.add(f"{annotations}.xml")
    return found


def _is_yolo(data: bytes) -> bool:
    lines = data.splitlines()
    return bool(lines) and all(YOLO_LINE.fullmatch(line) for line in lines)
