"""Bodies are read within bounds; refused ones are drained, so that senders read the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from ftlib.deploy.errors import RequestError
from ftlib.deploy.request_body import BodyLimits, read_picture

FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    b"Content-Type: image/jpeg\r\n\r\n\xff\xd8 pixels\r\n\r\n--\r\n--xyz--\r\n"
)


def read(chunks: list[bytes], limits: BodyLimits, **headers: str) -> tuple[bytes, int]:
    """(what `read_picture` returns, chunks that it took)."""
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        if taken > len(chunks):
            await asyncio.sleep(60)
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
    try:
        return asyncio.run(read_picture(request, limits)), taken
    except RequestError as error:
        error.taken = taken  # type: ignore[attr-defined]
        raise


def test_a_body_is_the_file() -> None:
    limits = BodyLimits(100)
    assert read([b"ab", b"cd"], limits) == (b"abcd", 2)
    assert limits.held == 4


def test_the_first_file_of_a_form_is_taken() -> None:
    kind = "multipart/form-data; boundary=xyz"
    limits = BodyLimits(100)
    found, _ = read([FORM[:50], FORM[50:]], limits, content_type=kind)
    assert found == b"\xff\xd8 pixels\r\n\r\n--" and limits.held == len(found)
    found, _ = read([FORM], BodyLimits(100), content_type='Multipart/Form-Data; boundary="xyz"')
    assert found == b"\xff\xd8 pixels\r\n\r\n--"
    field = FORM[: FORM.index(b"--xyz", 5)] + b"--xyz--\r\n"
    assert read([field], BodyLimits(100), content_type=kind)[0] == b"hello"


@pytest.mark.parametrize("body", [b"", b"--xyz--\r\n", b"no form at all"])
def test_a_form_without_a_file_is_explained(body: bytes) -> None:
    limits = BodyLimits(100)
    with pytest.raises(RequestError, match="curl -F file=@") as caught:
        read([body], limits, content_type="multipart/form-data; boundary=xyz")
    assert caught.value.status == 400 and limits.held == 0


def test_several_files_are_refused_and_not_passed_over() -> None:
    kind, part = (
        "multipart/form-data; boundary=xyz",
        FORM[FORM.index(b"--xyz", 5) : -len("--xyz--\r\n")],
    )
    with pytest.raises(RequestError, match="the form has 2 files") as caught:
        read([part, FORM[FORM.index(b"--xyz", 5) :]], BodyLimits(500), content_type=kind)
    assert caught.value.status == 400


def test_a_body_without_line_breaks_names_the_option_of_curl_that_keeps_them() -> None:
    """curl -d sends a file without its line breaks, under the same type as --data-binary."""
    kind, limits = "application/x-www-form-urlencoded", BodyLimits(9000)
    with pytest.raises(RequestError, match="--data-binary") as caught:
        read([bytes(5000)], limits, content_type=kind)
    assert caught.value.status == 400 and limits.held == 0
    assert len(read([bytes(4999) + b"\n"], limits, content_type=kind)[0]) == 5000


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_read_to_its_end(announced: bool) -> None:
    chunks, limits = [bytes(60_000)] * 5, BodyLimits(1000)
    headers = {"content_length": "300000"} if announced else {}
    with pytest.raises(RequestError, match=r"more than 0\.001 MB") as caught:
        read(chunks, limits, **headers)
    assert caught.value.status == 413 and caught.value.taken == 5 and limits.held == 0


def test_a_client_that_expects_100_continue_is_refused_before_it_sends() -> None:
    headers = {"content_length": "300000", "expect": "100-continue"}
    with pytest.raises(RequestError) as caught:
        read([bytes(300_000)], BodyLimits(1000), **headers)
    assert caught.value.status == 413 and caught.value.taken == 0


def test_draining_is_bounded_in_bytes_and_seconds() -> None:
    limits = BodyLimits(1000, drained_bytes=100_000)
    with pytest.raises(RequestError) as caught:
        read([bytes(60_000)] * 50, limits, content_length="3000000")
    assert caught.value.taken == 2
    limits = BodyLimits(1000, drain_seconds=0.05)
    with pytest.raises(RequestError) as caught:
        read([], limits, content_length="3000000")
    assert caught.value.status == 413


def test_slow_senders_are_given_up() -> None:
    limits = BodyLimits(1000, seconds=0.05)
    with pytest.raises(RequestError, match=r"did not arrive within 0\.05 seconds") as caught:
        read([], limits)
    assert caught.value.status == 408 and limits.held == 0


def test_too_many_bytes_at_once_are_refused() -> None:
    limits = BodyLimits(1000, held_bytes=10)
    limits.held = 11
    with pytest.raises(RequestError) as caught:
        read([b"abc"], limits)
    assert caught.value.status == 429 and caught.value.taken == 1
