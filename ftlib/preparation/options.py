"""The options of preparation and its results for one picture, as plain values.

Imports no decoder, so it costs nothing to import.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftlib.picture import Rules

MIN_SIDE = 8
"""Pixels. Smaller pictures are placeholders and tracking pixels."""
MAX_ASPECT = 20
"""Longer side over shorter. Beyond it a crop shows a bar."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to do with a picture. All of it enters the identity of the prepared set."""

    max_side: int | None = None
    """Reduce longer sides to this many pixels. By default the size stays."""
    quality: int | None = None
    """Encode every picture again at this JPEG quality. By default the original bytes stay."""
    subsampling: str | None = None
    """Chroma of pictures that are encoded again for `max_side` or `quality`.

    "420" is the default where one of these is given; "444", or "keep" for that of the original.
    Halving the chroma is what JPEG encoders do unless told otherwise: a fifth fewer bytes, a
    quarter less time to decode."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Color (red, green, blue) behind transparent pixels."""
    max_megapixels: float = 50.0
    """Larger pictures are refused before they are decoded."""
    accept_warnings: bool = False
    """Take JPEGs that decode only with a warning, encoded again from what could be decoded."""
    tiles: bool = False
    """Store JPEGs that would keep their bytes as tiles, without loss, so that training decodes only
    what it crops."""
    depth_range: tuple[float, float] | None = None
    """Sample values shown as black and as white, for pictures of more than 8 bits per channel.

    By default they follow from what a picture declares (PNG's sBIT, TIFF's MaxSampleValue), else
    from the bits that the set's pictures use."""
    depth_bits: int | None = None
    """Bits, 8 to 16, that the set's pictures of more than 8 bits use; preparation finds it out.

    None where the set has no such pictures, or `depth_range` is given."""

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < MIN_SIDE:
            raise ValueError(f"max_side = {self.max_side}: needs at least {MIN_SIDE} pixels")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality = {self.quality}: needs 1 to 100")
        if self.subsampling not in (None, "420", "444", "keep"):
            raise ValueError(f"subsampling = {self.subsampling!r}: needs to be 420, 444 or keep")
        if self.subsampling is not None and self.chroma is None:
            raise ValueError(
                f"subsampling = {self.subsampling!r} is for pictures that are encoded again: "
                "give max_side or quality as well"
            )
        if not self.max_megapixels > 0:
            raise ValueError(f"max_megapixels = {self.max_megapixels}: needs to be above 0")
        if len(self.background) != 3 or not all(0 <= c <= 255 for c in self.background):
            raise ValueError(
                f"background = {self.background}: needs red, green and blue from 0 to 255"
            )
        if self.depth_range is not None and not self.depth_range[0] < self.depth_range[1]:
            raise ValueError(
                f"depth_range = {self.depth_range}: needs two sample values, black below white"
            )
        if self.depth_bits is not None and not 8 <= self.depth_bits <= 16:
            raise ValueError(f"depth_bits = {self.depth_bits}: needs 8 to 16")

    @property
    def chroma(self) -> str | None:
        """`subsampling` as it acts; None where nothing is encoded again by choice."""
        return None if self.max_side is None and self.quality is None else self.subsampling or "420"

    def to_dict(self) -> dict[str, Any]:
        """What a prepared set's identity is made of, without options that act on no picture."""
        found = {**asdict(self), "subsampling": self.chroma}
        for name in ("subsampling", "depth_range", "depth_bits"):
            if found[name] is None:
                del found[name]
        return found

    @property
    def picture(self) -> Rules:
        """How pixels are made of a file (`ftlib.picture`)."""
        from ftlib.picture import Rules

        return Rules(self.background, self.depth_range, self.depth_bits, self.max_megapixels)


@dataclass(frozen=True)
class ValidatedImage:
    """A picture as it will be stored."""

    jpeg: bytes
    height: int
    width: int
    repairs: tuple[str, ...]
    """What was changed, such as 'orientation'; empty when the bytes are the file's own."""
    moments: tuple[float, ...]
    """Mean of red, green, blue and mean of their squares, of pixels scaled to 0..1.

    Taken over a regular grid of at most about 10,000 pixels."""


class ImageRejectedError(ValueError):
    """A picture that is not taken. `reason` is a short word to count by; the message says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageRejectedError, (self.reason, self.detail)
