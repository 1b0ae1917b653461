"""One HTML file that holds everything it shows: style and pictures inside, no script, nothing fetched. Light and dark.

Functions give HTML text; what users named (classes, files) is escaped here and nowhere else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#dde3ea;--paper:#fff;--card:#f6f8fa;--accent:#2563a8;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa7b6;--line:#323b47;--paper:#14181d;--card:#1d232b;--accent:#7db3ee;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:38px 0 6px;border-top:1px solid var(--line);padding-top:22px}
p{margin:6px 0 12px;max-width:76ch}.soft{color:var(--soft)}code{background:var(--card);padding:1px 5px;border-radius:4px}
.scroll{overflow-x:auto;max-height:560px;overflow-y:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:6px 8px;font-size:12.5px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--card);font-weight:600;color:var(--soft)}td:first-child,th:first-child{text-align:left}tr:last-child td{border-bottom:0}td.w,th.w{text-align:left;white-space:normal}
figure{margin:0}.plot img{display:block;max-width:100%;height:auto;background:#fff;border-radius:8px;border:1px solid var(--line)}
.grid{display:flex;flex-wrap:wrap;gap:14px}.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;min-width:0}
.row{display:flex;gap:8px;flex-wrap:wrap}.row figure{width:128px}.row img{width:128px;height:128px;object-fit:contain;border-radius:6px;display:block;image-rendering:auto;background:#0001}
.small img{width:96px;height:96px}.small figure{width:96px}.pixel img{image-rendering:pixelated}
figcaption{font-size:12px;color:var(--soft);overflow-wrap:anywhere;line-height:1.35;padding-top:3px}.card h3{font-size:14px;margin:0 0 8px;overflow-wrap:anywhere}
.wrong{color:var(--bad)}.facts{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}.fact{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px 14px}
.fact b{display:block;font-size:20px;font-weight:650}.fact span{font-size:12px;color:var(--soft)}
"""


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole file. `lead` and `sections` are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>{lead}{''.join(sections)}</main></body></html>"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    return (
        f"<h2>{escape(title)}</h2>"
        + (f'<p class="soft">{escape(note)}</p>' if note else "")
        + "".join(parts)
    )


def paragraph(text: str, soft: bool = False) -> str:
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def facts(values: Iterable[tuple[str, str]]) -> str:
    """Large numbers with their names: (value, name)."""
    return (
        '<div class="facts">'
        + "".join(
            f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
            for value, name in values
        )
        + "</div>"
    )


def table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], words: tuple[int, ...] = ()
) -> str:
    """The first column is text, the others are figures, aligned right; the columns numbered in `words` are sentences, and wrap."""
    kind = lambda i: ' class="w"' if i in words else ""  # noqa: E731
    head = "".join(f"<th{kind(i)}>{escape(str(h))}</th>" for i, h in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind(i)}>{escape(str(cell))}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(png: bytes, what: str) -> str:
    """A drawn figure; `what` is read to those who do not see it."""
    return f'<figure class="plot"><img alt="{escape(what, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def picture(image: np.ndarray, caption: str) -> str:
    """uint8[H, W, 3] with a caption. Small pictures are stored as they are (PNG) and shown without smoothing."""
    small = max(image.shape[:2]) <= 64
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG") if small else Image.fromarray(image).save(
        buffer, "JPEG", quality=85
    )
    kind = "png" if small else "jpeg"
    return (
        f'<figure{" class=pixel" if small else ""}><img alt="{escape(caption, quote=True)}" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def card(title: str, pictures: Iterable[str], small: bool = False) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3><div class="row{" small" if small else ""}">{"".join(pictures)}</div></div>'


def grid(cards: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'
