"""Text that is fit for a message: short, on one line, and without passwords."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable

WIDTH = 100
"""Columns of what people read in a terminal."""

# Bounded, so that no text makes the search quadratic.
_SCHEME = r"(?P<scheme>[A-Za-z][\w+.-]{0,30}://)"
_USER = re.compile(_SCHEME + r"[^\s'\"@/]{1,2000}@")
_PASSWORD = re.compile(_SCHEME + r"[^\s'\":]{0,500}:[^\s'\"]{0,2000}@")
_QUERY = re.compile(
    r"(?P<name>[?&][\w-]{0,30}(?:secret|password|passwd|token|access_key|signature|sig)"
    r"[\w-]{0,30}=)[^&\s'\"]+",
    re.IGNORECASE,
)


def shorten(text: str, limit: int = 200) -> str:
    """`text` with its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    kept = (limit - 25) // 2
    return f"{text[:kept]}... ({len(text):,} characters) ...{text[-kept:]}"


def hide_password(text: str) -> str:
    """`text` with the user part and secret parameters of every address in it replaced by `***`.

    An address is hidden up to its last @, since people write passwords with #, / and : in them.
    """
    text = _PASSWORD.sub(r"\g<scheme>***@", text)
    text = _USER.sub(r"\g<scheme>***@", text)
    return _QUERY.sub(r"\g<name>***", text)


def wrapped(text: str, indent: str = "  ") -> str:
    """One line of `text`, in lines of at most WIDTH columns; `indent` begins all but the first.

    Paths, addresses and other words stay whole, however long they are.
    """
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped, so that a terminal shows it."""
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return kept.encode("utf-8", "backslashreplace").decode("utf-8")


def percent(share: float, digits: int = 0) -> str:
    """`share` (0 to 1) as people read it: 0.917 is "92 %", with one digit "91.7 %"."""
    return f"{100 * share:.{digits}f} %"


def csv_cell(text: str) -> str:
    """`text` for a CSV file: a leading =, +, -, @, tab or CR starts no formula in a spreadsheet.

    A quote is put before it, as OWASP's page on CSV injection advises.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """A CSV file of `rows`; text from outside must have gone through `csv_cell`."""
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    return table.getvalue().encode("utf-8", "replace")


def figure_text(text: str, limit: int = 40) -> str:
    """`text` for matplotlib, which would read what stands between two $ as mathematics."""
    text = printable(text)
    text = text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return text.replace("$", r"\$")
