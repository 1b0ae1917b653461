"""Read the picture out of a request, within bounds of size and time.

A body is the file itself (`curl --data-binary @x.jpg`) or a form (`curl -F file=@x.jpg`), of
which the first file counts. The body of a refused request is read to its end before the answer,
as far as the bounds allow: a client that is still sending could otherwise lose the answer to a
broken pipe.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from ftlib.deploy.errors import RequestError

FORM_OVERHEAD = 100_000
"""Bytes that a form may add to the picture."""


@dataclass
class BodyLimits:
    max_bytes: int
    """Larger pictures are refused."""
    seconds: float = 30.0
    """Most time for a body to arrive."""
    held_bytes: int = 256_000_000
    """Most bytes of all bodies together that are being read or waiting."""
    drained_bytes: int = 64_000_000
    """Most bytes of a refused body that are read and thrown away."""
    drain_seconds: float = 10.0
    held: int = field(default=0, init=False)
    """Bytes held now."""


async def read_picture(request: Request, limits: BodyLimits) -> bytes:
    """The file in the request's body.

    The caller subtracts its length from `limits.held` when it is done with it. Raises RequestError:
    413 for one that is too large, 408 for one that is too slow, 429 when too much is being read.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_bytes + FORM_OVERHEAD:
        if request.headers.get("expect", "").lower() != "100-continue":
            await drain(request, limits)
        raise _too_large(limits)
    if limits.held > limits.held_bytes:
        await drain(request, limits)
        raise RequestError(429, "the server is reading too many pictures. Try again in a second")
    body = bytearray()
    try:
        await asyncio.wait_for(_read(request, limits, body), limits.seconds)
        found = _file_of_form(body, request.headers.get("content-type", ""))
        if len(found) > limits.max_bytes:
            raise _too_large(limits)
    except asyncio.TimeoutError:
        limits.held -= len(body)
        why = f"the picture did not arrive within {limits.seconds:g} seconds"
        raise RequestError(408, why) from None
    except BaseException:
        limits.held -= len(body)
        raise
    limits.held += len(found) - len(body)
    return found


async def _read(request: Request, limits: BodyLimits, body: bytearray) -> None:
    async for chunk in request.stream():
        body += chunk
        limits.held += len(chunk)
        if len(body) > limits.max_bytes + FORM_OVERHEAD:
            await drain(request, limits)
            raise _too_large(limits)


def _too_large(limits: BodyLimits) -> RequestError:
    return RequestError(413, f"more than {limits.max_bytes / 1e6:g} MB. Send a smaller picture")


async def drain(request: Request, limits: BodyLimits) -> None:
    """Read and forget the rest of a body that is refused, within bounds."""
    until, read = time.monotonic() + limits.drain_seconds, 0
    while read < limits.drained_bytes and (left := until - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(request.receive(), left)
        except asyncio.TimeoutError:
            return
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _file_of_form(body: bytearray, content_type: str) -> bytes:
    """The file of a multipart form, or its first field; other bodies are the file itself.

    Raises RequestError(400) for a form without a file or with several, and for a body of `curl -d`.
    """
    kind, _, parameters = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        # A file of this length has a line break in all but one case of 10^13.
        as_text = "urlencoded" in kind and len(body) > 4000
        if as_text and b"\n" not in body and b"\r" not in body:
            why = "`curl -d` has left out the file's line breaks. Use `curl --data-binary` or `-F`"
            raise RequestError(400, why)
        return bytes(body)
    names = dict(part.strip().partition("=")[::2] for part in parameters.split(";"))
    boundary = names.get("boundary", "").strip('"')
    parts = bytes(body).split(b"--" + boundary.encode("latin-1")) if boundary else []
    fields = []
    for part in parts[1:-1]:
        head, _, contents = part.partition(b"\r\n\r\n")
        fields.append((b"filename" in head.lower(), contents.removesuffix(b"\r\n")))
    files = [contents for is_file, contents in fields if is_file]
    if not files and not fields:
        raise RequestError(400, "the form has no file. Send one with `curl -F file=@picture.jpg`")
    if len(files) > 1:
        raise RequestError(400, f"the form has {len(files)} files. Send each in its own request")
    return files[0] if files else fields[0][1]


__all__ = ["BodyLimits", "ClientDisconnect", "drain", "read_picture"]
