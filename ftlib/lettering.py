"""Text on pictures that Pillow draws: its font, and what fits."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont


@lru_cache(maxsize=16)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most scripts' class names."""
    found = find_spec("matplotlib")  # importing it costs 0.3 s
    assert found is not None and found.origin is not None
    fonts = Path(found.origin).parent / "mpl-data/fonts/ttf"
    return ImageFont.truetype(str(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def fit(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut off with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
