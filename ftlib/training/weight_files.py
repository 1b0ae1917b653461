"""Files of weights, read as data only.

Nothing in a file is ever run: pickles are loaded with `weights_only=True`. What holds the state
dict (`state_dict`, `model_ema` ...) and what wrappers put before its keys (`module.`,
`_orig_mod.` ...) is taken off.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from torch import Tensor

from ftlib import storage

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")
"""What files of weights end in."""
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training programs keep the weights in their checkpoints, averaged ones first."""
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every key."""
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})(?=\.(?:safetensors|pth\.tar|pth|pt|bin|ckpt)$)")


class WeightFileError(ValueError):
    """A file that cannot be used as weights; the message names it and says what to do."""


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file."""

    state: dict[str, Tensor]
    """On the CPU, contiguous, none sharing memory with another."""
    sha256: str
    """Of the file's bytes."""
    notes: tuple[str, ...] = ()
    """What was unwrapped or left out, for people."""


def read(uri: str, sha256: str = "") -> WeightFile:
    """Read a file of weights, wherever it is.

    Raises WeightFileError: no such file, another kind of file, bytes other than `sha256` (where
    given) or the hash in the name says, contents that are more than tensors.
    """
    data = storage.read_file(uri)
    if data is None:
        raise WeightFileError(f"there is no file {uri}")
    digest = hashlib.sha256(data).hexdigest()
    if sha256 and digest != sha256:
        raise WeightFileError(f"{uri}: the starting weights have changed since they were found")
    check_hash_in_name(uri, digest)
    notes: list[str] = []
    if uri.endswith(".safetensors"):
        state = _safetensors(uri, data)
    else:
        state, notes = _state_dict(uri, _unpickle(uri, data))
    state, more = _strip_wrappers(state)
    tensors = {k: v.detach().contiguous().clone() for k, v in state.items()}
    return WeightFile(tensors, digest, (*notes, *more))


def check_hash_in_name(uri: str, digest: str) -> None:
    """Many published files carry the first digits of their sha256 in their name, as
    resnet18-f37072fd.pth does. WeightFileError where they disagree."""
    found = HASH_IN_NAME.search(uri)
    # Eight digits without a letter are a date more often than a hash.
    if found is None or found[1].isdigit():
        return
    if not digest.startswith(found[1]):
        raise WeightFileError(
            f"{uri}: its sha256 begins with {digest[: len(found[1])]}, and its name says "
            f"{found[1]}. The file is damaged or another one: delete it, so that it is fetched "
            "again, or rename it if you trust it"
        )


def _safetensors(uri: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors_load(data)
    except SafetensorError as error:
        raise WeightFileError(f"{uri}: not a safetensors file ({error})") from None


def _unpickle(uri: str, data: bytes) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders about files that it then refuses
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightFileError(
            f"{uri}: it holds more than tensors and plain values ({_reason(error)}), and loading "
            "that would run code from the file. If you trust it, convert it where you can afford "
            'the risk: python -c "import torch; from safetensors.torch import save_file; '
            f"c = torch.load({uri!r}, map_location='cpu', weights_only=False); "
            "s = c.get('state_dict', c); save_file({k: v.contiguous().clone() for k, v in "
            "s.items()}, 'weights.safetensors')\", and name that file"
        ) from None
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, TypeError) as error:
        raise WeightFileError(
            f"{uri}: it cannot be read as a file of weights ({_reason(error)}). "
            "It is damaged or of another kind; fetch it again"
        ) from None


def _reason(error: Exception) -> str:
    """The class that the file asks for, where torch names it."""
    found = re.search(r"Unsupported (?:global|class|operand)[^`\n]*[` ]*([\w.]+)", str(error))
    if found:
        return found[0].strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def _state_dict(uri: str, tree: object) -> tuple[dict[str, Tensor], list[str]]:
    """The mapping of names to tensors somewhere in a checkpoint."""
    notes: list[str] = []
    while isinstance(tree, Mapping):
        tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
        inside = next((n for n in CONTAINERS if isinstance(tree.get(n), Mapping)), None)
        if inside is None:
            if not tensors:
                break
            if any(v.layout != torch.strided or v.is_quantized for v in tensors.values()):
                raise WeightFileError(f"{uri}: its tensors are sparse or quantized; use plain ones")
            return tensors, notes
        notes.append(f"taken from its {inside!r}")
        tree = tree[inside]
    raise WeightFileError(
        f"{uri}: it holds no tensors by name. Wanted is a state dict, or a checkpoint with one "
        f"under {', '.join(CONTAINERS)}"
    )


def _strip_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Keys without the prefixes of wrappers.

    Where most keys have a prefix, those that have none belong to something else in the same
    checkpoint (a loss, a metric, a counter) and are left out.
    """
    out, notes = dict(state), []
    found = True
    while found:
        found = False
        for prefix in WRAPPERS:
            inner = {k.removeprefix(prefix): v for k, v in out.items() if k.startswith(prefix)}
            if 2 * len(inner) <= len(out):
                continue
            others = [k for k in out if not k.startswith(prefix)]
            notes.append(f"without the prefix {prefix!r}")
            if others:
                notes.append(f"{len(others)} tensors beside it left out, such as {others[0]!r}")
            out, found = inner, True
    return out, notes
