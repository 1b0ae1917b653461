"""Find out how many bits a data set's pictures of more than 8 bits really use.

Cameras, scanners and X-ray detectors store 10 or 12 bits in files of 16. Scaled by all 16 they
would become nearly black. The files rarely say how many bits they use, so the set is asked: the
brightest sample of its deep pictures, rounded up to a power of two.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable

from ftlib.picture import EXTENSIONS
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox

Read = Callable[[str, int], bytes]
"""(file, n) -> its first n bytes; all of them for n = -1."""

DEEP_EXTENSIONS = (*EXTENSIONS["PNG"], *EXTENSIONS["TIFF"], *EXTENSIONS["PPM"])
SAMPLE = 200
"""Most deep pictures that are decoded; they are spread evenly over the set."""


def with_depth_bits(rules: PrepareOptions, files: Iterable[str], read: Read) -> PrepareOptions:
    """The rules with `depth_bits` as the set needs it; unchanged where they say it already.

    Raises OSError where a file cannot be read. Damaged files are passed over here: preparation
    refuses them later.
    """
    if rules.depth_range is not None or rules.depth_bits is not None:
        return rules
    deep = [file for file in files if _may_be_deep(file, read)]
    if not deep:
        return rules
    found = []
    with contextlib.closing(DecoderSandbox(rules)) as sandbox:
        for file in deep[:: -(-len(deep) // SAMPLE)]:
            with contextlib.suppress(ImageRejectedError):
                found.append(sandbox.used_bits(read(file, -1)))
    bits = [n for n in found if n is not None]
    return dataclasses.replace(rules, depth_bits=max(bits)) if bits else rules


def _may_be_deep(file: str, read: Read) -> bool:
    """By extension, and for PNG by the bit depth in its header."""
    extension = file.rpartition(".")[2].lower()
    if extension not in DEEP_EXTENSIONS:
        return False
    return extension not in EXTENSIONS["PNG"] or read(file, 25)[24:] == b"\x10"
