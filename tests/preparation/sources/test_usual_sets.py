"""Public sets as they are downloaded: read rightly, or refused by name with what to do.

Modules: file_names, foreign, published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from ftlib.data.shards import DataError
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from ftlib.settings import ConfigError
from tests.preparation.sources.files import labels, many, tree

Files = dict[str, str]


def written(root: Path, files: Files) -> Path:
    """A folder with `files`: name -> text."""
    for name, text in files.items():
        tree(root, name, data=text.encode())
    return root


def pictures(*names: str) -> Files:
    return dict.fromkeys(names, "x")


def options(**values: Any) -> SourceOptions:
    return SourceOptions(**{"val_fraction": 0, **values})


def test_stanford_dogs_has_its_classes_in_images_and_boxes_beside(tmp_path: Path) -> None:
    names = [f"n0208{c}-dog{c}/n0208{c}_{i}" for c in (5, 6) for i in range(3)]
    files = {f"Annotation/{name}": "<annotation/>" for name in names}
    root = written(tmp_path, files | pictures(*(f"Images/{name}.jpg" for name in names)))
    found = scan(root, options())
    assert found.classes == ("n02085-dog5", "n02086-dog6") and found.counts == {"train": 6}
    assert found.aside == {"files outside Images/": 6}


def test_cub_takes_labels_from_folders_and_splits_from_its_lists(tmp_path: Path) -> None:
    names = [f"00{c}.Bird{c}/Bird{c}_{i}_{10 * c + i}.jpg" for c in (1, 2) for i in range(3)]
    lists = {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        "image_class_labels.txt": "".join(f"{i} {1 + i // 4}\n" for i in range(1, 7)),
        "train_test_split.txt": "".join(f"{i} {int(i % 3 > 0)}\n" for i in range(1, 7)),
        "parts/parts.txt": "1 back\n",
    }
    root = written(tmp_path, lists | pictures(*(f"images/{name}" for name in names)))
    found = scan(root, options())
    assert found.counts == {"train": 4, "test": 2}
    assert labels(found)[f"images/{names[2]}"] == ("test", "001.Bird1")
    assert "labels come from the folders, splits from images.txt" in found.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        (
            {"train_test_split.txt": "1 1\n2 yes\n"},
            "KeyError: 'yes'.*Unpack the set's archive again",
        ),
        ({"image_class_labels.txt": "1 1\n2\n"}, "image_class_labels.txt, line 2: '2' is one word"),
        ({"images.txt": ""}, "images.txt names no picture"),
    ],
)
def test_lists_beside_one_folder_count_and_damaged_ones_are_named(
    tmp_path: Path, change: Files, said: str
) -> None:
    names = [f"00{c}.Bird{c}/{i}.jpg" for c in (1, 2) for i in range(2)]
    lists = {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n",
    }
    root = written(tmp_path, lists | pictures(*(f"images/{name}" for name in names)) | change)
    if not said:
        assert scan(root, options()).counts == {"train": 2, "test": 2}
        return
    with pytest.raises(DataError, match=f"labels beside them cannot be used: .*{said}"):
        scan(root, options())


def test_aircraft_is_labelled_by_variant_or_by_the_level_that_is_named(tmp_path: Path) -> None:
    lists = {}
    for split, ids in (("train", "12"), ("val", "3"), ("test", "4")):
        for level, names in (
            ("variant", ("A320", "F/A-18")),
            ("family", ("A320", "F/A-18")),
            ("manufacturer", ("Airbus", "McDonnell Douglas")),
        ):
            lines = "".join(f"100{i} {names[int(i) % 2]}\n" for i in ids)
            lists[f"fgvc/data/images_{level}_{split}.txt"] = lines
    files = pictures(*(f"fgvc/data/images/100{i}.jpg" for i in range(1, 5)), "fgvc/evaluation.m")
    root = written(tmp_path, lists | files)
    found = scan(root)
    assert found.classes == ("A320", "F/A-18")
    assert found.counts == {"train": 2, "val": 1, "test": 1}
    assert labels(found)["data/images/1003.jpg"] == ("val", "F/A-18")
    found = scan(root, SourceOptions(label_column="manufacturer"))
    assert labels(found)["data/images/1003.jpg"] == ("val", "McDonnell Douglas")


def test_pets_take_the_breed_from_the_names_and_splits_from_the_lists(tmp_path: Path) -> None:
    lists = {
        "annotations/trainval.txt": "Abyssinian_1 1 1 1\nbasset_hound_1 2 2 1\n",
        "annotations/test.txt": "basset_hound_20 2 2 1\n",
    }
    names = ("Abyssinian_1", "basset_hound_1", "basset_hound_20", "basset_hound_3")
    files = pictures(*(f"images/{n}.jpg" for n in names), "annotations/trimaps/Abyssinian_1.png")
    found = scan(written(tmp_path, lists | files), options())
    assert labels(found) == {
        "images/Abyssinian_1.jpg": ("train", "Abyssinian"),
        "images/basset_hound_1.jpg": ("train", "basset_hound"),
        "images/basset_hound_20.jpg": ("test", "basset_hound"),
    }
    assert found.aside["pictures that the table does not name"] == 2


def test_flowers_102_takes_labels_and_splits_from_its_matlab_files(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"jpg/image_{i:05d}.jpg" for i in range(1, 7)))
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 77, 5, 5, 77, 5]], np.uint8)})
    splits = {"trnid": [[1, 3]], "valid": [[4, 2]], "tstid": [[6, 5]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in splits.items()})
    found = scan(root)
    assert found.classes == ("5", "77")
    assert [labels(found)[f"jpg/image_{i:05d}.jpg"] for i in range(1, 7)] == [
        ("train", "77"), ("val", "77"), ("train", "5"), ("val", "5"), ("test", "77"), ("test", "5")
    ]  # fmt: skip
    (root / "setid.mat").write_bytes(b"MATLAB 5.0" + bytes(200))
    with pytest.raises(DataError, match=r"used: setid.mat cannot be read"):
        scan(root)


@pytest.mark.parametrize("with_test", [True, False])
def test_stanford_cars_takes_class_names_from_its_kit(tmp_path: Path, with_test: bool) -> None:
    names = [f"cars_{split}/0000{i}.jpg" for split in ("train", "test") for i in (1, 2)]
    root = tree(tmp_path, *names, "devkit/README.txt")
    meta = {"class_names": np.array([["AM General Hummer", "Ram C/V Van"]], dtype=object)}
    savemat(root / "devkit/cars_meta.mat", meta)
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    records = np.array([[(39, c, f"0000{c}.jpg") for c in (1, 2)]], dtype=kind)
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": records})
    if with_test:
        savemat(root / "cars_test_annos_withlabels.mat", {"annotations": records[:, :1]})
    found = scan(root, options())
    assert found.classes == ("AM General Hummer", "Ram C/V Van")
    assert found.counts == ({"train": 2, "test": 1} if with_test else {"train": 2})
    assert labels(found)["cars_train/00002.jpg"] == ("train", "Ram C/V Van")


def test_food101_takes_splits_from_its_lists_of_each_class(tmp_path: Path) -> None:
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for c in ("pie", "waffles"):
        lists["train"][c] = [f"{c}/{len(c)}{i}" for i in range(4)]
        lists["test"][c] = [f"{c}/{len(c)}{i}" for i in range(4, 6)]
    every = [name for split in lists.values() for names in split.values() for name in names]
    files = {f"food/meta/{split}.json": json.dumps(found) for split, found in lists.items()}
    root = written(tmp_path, files | pictures(*(f"food/images/{name}.jpg" for name in every)))
    found = scan(root, options())
    assert found.classes == ("pie", "waffles") and found.counts == {"train": 8, "test": 4}


def test_gtsrb_takes_the_labels_of_its_flat_test_from_the_table(tmp_path: Path) -> None:
    rows = "".join(f"30,{i % 2},Test/{i}.png\n" for i in range(4))
    files = pictures(*many("0", "1", split="Train/"), *(f"Test/{i}.png" for i in range(4)))
    root = written(tmp_path, files | {"Test.csv": f"Width,ClassId,Path\n{rows}"})
    found = scan(root, options())
    assert found.counts == {"train": 20, "test": 4}
    assert labels(found)["Test/1.png"] == ("test", "1")
    (root / "Test.csv").write_text(f"Width,ClassId,Path\n{rows.replace(',1,', ',7,')}")
    assert scan(root, options()).aside["pictures without labels in Test/"] == 4


def test_folders_with_a_word_for_a_split_and_within_one_of_their_name(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", split="seg_train/seg_train/"), "seg_pred/seg_pred/1.jpg")
    tree(root, *many("a", "b", split="seg_test/seg_test/", n=2))
    found = scan(root, options())
    assert found.classes == ("a", "b") and found.counts == {"train": 20, "test": 4}
    assert found.aside == {"pictures in seg_pred/": 1}


def test_masks_beside_the_pictures_of_a_class_are_left_aside(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("covid/images", "normal/images", "covid/masks", "normal/masks"))
    found = scan(root, options())
    assert found.counts == {"train": 20}
    assert found.aside == {"files in folders called masks": 20}


def test_a_class_may_be_called_mask(tmp_path: Path) -> None:
    found = scan(tree(tmp_path, *many("mask", "no_mask")), options())
    assert found.classes == ("mask", "no_mask") and found.counts == {"train": 20}


def test_inaturalists_json_gives_labels_and_splits(tmp_path: Path) -> None:
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        value = {
            "images": [{"id": i, "file_name": f"all/{i % 2}/{i}.jpg"} for i in numbers],
            "annotations": [{"id": i, "image_id": i, "category_id": i % 2} for i in numbers],
            "categories": [{"id": 0, "name": "hawk"}, {"id": 1, "name": "owl"}],
        }
        written(tmp_path, {f"{split}2018.json": json.dumps(value)})
    root = tree(tmp_path, *(f"all/{i % 2}/{i}.jpg" for i in range(8)))
    found = scan(root)
    assert found.classes == ("hawk", "owl") and found.counts == {"train": 6, "val": 2}


def test_lists_of_files_and_labels_as_text(tmp_path: Path) -> None:
    lists = {"train.txt": "".join(f"all/{i}.jpg {i % 2}\n" for i in range(4)), "val.txt": ""}
    lists["val.txt"] = "all/4.jpg 0\nall/5.jpg 1\n"
    root = written(tmp_path, lists | pictures(*(f"all/{i}.jpg" for i in range(6))))
    assert scan(root).counts == {"train": 4, "val": 2}


def test_labels_within_file_names_are_proposed_and_read(tmp_path: Path) -> None:
    names = [f"train/{c}.{i}.jpg" for c in ("cat", "dog") for i in range(4)]
    root = tree(tmp_path, *names, "test/1.jpg", "notes.md")
    with pytest.raises(DataError, match=r"8 pictures outside.*\(cat, dog\): --label-pattern") as e:
        scan(root, options())
    pattern = str(e.value).rpartition("--label-pattern '")[2].rstrip("'")
    found = scan(root, options(label_pattern=pattern))
    assert found.classes == ("cat", "dog") and found.counts == {"train": 8}
    assert found.aside == {
        "files that are no pictures": 1,
        "pictures whose names --label-pattern does not fit": 1,
    }
    with pytest.raises(DataError, match="--label-pattern X fits none of 9 pictures"):
        scan(root, options(label_pattern="X"))
    with pytest.raises(ConfigError, match="--label-pattern .: not a regular expression"):
        options(label_pattern="(")
    with pytest.raises(ConfigError, match="leave out --labels"):
        options(label_pattern="x", labels="t.csv")


def test_numbers_alone_are_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        scan(tree(tmp_path, *(f"img_{i:04d}.jpg" for i in range(9)), "12.jpg"), options())
    assert "--label-pattern" not in str(error.value)


YOLO = {f"{s}/labels/{i}.txt": "0 0.5 0.5 0.2 0.2\n" for s in ("train", "valid") for i in range(2)}
VOC = {f"V/Annotations/{i}.xml": "<annotation/>" for i in range(2)}
BOXES = [
    (
        YOLO | pictures(*(f"{s}/images/{i}.jpg" for s in ("train", "valid") for i in "01")),
        "YOLO, 4",
    ),
    (VOC | pictures("V/JPEGImages/0.jpg", "V/JPEGImages/1.jpg"), "Pascal VOC, 2 XML files"),
    ({"train/0.xml": "<a/>"} | pictures("train/0.jpg"), "Pascal VOC, 1 XML file"),
    (pictures("val2017/1.jpg", "annotations/instances_val2017.json"), "COCO, annotations/inst"),
    (pictures("train/1.jpg", "train/_annotations.coco.json"), "COCO, train/_annotations"),
]


@pytest.mark.parametrize(("files", "form"), BOXES)
def test_sets_of_boxes_are_refused_by_name(tmp_path: Path, files: Files, form: str) -> None:
    with pytest.raises(DataError, match=f"object detection .{form}.*Cut the objects out.*--labels"):
        scan(written(tmp_path, files), options())


def test_captions_beside_pictures_are_no_boxes(tmp_path: Path) -> None:
    captions = {f"{c}/0{i}.txt": f"a photo of {i} {c}" for c in ("cat", "dog") for i in range(3)}
    root = tree(written(tmp_path, captions), *many("cat", "dog"), "cat/00.xml")
    found = scan(root, options())
    assert found.counts == {"train": 20} and found.aside == {".txt files": 6, ".xml files": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["cifar/data_batch_1", "cifar/batches.meta"], "CIFAR's own files.*--source cifar10"),
        (["train-images-idx3-ubyte.gz"], "MNIST's own files.*--source mnist"),
        (["train/data-00000-of-00001.arrow", "d.json"], "an Arrow folder.*to_parquet"),
        (["train-00000.tfrecord"], "TFRecord files .*Write the pictures as files"),
        (["pathmnist.npz"], "NumPy arrays"),
        (["data.mdb", "lock.mdb"], "an LMDB database"),
        (["train.pkl"], "Python pickles, which could run code"),
        (["jpg/1.jpg", "imagelabels.mat"], "Labels may be in imagelabels.mat, which is not read"),
        (["img/1.jpg", "labels.xlsx"], "Labels may be in labels.xlsx.*CSV.*--labels"),
        (["cars_train/1.jpg", "cars_test/1.jpg", "devkit/a.mat"], "cars_test, cars_train are call"),
        (["images/1.jpg", "annotations/trimaps/1.png"], "images is called like a part of"),
        (["images/1.jpg", "masks/1.png"], "images, masks are called like a part of"),
        (
            many("color/a", "color/b", "gray/a", "gray/b"),
            r"color, gray all hold the same folders \(a, b\).*--source .*/color\).*--layout",
        ),
    ],
)
def test_what_is_no_set_of_labelled_pictures_says_what_to_do(
    tmp_path: Path, files: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        scan(tree(tmp_path, *files), options())


def test_an_archive_within_an_archive_is_named(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("train.zip", b"x")
    with pytest.raises(DataError, match=r"1 archive \(train.zip\). Unpack them"):
        scan(tmp_path / "outer.zip", options())


TABLE = "file,label\n1.jpg,a\n2.jpg,b\n"
IMAGENET = {"val_annotations.txt": "1.JPEG\tn00000001\n"}
IMAGENET |= pictures("train/n00000001/x.JPEG", "train/n00000002/y.JPEG", "val/1.JPEG", "w.txt")


@pytest.mark.parametrize(
    ("files", "used"),
    [
        (pictures("i/1.jpg", "i/2.jpg", "i/3.jpg", "i/4", "n.md") | {"train.csv": TABLE}, 1),
        (pictures("train/a/1.jpg", "train/b/2.jpg", "x/3.jpg", "x/y.md", "z.csv", "4.jpg"), 0),
        (pictures("images/a/1.jpg", "images/b/2.jpg", "images/b/masks/2.png", "masks/1.png"), 0),
        (IMAGENET, 0),
        (pictures("a/1.jpg", "b/2.jpg", "b/2.jpg:Zone.Identifier", "b/.x", "c.txt"), 0),
    ],
)
def test_every_file_is_a_row_or_left_aside(tmp_path: Path, files: Files, used: int) -> None:
    own_val = any(name.startswith("val/") for name in files)
    found = scan(written(tmp_path, files), options(val_fraction=None if own_val else 0))
    assert len(found.entries) + sum(found.aside.values()) + used == len(files)
