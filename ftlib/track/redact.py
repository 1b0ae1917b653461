"""Removes secrets from text before it reaches a journal, MLflow or a log.

A secret is: the password in a URL; the value of a setting or variable whose name says so (token,
password, secret, api key, credential); a bearer or basic authorization; a signature in a pre-signed
URL; a private key; what has the shape of a well-known access token; and the literal values of this
process's own secret environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_NAME = (
    r"(?:pass(?:wd|word|phrase)?|pwd|secrets?|tokens?|(?:api|access|account|private)[_-]?keys?"
    r"|credentials?|auth|signature|sig)"
)
_SECRET_KEY = re.compile(
    rf"(?:^|[_\-.\s]){_SECRET_NAME}(?:$|[_\-.\s](?:id|key|value|access[_-]?key)$)", re.IGNORECASE
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_URL_PASSWORD = re.compile(
    r"(?P<head>\b[A-Za-z][A-Za-z0-9+.\-]*://[^\s/:@'\"<>?#]*:)(?P<secret>[^\s'\"<>]*)(?=@)"
)
_URL_TOKEN_USER = re.compile(r"(?P<head>\bhttps?://)(?P<secret>[^\s/:@'\"<>?#]{16,})(?=@)")
_PATTERNS = (
    re.compile(
        r"(?P<head>-----BEGIN [A-Z ]*PRIVATE KEY-----)(?P<secret>.*?)(?=-----END|\Z)", re.DOTALL
    ),
    re.compile(
        r"(?P<head>\b(?:bearer|basic)\s+)(?P<secret>[A-Za-z0-9._~+/=\-]{6,})", re.IGNORECASE
    ),
)
_NAMED = re.compile(
    r"(?P<flag>--)?(?P<name>[A-Za-z0-9][A-Za-z0-9_.\-]*)(?P<gap>[\"']?\s*[=:]\s*[\"']?|\s+)"
)
"""A name before a value: name=value, name: value, "name": "value", --name value."""
_VALUE = re.compile(r"[^\s\"'&,;}\]]+")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key id
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_\-]{16,}"
    r"|hf_[A-Za-z0-9]{20,}"
    r"|sk-[A-Za-z0-9_\-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9\-]{10,}"
    r"|AIza[A-Za-z0-9_\-]{30,}"  # Google API key
    r"|ya29\.[A-Za-z0-9_\-]{20,}"
    r"|dapi[0-9a-f]{32}"  # Databricks
    r"|eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*"  # JSON web token
    r")"
)


def is_secret_name(name: str) -> bool:
    """Whether a setting's, header's or variable's name says that its value is a secret."""
    return bool(_SECRET_KEY.search(_CAMEL.sub("_", name)))


def _environment_secrets() -> list[str]:
    values = {
        v
        for k, v in os.environ.items()
        if len(v) >= 8 and is_secret_name(k) and not v.startswith(("/", "~"))
    }
    return sorted(values, key=len, reverse=True)


def _redact_named(text: str) -> str:
    out, done = [], 0
    for match in _NAMED.finditer(text):
        if (
            match.start() < done
            or (match["gap"].isspace() and not match["flag"])
            or not is_secret_name(match["name"])
        ):
            continue
        value = _VALUE.match(text, match.end())
        if value:
            out += [text[done : value.start()], HIDDEN]
            done = value.end()
    return "".join([*out, text[done:]])


def redact(text: str) -> str:
    """`text` with every secret in it replaced by `***`. Redacting twice changes nothing more."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _URL_PASSWORD.sub(lambda m: m["head"] + HIDDEN, text)
    text = _URL_TOKEN_USER.sub(lambda m: m["head"] + HIDDEN, text)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda m: m["head"] + HIDDEN, text)
    return _SHAPES.sub(HIDDEN, _redact_named(text))


def redact_address(uri: str) -> str:
    """One address without its password, whatever that holds; the user name stays.

    `redact` looks for addresses in text and ends them at a space or quote. Here the whole text is
    the address, so all between `://` and the last `@` is user and password.
    """
    scheme, separator, rest = uri.partition("://")
    credentials, at, place = rest.rpartition("@")
    if separator and at:
        user, colon, _ = credentials.partition(":")
        hidden = f"{user}:{HIDDEN}" if colon else credentials
        uri = f"{scheme}://{hidden}@{place}"
    return redact(uri)


def redact_value(name: str, value: Any) -> str:
    """A named value as text: hidden whole if the name says that it is a secret."""
    text = value if isinstance(value, str) else str(value)
    return HIDDEN if text and is_secret_name(name) else redact(text)


def redact_tree(value: Any, name: str = "") -> Any:
    """The same for nested mappings and lists; numbers, booleans and None stay as they are."""
    if isinstance(value, Mapping):
        return {k: redact_tree(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(v, name) for v in value]
    return redact_value(name, value) if isinstance(value, str) else value
