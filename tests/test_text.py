"""Text for messages: short, printable, without passwords."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.text import hide_password, printable, shorten


@pytest.mark.parametrize(
    "address",
    [
        "https://user:SECRET@host/path",
        "https://user:SEC#RET/SECRET@host",
        "postgresql://user:SECRET@SECRET@host:5432/db",
        "https://SECRETTOKEN@host",
        "s3://KEY:SECRET@bucket/runs?region=eu",
        "s3://bucket/runs?secret_key=SECRET&region=eu",
        "https://host/x?X-Amz-Signature=SECRET",
    ],
)
def test_the_password_of_an_address_is_hidden_and_the_host_stays(address):
    shown = hide_password(f"cannot reach {address} now")
    assert "SEC" not in shown and "RET" not in shown and "***" in shown
    assert ("host" in shown or "bucket" in shown) and shown.endswith(" now")


@pytest.mark.parametrize("text", ["https://host:5000/a", "s3://bucket/a", "me@host", "a: b@c", ""])
def test_text_without_a_password_stays(text):
    assert hide_password(text) == text


@given(st.text(max_size=400), st.integers(60, 100))
def test_shortened_text_keeps_its_ends_and_its_limit(text, limit):
    short = shorten(text, limit)
    assert len(short) <= limit + 5 and short[:10] == text[:10] and short[-10:] == text[-10:]


@given(st.text(st.characters(exclude_categories=[])))
def test_printable_text_can_be_encoded_and_has_no_control_characters(text):
    shown = printable(text)
    shown.encode()
    assert all(c.isprintable() for c in shown)
