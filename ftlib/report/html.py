"""The look of all pages: one HTML file that holds its style and pictures, without a script.

Templates in `templates/` hold the markup and escape what users named: classes, files, settings.
The functions here return `Markup`: text that is HTML already and is not escaped again.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

PIXELATED = 64
"""Pictures of at most this side are stored losslessly and enlarged without smoothing."""


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("ftlib.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def _part(name: str, *arguments: Any) -> Markup:
    """The macro `name` of parts.html, called."""
    parts: Any = _templates().get_template("parts.html").module
    return Markup(getattr(parts, name)(*arguments))  # the template has escaped its arguments


def page(title: str, parts: Iterable[str], lead: Iterable[str] = ()) -> str:
    """The whole file: `lead` stands under the title, `parts` below it. Both are `Markup`."""
    style = Markup(_templates().get_template("style.css").render())
    head = Markup("\n").join(lead)
    return (
        _templates()
        .get_template("page.html")
        .render(title=title, style=style, lead=head, parts=list(parts))
    )


def paragraph(text: str, kind: str = "") -> Markup:
    """`kind`: lead (larger), soft (paler), or nothing."""
    return _part("paragraph", text, kind)


def command(text: str) -> Markup:
    """A command to type."""
    return _part("command", text)


def link(text: str, address: str) -> Markup:
    """A link on a line of its own."""
    return _part("link", text, address)


def section(title: str, *parts: str, note: str = "", half: bool = False) -> Markup:
    """A heading with its parts below it; `note` says how to read them.

    `half`: on a wide screen it takes half of the page, beside the next section of that kind.
    """
    return _part("section", title, parts, note, half)


def facts(values: Iterable[tuple[str, str]]) -> Markup:
    """Large numbers with their names: (value, name)."""
    return _part("facts", list(values))


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    kinds: Sequence[str] = (),
    text_columns: Sequence[int] = (),
) -> Markup:
    """A table. The first column is text, the others are figures, aligned right.

    Args:
        heads: the columns' titles.
        rows: cells, formatted already.
        kinds: per row: best (stands out), dim (stands back), or nothing.
        text_columns: columns that hold sentences, which wrap.
    """
    cells = [list(row) for row in rows]
    return _part("table", heads, cells, list(kinds) or [""] * len(cells), text_columns)


def plot(png: bytes, what: str) -> Markup:
    """A drawn figure; `what` is read to those who do not see it."""
    return _part("plot", _data_uri(png, "png"), what)


def drawing(svg: str) -> Markup:
    """A figure as SVG that ftlib drew itself; it goes into the page as it is."""
    return _part("drawing", Markup(svg))


def picture(image: np.ndarray, caption: str) -> Markup:
    """A picture, uint8[H, W, 3], with a caption."""
    small = max(image.shape[:2]) <= PIXELATED
    buffer = io.BytesIO()
    if small:
        Image.fromarray(image).save(buffer, "PNG")
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=85)
    source = _data_uri(buffer.getvalue(), "png" if small else "jpeg")
    return _part("picture", source, caption, small)


def card(title: str, pictures: Iterable[str], small: bool = False) -> Markup:
    """A frame with a title around some pictures."""
    return _part("card", title, list(pictures), small)


def grid(cards: Iterable[str]) -> Markup:
    """Cards beside and below each other."""
    return _part("grid", list(cards))


def value(of: Any) -> str:
    """A setting's value as a table shows it."""
    if of is None:
        return "-"
    return f"{of:.4g}" if isinstance(of, float) else str(of)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
