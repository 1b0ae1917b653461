"""ImageNet and Tiny-ImageNet as downloaded: folders, tars, and every file of labels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ftlib.data.shards import DataError
from ftlib.preparation.sources.imagenet import GROUND_TRUTH
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import labels, rows, tree

CAT, DOG, CRANE = "n02123045", "n02099601", "n02012849"
VAL = {"ILSVRC2012_val_00000001": CAT, "ILSVRC2012_val_00000002": DOG}


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Kaggle's folders; returns the one that holds train/ and val/."""
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    tree(base, *(f"train/{s}/{s}_{i}.JPEG" for s in (CAT, DOG) for i in range(3)))
    return tree(base, *(f"val/{name}.JPEG" for name in VAL), "test/1.JPEG")


def solution(folder: Path) -> None:
    lines = ["ImageId,PredictionString", *(f"{n},{s} 1 2 3 4 {s} 5 6 7 8" for n, s in VAL.items())]
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("above", [0, 1, 3])
def test_kaggles_solution_labels_the_flat_val(kaggle: Path, above: int) -> None:
    solution([kaggle, *kaggle.parents][above])
    found = scan(kaggle)
    assert found.classes == (DOG, CAT) and found.counts == {"train": 6, "val": 2}
    assert labels(found)["val/ILSVRC2012_val_00000001.JPEG"] == ("val", CAT)
    assert found.aside["pictures without labels in test/"] == 1
    assert found.split_origins["val"] == "val/, labels from LOC_val_solution.csv"
    assert rows(scan(kaggle.parents[2])) == rows(found)


def test_labels_can_be_named_and_are_asked_for(kaggle: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 pictures outside class folders.*LOC_val_sol.*--labels"):
        scan(kaggle)
    table = tmp_path / "val.csv"
    table.write_text("".join(f"{name}.JPEG,{synset}\n" for name, synset in VAL.items()))
    assert scan(kaggle, SourceOptions(labels=str(table))).counts == {"train": 6, "val": 2}


def test_a_picture_of_val_without_a_label_is_an_error(kaggle: Path) -> None:
    solution(kaggle)
    tree(kaggle, "val/ILSVRC2012_val_00000003.JPEG")
    with pytest.raises(DataError, match=r"no label for 1 picture of val/ .first: .*00000003"):
        scan(kaggle)


def test_val_sorted_into_folders_needs_no_file_of_labels(kaggle: Path) -> None:
    for name, synset in VAL.items():
        (kaggle / "val" / synset).mkdir()
        (kaggle / "val" / f"{name}.JPEG").rename(kaggle / "val" / synset / f"{name}.JPEG")
    found = scan(kaggle)
    assert found.layout == "folders of splits and classes" and found.counts["val"] == 2


def meta() -> bytes:
    out = io.BytesIO()
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    rows_ = [(1, CAT, "tabby"), (2, DOG, "golden retriever")]
    savemat(out, {"synsets": np.array(rows_, dtype=kinds)})
    return out.getvalue()


def test_the_development_kit_labels_val(kaggle: Path) -> None:
    (kaggle / GROUND_TRUTH).write_text("1\n2\n")
    (kaggle / "meta.mat").write_bytes(meta())
    assert labels(scan(kaggle))["val/ILSVRC2012_val_00000002.JPEG"] == ("val", DOG)
    (kaggle / GROUND_TRUTH).write_text("1\n2\n1\n")
    with pytest.raises(DataError, match=r"has 3 labels, val/ has 2 pictures"):
        scan(kaggle)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_the_tars_are_read_where_they_lie(kaggle: Path, tmp_path: Path) -> None:
    solution(kaggle)
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in (CAT, DOG):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(3):
                    add(tar, f"{synset}_{i}.JPEG", f"{synset} {i}".encode())
            add(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in VAL:
            add(tar, f"{name}.JPEG", name.encode())
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}", b"1\n2\n")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta())
    found = scan(folder)
    assert [row[:2] for row in rows(found)] == [row[:2] for row in rows(scan(kaggle))]
    for entry in found.entries:
        name = Path(entry.file).stem
        assert entry.place is not None
        assert entry.place.read() == (name if name in VAL else name.replace("_", " ")).encode()


def test_synset_lists_name_the_classes_in_the_order_of_the_synsets(kaggle: Path) -> None:
    solution(kaggle)
    tree(kaggle, f"train/{CRANE}/x.JPEG", "train/n03126707/x.JPEG")
    text = f"{CAT} tabby, tabby cat\n{DOG} golden retriever\n{CRANE} crane\nn03126707 crane\n"
    (kaggle.parents[2] / "LOC_synset_mapping.txt").write_text(text)
    found = scan(kaggle)
    cranes = (f"crane ({CRANE})", "golden retriever", "tabby", "crane (n03126707)")
    assert found.classes == cranes and "4 class names from LOC_synset_mapping.txt" in found.notes


def test_tiny_imagenet_reads_its_annotations(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"train/{s}/images/{s}_{i}.JPEG" for s in (CAT, DOG) for i in range(3)))
    tree(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    tree(root, *(f"train/{s}/{s}_boxes.txt" for s in (CAT, DOG)), "wnids.txt")
    lines = [f"val_{i}.JPEG\t{s}\t0\t0\t63\t63" for i, s in enumerate((DOG, CAT))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    (root / "words.txt").write_text(f"{CAT}\ttabby, queen\n{DOG}\tgolden retriever\n")
    found = scan(root)
    assert found.classes == ("golden retriever", "tabby")
    assert found.counts == {"train": 6, "val": 2}
    assert labels(found)["val/images/val_1.JPEG"] == ("val", "tabby")
    assert found.aside["pictures without labels in test/"] == 1
