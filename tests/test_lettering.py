"""Text on pictures that Pillow draws."""

import pytest

from ftlib.lettering import fit, font


@pytest.mark.parametrize("text", ["ant", "a long name of a class", "W" * 60])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_text_is_cut_to_its_width_and_says_so(text, width):
    letters = font(12)
    found = fit(text, width, letters)
    assert letters.getlength(found) <= width
    if letters.getlength(text) <= width:
        assert found == text
    else:
        assert found.endswith("…") and text.startswith(found[:-1].rstrip())
