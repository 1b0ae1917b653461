"""The pages' look: everything inside the file, everything that users named escaped."""

import re

import numpy as np
import pytest

from ftlib.report import html

HOSTILE = '"><script>alert(1)</script>'


def part(name):
    """A part of a page that shows HOSTILE in every place where text goes."""
    picture = html.picture(np.zeros((8, 8, 3), np.uint8), HOSTILE)
    parts = {
        "paragraph": lambda: html.paragraph(HOSTILE),
        "command": lambda: html.command(HOSTILE),
        "link": lambda: html.link(HOSTILE, HOSTILE),
        "section": lambda: html.section(HOSTILE, html.paragraph(HOSTILE), note=HOSTILE),
        "facts": lambda: html.facts([(HOSTILE, HOSTILE)]),
        "table": lambda: html.table([HOSTILE], [[HOSTILE]], text_columns=(0,)),
        "plot": lambda: html.plot(b"png", HOSTILE),
        "picture": lambda: picture,
        "card": lambda: html.card(HOSTILE, [picture]),
        "grid": lambda: html.grid([html.card(HOSTILE, [picture])]),
    }
    return parts[name]()


PARTS = [
    "paragraph",
    "command",
    "link",
    "section",
    "facts",
    "table",
    "plot",
    "picture",
    "card",
    "grid",
]


@pytest.mark.parametrize("name", PARTS)
def test_text_is_escaped_in_every_part(name):
    text = html.page(HOSTILE, [part(name)], [html.paragraph(HOSTILE)])
    assert "<script" not in text and "&lt;script&gt;" in text


def test_half_sections_and_only_they_share_a_row():
    text = html.page("page", [html.section("whole"), html.section("left", half=True)])
    assert "<section><h2>whole" in text and '<section class="half"><h2>left' in text


def test_parts_are_not_escaped_twice():
    text = html.page("page", [html.section("a & b", html.grid([html.card("x", [])]))])
    assert "a &amp; b" in text and "&amp;amp;" not in text and '<div class="grid">' in text


def test_plain_text_given_as_a_part_is_escaped():
    assert "&lt;b&gt;" in html.page("page", ["<b>"])


def test_a_page_fetches_nothing():
    picture = html.picture(np.zeros((80, 80, 3), np.uint8), "large")
    text = html.page("page", [picture, html.plot(b"png", "figure"), html.drawing("<svg></svg>")])
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text
    assert "image/jpeg" in text and "<svg></svg>" in text


def test_rows_and_columns_keep_their_kinds():
    text = html.table(["a", "b"], [["1", "2"], ["3", "4"]], kinds=["best", ""], text_columns=(1,))
    assert '<tr class="best"><td>1</td><td class="text">2</td></tr>' in text
    assert '<tr><td>3</td><td class="text">4</td></tr>' in text


def test_values_are_short():
    assert [html.value(v) for v in (None, 0.123456, 3, "x")] == ["-", "0.1235", "3", "x"]
