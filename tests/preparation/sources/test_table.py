"""Tables of labels: formats, guessed columns, names that fit, and hostile tables.

Modules: label_table, table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.shards import DataError
from ftlib.preparation.sources.label_table import parse_table
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import labels, many, rows, tree

ROWS = [("c0.jpg", "cat"), ("c1.jpg", "cat"), ("d0.jpg", "dog"), ("d1.jpg", "dog")]


def options(**values: Any) -> SourceOptions:
    return SourceOptions(**{"val_fraction": 0, **values})


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four pictures in one folder."""
    return tree(tmp_path / "source", *(f"images/{name}" for name, _ in ROWS))


def csv_of(records: list[tuple[str, ...]], *header: str) -> str:
    return "\n".join(",".join(row) for row in [header, *records]) + "\n"


def write(root: Path, form: str) -> Path:
    """The labels of `ROWS` as a file of the form."""
    columns = {"image": [name for name, _ in ROWS], "label": [label for _, label in ROWS]}
    records = [dict(zip(columns, row)) for row in ROWS]
    path = root / f"labels.{form.partition(' ')[0]}"
    if form == "csv":
        path.write_text(csv_of(ROWS, "image", "label"))
    elif form == "csv bom":
        path.write_text(csv_of(ROWS, "image", "label"), encoding="utf-8-sig")
    elif form == "csv semicolons":
        path.write_text(csv_of(ROWS, "image", "label").replace(",", ";"))
    elif form == "csv no header":
        path.write_text("\n".join(",".join(row) for row in ROWS))
    elif form == "tsv":
        path.write_text(csv_of(ROWS, "image", "label").replace(",", "\t"))
    elif form == "json":
        path.write_text(json.dumps(records))
    elif form == "json map":
        path.write_text(json.dumps(dict(ROWS)))
    elif form == "json columns":
        path.write_text(json.dumps(columns))
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        "csv",
        "csv bom",
        "csv semicolons",
        "csv no header",
        "tsv",
        "json",
        "json map",
        "json columns",
        "jsonl",
        "parquet",
    ],
)
def test_every_form_of_a_table_gives_the_same_labels(flat: Path, form: str) -> None:
    path = write(flat, form)
    expected = [("train", label, f"images/{name}") for name, label in ROWS]
    assert rows(scan(flat, options())) == expected
    assert rows(scan(path, options())) == expected
    elsewhere = path.rename(flat.parent / path.name)
    assert rows(scan(flat, options(labels=str(elsewhere)))) == expected


@pytest.mark.parametrize(
    "value",
    [
        "C0.JPG",
        "c0.jpg",
        "c0",
        "images/c0.jpg",
        "./images/c0",
        "images\\c0.jpg",
        "/home/me/set/images/c0.jpg",
        "D:\\set\\images\\c0.jpg",
    ],
)
def test_names_fit_with_or_without_folder_and_extension(flat: Path, value: str) -> None:
    records = [(value, "cat"), *ROWS[1:]]
    (flat / "labels.csv").write_text(csv_of(records, "image", "label"))
    assert labels(scan(flat, options()))["images/c0.jpg"] == ("train", "cat")


def test_kaggles_flat_folders_take_their_labels_from_the_table(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"train_images/{name}" for name, _ in ROWS), "test_images/t0.jpg")
    (root / "train.csv").write_text(csv_of(ROWS, "image_id", "label"))
    (root / "test.csv").write_text("image_id\nt0.jpg\n")
    (root / "sample_submission.csv").write_text("image_id,label\nt0.jpg,cat\n")
    found = scan(root, options())
    assert found.classes == ("cat", "dog") and found.counts == {"train": 4}
    assert found.aside["pictures that the table does not name"] == 1
    assert found.notes == ("train.csv: files from 'image_id', labels from 'label'",)


def test_a_table_per_split(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"train/{name}" for name, _ in ROWS), "val/c0.jpg", "val/d0.jpg")
    (root / "train.csv").write_text(csv_of(ROWS, "file", "label"))
    (root / "val.csv").write_text(csv_of([("c0.jpg", "cat"), ("d0.jpg", "dog")], "file", "label"))
    found = scan(root)
    assert found.counts == {"train": 4, "val": 2}
    assert labels(found)["val/c0.jpg"] == ("val", "cat")


def test_a_split_column_is_used(flat: Path) -> None:
    records = [(name, label, "Validation" if "1" in name else "train") for name, label in ROWS]
    (flat / "labels.csv").write_text(csv_of(records, "file", "label", "split"))
    found = scan(flat)
    assert found.counts == {"train": 2, "val": 2}
    assert found.split_origins == {"train": "labels.csv", "val": "labels.csv"}


@pytest.mark.parametrize(
    ("column", "yes", "no"),
    [("is_valid", "True", "False"), ("is_train", "0", "1"), ("IsTest", "1", "0")],
)
def test_a_column_of_flags_gives_the_splits(flat: Path, column: str, yes: str, no: str) -> None:
    records = [(name, label, yes if "1" in name else no) for name, label in ROWS]
    (flat / "labels.csv").write_text(csv_of(records, "file", "label", column))
    held = "val" if column == "is_valid" else "test"
    assert scan(flat, options(val_fraction=None if held == "val" else 0)).counts == {
        "train": 2,
        held: 2,
    }


def test_names_fit_in_either_unicode_form(tmp_path: Path) -> None:
    root = tree(tmp_path, "i/caf\u00e9.jpg", "i/the\u0301.jpg")
    (root / "labels.csv").write_text("file,label\ncafe\u0301.jpg,a\nth\u00e9.jpg,b\n")
    assert scan(root, options()).counts == {"train": 2}


def test_rows_without_a_label_are_counted(flat: Path) -> None:
    (flat / "labels.csv").write_text("file,label\nc0.jpg,1.0\nc1.jpg,nan\nd0.jpg,2.0\nd1.jpg,\n")
    found = scan(flat, options())
    assert found.classes == ("1", "2")
    assert found.aside == {"rows without a label": 2, "pictures that the table does not name": 2}


def test_several_labels_a_picture_are_refused_or_said(flat: Path) -> None:
    (flat / "labels.csv").write_text("file,a,b\nc0.jpg,1,1\nc1.jpg,0,1\nd0.jpg,1,0\nd1.jpg,0,0\n")
    with pytest.raises(DataError, match=r"1 row of 4 with more than one 1 in the columns a, b"):
        scan(flat, options())
    records = [(name, label) for (name, _), label in zip(ROWS, ("a", "b", "a|b", "b"))]
    (flat / "labels.csv").write_text(csv_of(records, "file", "label"))
    assert "1 label made of others (such as 'a|b')" in scan(flat, options()).warnings[0]


def test_numbers_are_ordered_by_value_and_named_by_a_list(flat: Path, tmp_path: Path) -> None:
    records = [(name, str(number)) for (name, _), number in zip(ROWS, (10, 2, 10, 2))]
    (flat / "labels.csv").write_text(csv_of(records, "file", "label"))
    assert scan(flat, options()).classes == ("2", "10")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name {i}\n" for i in range(11)))
    assert scan(flat, options(class_names=str(names))).classes == ("name 2", "name 10")
    names.write_text("2,two\n10,ten\n")
    assert scan(flat, options(class_names=str(names))).classes == ("two", "ten")
    names.write_text("one\n")
    with pytest.raises(DataError, match=r"no name for 2 classes of 2 \(2, 10\)"):
        scan(flat, options(class_names=str(names)))


def test_why_a_table_beside_flat_pictures_is_of_no_use_is_said(flat: Path) -> None:
    (flat / "labels.csv").write_text("image,a,b\nc0.jpg,1,2\nd0.jpg,3,4\n")
    with pytest.raises(
        DataError, match=r"cannot be used: labels.csv.*columns: a, b.*--label-column"
    ):
        scan(flat, options())
    found = scan(flat, options(label_column="a"))
    assert found.classes == ("1", "3")


def test_one_hot_columns_are_labels(flat: Path) -> None:
    records = [(name, str(int(v == "cat")), f"{float(v == 'dog')}") for name, v in ROWS]
    (flat / "labels.csv").write_text(csv_of(records, "image", "cat", "dog"))
    assert rows(scan(flat, options())) == [("train", v, f"images/{name}") for name, v in ROWS]


def test_words_are_preferred_to_numbers_of_the_same_meaning(flat: Path) -> None:
    records = [(name, str(int(label == "dog")), label) for name, label in ROWS]
    (flat / "labels.csv").write_text(csv_of(records, "image", "label", "class_name"))
    assert scan(flat, options()).classes == ("cat", "dog")


def test_plain_class_folders_win_over_a_table_beside_them(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", n=2))
    (root / "boxes.csv").write_text(csv_of([("00.jpg", "5")], "file", "label"))
    (root / "labels.csv").write_text(
        csv_of([("a/00.jpg", "x"), ("b/00.jpg", "y")], "file", "label")
    )
    found = scan(root, options())
    assert found.classes == ("a", "b")
    assert any("labels come from the folders" in note for note in found.notes)
    assert scan(root, options(layout="table", labels=f"{root}/labels.csv")).classes == ("x", "y")


def test_folders_and_a_table_that_disagree_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("images/part1", "images/part2", n=2))
    records = [(f"part{p}/0{i}.jpg", "cat" if i else "dog") for p in (1, 2) for i in (0, 1)]
    (root / "labels.csv").write_text(csv_of(records, "file", "label"))
    assert scan(root, options()).classes == ("cat", "dog")  # one folder of parts: no class folders
    with pytest.raises(DataError, match=r"part1, part2.*labels.csv .cat, dog.*--layout folders or"):
        inner = root / "images"
        (root / "labels.csv").rename(inner / "labels.csv")
        scan(inner, options())
    assert scan(inner, options(layout="table")).classes == ("cat", "dog")
    assert scan(inner, options(layout="folders")).classes == ("part1", "part2")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,label\nc0.jpg,cat\nc0.jpg,dog\nd0.jpg,dog\n", "two labels or splits: cat.*dog"),
        ("image,a,b\nc0.jpg,1,2\nd0.jpg,3,4\n", r"not clear \(columns: a, b\).*--label-column"),
        ("image,label\nx,cat\ny,dog\n", "no column names pictures of the source.*--file-column"),
        (
            "image,label,split\nc0.jpg,cat,train\nd0.jpg,dog,later\n",
            "later in column .split. is no split",
        ),
        ("image,label\nc0.jpg,cat,extra\n", "row 2 has 3 columns, the first row 2"),
        ("", "holds no rows"),
        ("image,label\nc0.jpg,cat\nc1.jpg,cat\n", "one class .cat"),
    ],
)
def test_tables_that_cannot_be_used(flat: Path, table: str, message: str) -> None:
    path = flat / "labels.csv"
    path.write_text(table)
    with pytest.raises(DataError, match=message):
        scan(flat, options(labels=str(path)))


def test_files_that_are_missing_are_counted_or_refused(flat: Path) -> None:
    path = flat / "labels.csv"
    path.write_text(csv_of([*ROWS, ("gone.jpg", "cat")], "image", "label"))
    assert (
        "names 1 file that the source does not have (first: gone.jpg)"
        in scan(flat, options()).warnings[0]
    )
    path.write_text(csv_of([*ROWS, *((f"{i}.jpg", "cat") for i in range(3))], "image", "label"))
    with pytest.raises(DataError, match=r"names 3 files that the source does not have"):
        scan(flat, options(labels=str(path)))


def test_a_name_that_fits_two_files_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, "x/0.jpg", "y/0.jpg", "x/1.jpg")
    path = root / "labels.csv"
    path.write_text(csv_of([("0.jpg", "a"), ("1.jpg", "b")], "file", "label"))
    with pytest.raises(DataError, match=r"1 name fit several files .first: 0.jpg fits x/0.jpg"):
        scan(root, options(labels=str(path)))
    path.write_text(csv_of([("x/0.jpg", "a"), ("y/0.jpg", "b")], "file", "label"))
    assert scan(root, options(labels=str(path))).counts == {"train": 2}


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b"x" * (2 << 20) + b'"\n',
        b"\xff\xfe\x00",
        b"a,b\n\0,\0\n",
        b"[" * 100_000,
        b'{"a": [1], "b": [1, 2]}',
        b'{"images": [{}], "annotations": [{"image_id": 1}], "categories": [3]}',
        b'{"images": 1, "annotations": 2, "categories": null}',
        b'[{"file": "a", "label": ["x", "y"]}]',
        b"PAR1garbagePAR1",
    ],
)
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_hostile_tables_are_errors_that_name_the_file(data: bytes, ending: str) -> None:
    try:
        parse_table(data, f"labels.{ending}")
    except DataError as error:
        assert "labels." in str(error)


def test_names_that_lead_out_of_the_source_find_nothing(flat: Path) -> None:
    tree(flat.parent, "secret.jpg")
    path = flat / "labels.csv"
    path.write_text(
        csv_of([("../secret.jpg", "x"), ("/etc/hostname", "y"), *ROWS], "image", "label")
    )
    assert all(e.file.startswith("images/") for e in scan(flat, options()).entries)


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_csv_and_json_of_the_same_rows_read_the_same(records: list[tuple[str, str]]) -> None:
    import csv
    import io

    out = io.StringIO()
    csv.writer(out).writerows([("file", "label"), *records])
    as_csv = parse_table(out.getvalue().encode(), "x.csv")
    as_json = parse_table(
        json.dumps([{"file": f, "label": v} for f, v in records]).encode(), "x.json"
    )
    assert as_csv.columns == as_json.columns
    kept = [row for row in as_json.rows if any(row)]
    assert [row for row in as_csv.rows if any(row)] == kept


def test_a_table_in_each_split_folder(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        root = tree(tmp_path, *(f"{split}/{name}" for name, _ in ROWS))
        records = [(name, str(int(v == "cat")), str(int(v == "dog"))) for name, v in ROWS]
        (root / split / "_classes.csv").write_text(csv_of(records, "filename", "cat", "dog"))
    found = scan(tmp_path)
    assert found.counts == {"train": 4, "val": 4, "test": 4}
    assert labels(found)["valid/d0.jpg"] == ("val", "dog")


def test_a_list_without_a_header_and_with_spaces(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "trainval.txt"
    path.write_text("".join(f"{name[:-4]} {label}\n" for name, label in ROWS))
    assert rows(scan(flat, options(labels=str(path))))[0] == ("train", "cat", "images/c0.jpg")
