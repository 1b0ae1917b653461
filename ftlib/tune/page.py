"""A self-contained HTML page: no scripts, no outside files, readable in MLflow's artifact viewer and as a mail attachment."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1a1a1a;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .4rem}p{margin:.4rem 0}
.lead{font-size:1.1rem}.muted{color:#5a6672;font-size:.9rem}code{background:#f2f4f6;padding:.1rem .3rem;border-radius:3px;font-size:.9em}
.wrap{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e5e9ed;white-space:nowrap}th:first-child,td:first-child,td.text,th.text{text-align:left}
td.text{white-space:normal}tr.best td{font-weight:600;color:#c8102e}tr.dim td{color:#8a96a3}
@media(prefers-color-scheme:dark){body{background:#fff}}
"""


def page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n'
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + "\n</body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def command(text: str) -> str:
    return f"<p><code>{escape(text)}</code></p>"


def value(of: Any) -> str:
    """A setting's value in a table."""
    return "-" if of is None else f"{of:.4g}" if isinstance(of, float) else str(of)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    kinds: Sequence[str] = (),
    text_columns: Sequence[int] = (),
) -> str:
    """`kinds`: a CSS class per row (best, dim or nothing). Numbers come formatted."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(
            f'<{tag} class="text">{escape(str(v))}</{tag}>'
            if i in text_columns
            else f"<{tag}>{escape(str(v))}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(
        f'<tr class="{kind}">{cells("td", row)}</tr>' if kind else f"<tr>{cells('td', row)}</tr>"
        for row, kind in zip(rows, list(kinds) or [""] * len(rows))
    )
    return f'<div class="wrap"><table><thead><tr>{cells("th", columns)}</tr></thead><tbody>{body}</tbody></table></div>'
