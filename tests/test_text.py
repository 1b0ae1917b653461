"""Text for messages, CSV files and figures."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib import text


@given(st.text(alphabet="ab .,-/", max_size=600))
def test_wrapped_lines_fit_and_keep_every_word(value):
    lines = text.wrapped(value, "    ").splitlines()
    assert " ".join(lines).split() == value.split()
    assert all(len(line) <= text.WIDTH or len(line.split()) == 1 for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])


@given(st.text(max_size=600), st.integers(60, 300))
def test_shortened_text_fits_and_keeps_its_ends(value, limit):
    short = text.shorten(value, limit)
    assert short == value if len(value) <= limit else len(short) <= limit + 10


@pytest.mark.parametrize(
    ("address", "hidden"),
    [
        ("https://user:pa#ss@host:5000/x", "https://***@host:5000/x"),
        ("postgresql://me:a/b@c@db/mlflow", "postgresql://***@db/mlflow"),
        ("https://host/x?token=abc&a=1", "https://host/x?token=***&a=1"),
        ("s3://bucket/runs", "s3://bucket/runs"),
    ],
)
def test_no_part_of_a_password_is_shown(address, hidden):
    assert text.hide_password(address) == hidden


def test_control_characters_and_stray_bytes_are_escaped():
    assert text.printable("a\x1b[31mb\udc80") == "a\\x1b[31mb\\udc80"
    assert text.printable("Ünïcode 漢") == "Ünïcode 漢"


@pytest.mark.parametrize("cell", ["=HYPERLINK(1)", "+1", "-1", "@x", "\tx", "plain"])
def test_a_csv_cell_starts_no_formula_and_reads_back(cell):
    file = io.StringIO()
    csv.writer(file).writerow([text.csv_cell(cell)])
    read = next(csv.reader(io.StringIO(file.getvalue())))[0]
    assert read[0] not in "=+-@\t\r" and read.removeprefix("'") == cell


def test_a_name_in_a_figure_is_short_and_has_no_mathematics():
    assert text.figure_text("$x$") == r"\$x\$"
    assert len(text.figure_text("n" * 90, 20)) == 20


@pytest.mark.parametrize("value", ["https://host:5000/a", "s3://bucket/a", "me@host", "a: b@c", ""])
def test_text_without_a_password_stays(value):
    assert text.hide_password(value) == value


@given(st.text(st.characters(exclude_categories=[])))
def test_printable_text_can_be_encoded_and_has_no_control_characters(value):
    shown = text.printable(value)
    shown.encode()
    assert all(c.isprintable() for c in shown)


@pytest.mark.parametrize("piece", ["x", "a://", "a:", "http://u:p", "?token", "@", "\x1b"])
def test_long_text_is_handled_in_linear_time(piece):
    """A quadratic search would run for hours on these."""
    value = piece * (200_000 // len(piece))
    assert len(text.shorten(text.hide_password(value))) < 300
