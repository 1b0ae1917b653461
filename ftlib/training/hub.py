"""Published weights on this machine: from the caches of torch and the Hugging Face Hub, or fetched.

A cached file is used as it is, without asking the network. Fetching gives up when nothing has come
for PATIENCE seconds, and the error says which file to put where.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import urllib.request
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ftlib.training.weight_files import WeightFileError, check_hash_in_name

log = logging.getLogger("ftlib.training")

T = TypeVar("T")
PATIENCE = 8.0
"""Seconds without a byte after which a network counts as absent."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in a repository, the safer one first."""
CHUNK = 2**20


class _NotThereError(OSError):
    """The Hub has no such file."""


def offline() -> bool:
    """Whether the user has switched the network off, by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    on = {"1", "ON", "YES", "TRUE"}
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in on for name in names)


# --- torch's cache --------------------------------------------------------------------------------


def url_file(url: str) -> Path:
    """The file behind `url`, in $TORCH_HOME/hub/checkpoints as torch.hub keeps it.

    Raises WeightFileError where it cannot be had, or is not what the hash in its name says.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        try:
            if offline():
                raise OSError("the network is switched off by HF_HUB_OFFLINE")
            _patiently(lambda progress: _download(url, path, progress))
        except (OSError, TimeoutError) as error:
            raise WeightFileError(
                f"{url} could not be fetched ({_first_line(error)}). Fetch it where there is a "
                f"network and put it at {path}, or set model.init_from to scratch or file:PATH"
            ) from None
    return path


def _download(url: str, path: Path, progress: Callable[[], None]) -> None:
    log.info("fetching %s", url)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer, temporary.open("wb") as out:
            while chunk := answer.read(CHUNK):
                progress()
                digest.update(chunk)
                out.write(chunk)
        check_hash_in_name(url, digest.hexdigest())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the Hub's cache ------------------------------------------------------------------------------


def hub_cache() -> Path:
    """Where the Hub's client keeps its files: by its own environment variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home).expanduser() / "hub"


def hub_weights(repo: str, revision: str = "", filename: str = "") -> Path:
    """The weights of a repository.

    Raises WeightFileError where they cannot be had, or differ from the sha256 they are kept under.
    """
    path = _hub_file(repo, revision, (filename,) if filename else HUB_FILES)
    _check_blob(path)
    return path


def hub_config(repo: str, revision: str = "") -> dict[str, Any]:
    """config.json of a repository; empty where it has none that can be read."""
    try:
        text = _hub_file(repo, revision, ("config.json",)).read_text("utf-8")
        found = json.loads(text)
    except (WeightFileError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hub_file(repo: str, revision: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    cache, wanted = hub_cache(), revision or None
    try:
        for name in names:
            found = try_to_load_from_cache(repo, name, cache_dir=cache, revision=wanted)
            if isinstance(found, str):
                return Path(found)
        if offline():
            raise OSError("the network is switched off by HF_HUB_OFFLINE")
        return Path(_fetch_from_hub(repo, wanted, names, cache))
    except HFValidationError as error:
        raise WeightFileError(f"{repo}: not a name of a repository ({error})") from None
    except (OSError, TimeoutError) as error:
        at = f"@{revision}" if revision else ""
        raise WeightFileError(
            f"{names[0]} of the Hugging Face repository {repo}{at} is not in {cache} and could "
            f"not be fetched ({_first_line(error)}). Where there is a network, run "
            f"`hf download {repo} {names[0]} config.json{f' --revision {revision}' * bool(at)}` "
            f"and copy {cache}/models--{repo.replace('/', '--')} here, or name the file with "
            "model.init_from file:PATH"
        ) from None


def _fetch_from_hub(repo: str, revision: str | None, names: tuple[str, ...], cache: Path) -> str:
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for name in names:
        url = hf_hub_url(repo, name, revision=revision)
        try:
            # The quick question first: a download retries for minutes before it gives up.
            _patiently(partial(_ask_hub, url))
            log.info("fetching %s", url)
            return hf_hub_download(repo, name, revision=revision, cache_dir=cache)
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise OSError(_first_line(error)) from None
        except Exception as error:  # the client's own: httpx has no common base with OSError
            if isinstance(error, OSError | TimeoutError):
                raise
            raise OSError(f"{type(error).__name__}: {_first_line(error)}") from None
    raise _NotThereError(f"it has none of {', '.join(names)}")


def _ask_hub(url: str, progress: Callable[[], None]) -> None:
    """Raises what the Hub's client raises where it has no such file or does not answer."""
    from huggingface_hub import get_hf_file_metadata

    get_hf_file_metadata(url, timeout=PATIENCE)


def _check_blob(path: Path) -> None:
    """The Hub's cache keeps large files under their sha256."""
    name = path.resolve().name
    if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != name:
        raise WeightFileError(
            f"{path}: its sha256 is {digest[:12]}..., and the cache says {name[:12]}... The file "
            "is damaged: delete it, so that it is fetched again"
        )


# --- patience -------------------------------------------------------------------------------------


def _patiently(call: Callable[[Callable[[], None]], T]) -> T:
    """`call(progress)` in a thread; TimeoutError when it neither ends nor calls `progress` for
    PATIENCE seconds. Timeouts of sockets do not cover looking up a name."""
    moved, ended = threading.Event(), threading.Event()
    answer: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(call(moved.set))
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()
            moved.set()

    threading.Thread(target=work, daemon=True, name="fetch-weights").start()
    while not ended.is_set():
        if not moved.wait(PATIENCE):
            raise TimeoutError(f"no answer for {PATIENCE:g} s")
        if not ended.is_set():
            moved.clear()
    if raised:
        raise raised[0]
    return answer[0]


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:200]
    return type(error).__name__
