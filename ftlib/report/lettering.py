"""Text on pictures that Pillow draws: its font, and what fits."""

from __future__ import annotations

from functools import lru_cache

import matplotlib
from PIL import ImageFont


@lru_cache(maxsize=16)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most scripts' class names."""
    return ImageFont.truetype(
        f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf", size
    )


def fit(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut off with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
