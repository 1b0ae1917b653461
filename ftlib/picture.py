"""What a picture is: which files are taken, and the RGB pixels that each of them has.

Preparation, the packaged model, batch prediction and the server read pictures through this file. It
needs numpy and Pillow only (and `pillow-heif` for HEIC), because a copy of it travels inside every
package and runs there without ftlib.

The order is: the kind by its first bytes (never by its name), the size from the header alone,
limits, decoding, then the same conversions everywhere:

- the first picture of a multi-picture JPEG (MPO) or HEIC; animations and files of several pages are
  refused, because nobody said which frame shows the class;
- more than 8 bits per channel are scaled by the range that is really used, see `Rules`;
- wide-gamut ICC profiles (Display P3, Adobe RGB, ProPhoto, Rec. 2020) are converted to sRGB;
- transparent pixels are laid over one background color;
- EXIF orientation is applied.
"""

from __future__ import annotations

import io
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    UnidentifiedImageError,
)

Kind = Literal["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM"]
EXTENSIONS: dict[Kind, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif", "hif"),
    "JPEG2000": ("jp2", "j2k", "jpc", "jpf", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
FOREIGN_EXTENSIONS = ("jxl", "dcm", "dicom", "svg", "psd", "raw", "dng", "cr2", "nef", "arw")
"""Files that people call pictures and that are refused by name instead of being passed over."""
MAX_MEGAPIXELS = 50.0
"""Larger pictures are refused from their header, before they are decoded."""

ROWS_AT_ONCE = 256
"""Rows that are scaled to 8 bits at a time, so that a large picture needs little memory for it."""

_TIFF_MODES = frozenset("1 L LA P PA RGB RGBA CMYK YCbCr LAB I;16 I;16B I;16L".split())  # noqa: SIM905
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


class PictureError(ValueError):
    """A file that is not taken. `reason` is a short word to count by; the message says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureError, (self.reason, self.detail)


class Rules(NamedTuple):
    """How pixels are made where a file leaves a choice. A package carries those of its data set."""

    background: tuple[int, int, int] = (255, 255, 255)
    """Color (red, green, blue) behind transparent pixels."""
    depth_range: tuple[float, float] | None = None
    """Sample values shown as black and as white, for every picture of more than 8 bits."""
    depth_bits: int | None = None
    """Bits that a data set's deep pictures use, 8 to 16. It scales pictures that do not declare
    their own; None takes the smallest power of two that holds the picture's brightest sample."""
    max_megapixels: float = MAX_MEGAPIXELS


class Header(NamedTuple):
    """What the first bytes of a file tell, without decoding anything."""

    kind: Kind
    size: tuple[int, int] | None
    """(width, height) in pixels as stored; None where the header has to be decoded to know."""
    progressive: bool = False
    """A JPEG whose coefficients must all be kept in memory to decode it."""


# --- kinds ----------------------------------------------------------------------------------------


def kind_of(data: bytes) -> Kind:
    """The file's kind by its first bytes. Raises PictureError for others, named where known."""
    head = data[:16]
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = {data[i : i + 4] for i in (8, *range(16, min(_box_end(data, 0), 128), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIF"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    raise _foreign(data)


_STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"BM", "BMP"),
)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` to get the picture itself"),
    (b"<!doctype html", "an HTML page: a download that failed, most likely"),
    (b"<html", "an HTML page: a download that failed, most likely"),
    (b"<svg", "an SVG drawing; render it to PNG"),
    (b"<?xml", "an XML or SVG file"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"%pdf", "a PDF; render its page to PNG"),
    (b"8bps", "a Photoshop file; export it as PNG"),
    (b"\xff\x0a", "a JPEG XL picture, which cannot be decoded here; convert it to JPEG"),
    (
        b"\x00\x00\x00\x0cjxl ",
        "a JPEG XL picture, which cannot be decoded here; convert it to JPEG",
    ),
    (b"{", "JSON text"),
)


def _foreign(data: bytes) -> PictureError:
    if not data:
        return PictureError("empty_file", "the file has no bytes")
    if not any(data):
        why = f"all {len(data):,} bytes are zero: the file was never written to the end"
        return PictureError("not_a_picture", why)
    if data[128:132] == b"DICM":
        why = "a DICOM file; export its picture as 16-bit PNG, choosing the window"
        return PictureError("unsupported_kind", why)
    start = data[:512].lstrip().lower()
    for mark, what in _FOREIGN:
        if start.startswith(mark):
            reason = "unsupported_kind" if "cannot be decoded" in what else "not_a_picture"
            return PictureError(reason, f"not a picture of a known kind but {what}")
    why = f"not a picture of a known kind: it begins with the bytes {data[:8].hex(' ')}"
    return PictureError("not_a_picture", why)


# --- headers --------------------------------------------------------------------------------------


def header(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Header:
    """Kind and size by looking at a few bytes.

    Raises PictureError for what is no picture or over the limit, for a JPEG without an end, and
    for a TIFF that has a second page or whose fields claim more bytes than the file has: a
    decoder would read them all.
    """
    kind = kind_of(data)
    try:
        found = _HEADERS[kind](data)
    except (struct.error, IndexError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        found = Header(kind, None)
    if found.size is not None:
        check_megapixels(*found.size, max_megapixels)
    return found


def check_megapixels(width: int, height: int, limit: float) -> None:
    """Raise PictureError for more than `limit` megapixels."""
    if width * height > limit * 1e6:
        why = f"{width} x {height} is {width * height / 1e6:.1f} megapixels, more than {limit:g}"
        raise PictureError("too_large", why)


def _jpeg_header(data: bytes) -> Header:
    if data.rfind(b"\xff\xd9") < 0:
        raise PictureError("damaged", "damaged JPEG: its end is missing. Send a whole file")
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("JPEG", (width, height), marker not in (0xC0, 0xC1))
        alone = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        step = 1 if marker == 0xFF else 2
        at += step if alone else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return Header("JPEG", None)


def _png_header(data: bytes) -> Header:
    return Header("PNG", struct.unpack_from(">II", data, 16))


def _gif_header(data: bytes) -> Header:
    return Header("GIF", struct.unpack_from("<HH", data, 6))


def _bmp_header(data: bytes) -> Header:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return Header("BMP", struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("BMP", (abs(width), abs(height)))


def _webp_header(data: bytes) -> Header:
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return Header("WEBP", (width, height))


def _tiff_header(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, at)[0]
    if count > 1000:
        raise PictureError("damaged", f"TIFF: its first page has {count:,} fields")
    sides, claimed = {}, 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, form, values = struct.unpack_from(order + "HHI", data, entry)
        claimed += _TIFF_BYTES.get(form, 1) * values
        if tag in (256, 257):
            sides[tag] = struct.unpack_from(order + ("H" if form == 3 else "I"), data, entry + 8)[0]
    if claimed > len(data):
        raise PictureError("damaged", "TIFF: its fields claim more bytes than the file has")
    if struct.unpack_from(order + "I", data, at + 2 + 12 * count)[0]:
        raise _animated("TIFF")
    return Header("TIFF", (sides[256], sides[257]) if len(sides) == 2 else None)


_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


def _isobmff_header(kind: Kind, data: bytes) -> Header:
    """The largest `ispe` box: the picture itself, its tiles or its thumbnail."""
    sizes, at = [], data.find(b"ispe", 0, 1 << 16)
    while at >= 0:
        sizes.append(struct.unpack_from(">II", data, at + 8))
        at = data.find(b"ispe", at + 4, 1 << 16)
    return Header(kind, max(sizes, key=lambda s: s[0] * s[1]) if sizes else None)


def _jpeg2000_header(data: bytes) -> Header:
    if data[:4] == b"\xff\x4f\xff\x51":
        right, bottom, left, top = struct.unpack_from(">IIII", data, 8)
        return Header("JPEG2000", (right - left, bottom - top))
    height, width = struct.unpack_from(">II", data, data.index(b"ihdr", 0, 4096) + 4)
    return Header("JPEG2000", (width, height))


def _ppm_header(data: bytes) -> Header:
    lines = (line.partition(b"#")[0] for line in data[2:1024].split(b"\n"))
    width, height = b" ".join(lines).split()[:2]
    return Header("PPM", (int(width), int(height)))


_HEADERS = {
    "JPEG": _jpeg_header,
    "PNG": _png_header,
    "GIF": _gif_header,
    "BMP": _bmp_header,
    "TIFF": _tiff_header,
    "WEBP": _webp_header,
    "AVIF": lambda data: _isobmff_header("AVIF", data),
    "HEIF": lambda data: _isobmff_header("HEIF", data),
    "JPEG2000": _jpeg2000_header,
    "PPM": _ppm_header,
}


def _box_end(data: bytes, at: int) -> int:
    return at + int.from_bytes(data[at : at + 4], "big")


# --- opening --------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A file that Pillow opened and did not decode yet."""

    data: bytes
    kind: Kind
    image: Image.Image
    raw_mode: str
    """Pillow's name for the layout of stored samples, such as "RGB;16B"; empty for most kinds."""


def open_image(data: bytes, rules: Rules) -> Opened:
    """The file's first picture.

    Raises PictureError for what is no picture, is animated, is too large, or has an unreadable
    header.
    """
    kind = header(data, rules.max_megapixels).kind
    if kind == "HEIF" and not _can_read_heif():
        raise PictureError(
            "unsupported_kind",
            "a HEIC picture, which needs `pip install pillow-heif` here; or convert it to JPEG",
        )
    try:
        if kind == "JPEG":  # Image.open would make another class of a file of several pictures
            image: Image.Image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        else:
            _raise_pillows_limit(rules.max_megapixels)
            image = Image.open(io.BytesIO(data), formats=[kind])
        animated = kind not in ("JPEG", "HEIF") and bool(getattr(image, "is_animated", False))
    except Image.DecompressionBombError:
        raise PictureError("too_large", f"{kind}: more pixels than Pillow opens") from None
    except UnidentifiedImageError:
        raise PictureError("damaged", f"damaged {kind}: its header cannot be read") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ...
        raise PictureError("damaged", f"damaged {kind} header: {error}") from None
    check_megapixels(*image.size, rules.max_megapixels)
    if animated:
        raise _animated(kind)
    raw_modes = {str(_raw_mode(tile.args)) for tile in getattr(image, "tile", ())}
    return Opened(data, kind, image, raw_modes.pop() if len(raw_modes) == 1 else "")


def _raise_pillows_limit(megapixels: float) -> None:
    """Raise Pillow's own limit, 179 megapixels, where the data set has a higher one."""
    allowed = Image.MAX_IMAGE_PIXELS
    if allowed is not None and megapixels * 1e6 > allowed:
        Image.MAX_IMAGE_PIXELS = None if megapixels == float("inf") else int(megapixels * 1e6)


def _raw_mode(args: Any) -> Any:
    return args[0] if isinstance(args, tuple) and args else args


@lru_cache(maxsize=1)
def _can_read_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


def _animated(kind: str) -> PictureError:
    return PictureError(
        "animation",
        f"{kind} with more than one frame or page, an animation or a document; which of them shows "
        "the class is not known. Send or keep one",
    )


# --- pixels ---------------------------------------------------------------------------------------


def to_rgb(opened: Opened, rules: Rules) -> tuple[Image.Image, list[str]]:
    """(upright 8-bit RGB, what was changed to get there).

    Raises PictureError for depths that need a range; what Pillow raises on damaged files passes
    through.
    """
    image = opened.image
    _check_depth(opened, rules)
    profile = image.info.get("icc_profile")
    changes: list[str] = []
    image.load()
    turn = orientation(image)
    samples = _deep_samples(opened)
    if samples is not None:
        changes.append("16_bit")
        low, high = rules.depth_range or (0, _white(opened, samples, rules.depth_bits))
        image = Image.fromarray(scaled(samples, low, high))
    if turn != 1:
        changes.append("orientation")
        image = image.transpose(_TURNS[turn])
    if image.mode == "P":
        changes.append("palette")
    transparent = image.mode in _ALPHA_MODES or "transparency" in image.info
    if image.mode == "CMYK":
        changes.append("cmyk")
    elif image.mode in ("L", "1"):
        changes.append("grey")
    elif profile and is_wide_gamut(profile):
        changes.append("color_profile")
        image = to_srgb(image.convert("RGBA" if transparent else "RGB"), profile)
    if transparent:
        changes.append("alpha")
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (*rules.background, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert("RGB"), changes


def _check_depth(opened: Opened, rules: Rules) -> None:
    mode = opened.image.mode
    wide = mode in ("F", "I") or (opened.kind == "TIFF" and mode not in _TIFF_MODES)
    if wide and rules.depth_range is None and opened.kind != "PPM":
        raise PictureError(
            "unsupported_depth",
            f"{opened.kind} with 32-bit pixels (mode {mode}); convert it to 8 bit, or give "
            "--depth-range BLACK,WHITE when the data set is prepared",
        )


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none or it makes no sense."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # an unreadable EXIF block says nothing about the pixels
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def square(data: bytes, size: int, short: int, rules: Rules, interpolation: str) -> np.ndarray:
    """uint8[size, size, 3]: the shorter side resized to `short` pixels, then the center.

    The aspect ratio is kept. `interpolation` is bilinear or bicubic, with antialiasing. Bit for bit
    what evaluation makes of the same JPEG. Raises PictureError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_image(data, rules)
        width, height = opened.image.size
        # Far larger JPEGs are decoded at a half, quarter or eighth, as evaluation does it.
        shrink = max(s for s in (1, 2, 4, 8) if s == 1 or s <= 0.5 * min(width, height) / short)
        if opened.kind == "JPEG" and orientation(opened.image) >= 5:
            width, height = height, width
        opened.image.draft(None, (opened.image.width // shrink, opened.image.height // shrink))
        try:
            image, _ = to_rgb(opened, rules)
        except PictureError:
            raise
        except MemoryError:
            raise PictureError("out_of_memory", "too little memory to decode it") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, zlib.error ... on damage
            why = f"damaged {opened.kind} ({error or type(error).__name__}). Send a whole file"
            raise PictureError("damaged", why) from None
    if opened.kind != "JPEG":
        width, height = image.size
    rows, columns = short, int(short * width / height)
    if height > width:
        rows, columns = int(short * height / width), short
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    y, x = image.height / rows, image.width / columns
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(image.resize((size, size), resample, box=box))


class Preprocessing:
    """Picture files to a model's input, as a package's `meta.json` says."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.size, self.short = int(meta["size"]), int(meta["short"])
        self.interpolation: str = meta.get("interpolation", "bilinear")
        depth_range = meta.get("depth_range")
        red, green, blue = meta["background"]
        self.rules = Rules(
            background=(red, green, blue),
            depth_range=None if depth_range is None else (depth_range[0], depth_range[1]),
            depth_bits=meta.get("depth_bits"),
            max_megapixels=meta.get("max_megapixels", MAX_MEGAPIXELS),
        )

    def __call__(self, data: bytes) -> np.ndarray:
        """uint8[S, S, 3]. Raises PictureError."""
        return square(data, self.size, self.short, self.rules, self.interpolation)


# --- more than 8 bits -----------------------------------------------------------------------------


def used_bits(data: bytes) -> int | None:
    """Bits, 8 to 16, that a picture of more than 8 bits uses.

    None for other pictures and for those that declare their depth. Raises PictureError.
    """
    opened = open_image(data, Rules(max_megapixels=float("inf")))
    if not opened.image.mode.startswith("I") and ";16" not in opened.raw_mode:
        return None
    try:
        opened.image.load()
        samples = _deep_samples(opened)
    except Exception as error:  # Pillow raises OSError, SyntaxError, zlib.error ... on damage
        raise PictureError("damaged", f"damaged {opened.kind}: {error}") from None
    if samples is None or samples.dtype != np.uint16:
        return None
    return None if _declared_white(opened, samples) else _bits(samples)


def scaled(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of samples of any depth: `low` becomes 0, `high` 255, others are cut off."""
    narrow = np.empty(samples.shape, np.uint8)
    for start in range(0, len(samples), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        narrow[rows] = _scaled_rows(samples[rows], low, high)
    return narrow


def _scaled_rows(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    if samples.dtype == np.uint16 and low == 0 and float(high).is_integer():
        white = int(high)
        return (np.minimum(samples, white).astype(np.uint32) * 255 + white // 2) // white
    wide = (np.nan_to_num(samples.astype(np.float64)) - low) * (255 / (high - low))
    return np.clip(np.rint(wide), 0, 255)


def _deep_samples(opened: Opened) -> np.ndarray | None:
    """Samples of more than 8 bits, [H, W] or [H, W, channels]; None where there are none.

    Pillow keeps the upper byte of 16-bit color. Opening the file again with the other byte order
    named gives the lower one.
    """
    image = opened.image
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("F", "I"):
        samples = np.asarray(image)
        fits = image.mode == "I" and samples.min(initial=0) >= 0
        return samples.astype(np.uint16) if fits and samples.max(initial=0) < 1 << 16 else samples
    other = _OTHER_BYTE.get(opened.raw_mode)
    if other is None:
        return None
    again = Image.open(io.BytesIO(opened.data), formats=[opened.kind])
    assert isinstance(again, ImageFile.ImageFile)
    again.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
        for tile in again.tile
    ]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)


_OTHER_BYTE = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}


def _white(opened: Opened, samples: np.ndarray, set_bits: int | None) -> float:
    """The sample value that is shown as white."""
    return _declared_white(opened, samples) or (1 << (set_bits or _bits(samples))) - 1


def _bits(samples: np.ndarray) -> int:
    color = samples[..., :3] if samples.ndim == 3 else samples
    return min(16, max(8, int(color.max(initial=0)).bit_length()))


def _declared_white(opened: Opened, samples: np.ndarray) -> float | None:
    """White by the file's own word: sBIT (PNG), MaxSampleValue or 12 bits (TIFF), maxval (PPM)."""
    if opened.kind == "JPEG2000":
        return 65535  # Pillow scales every depth to the whole 16 bits
    if opened.kind == "PPM":
        return None if opened.raw_mode == "I;16B" else 65535
    most = int(samples.max(initial=0))
    if opened.kind == "TIFF":
        return _declared_by_tiff(opened.image, most)
    bits = _sbit(opened.data)
    if bits is None or not 8 <= bits < 16:
        return None
    # The standard wants samples shifted up to the whole 16 bits; many writers do not shift them.
    shifted = most >= 1 << bits or not (samples & (1 << 16 - bits) - 1).any()
    return 65535 if shifted else (1 << bits) - 1


def _declared_by_tiff(image: Image.Image, most: int) -> float | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(258) == (12,):
        return 4095
    declared = tags.get(281, 0)
    declared = max(declared) if isinstance(declared, tuple) else declared
    return float(declared) if 255 < declared < 65535 and most <= declared else None


def _sbit(png: bytes) -> int | None:
    for name, body in _png_chunks(png):
        if name == b"sBIT" and body:
            return max(body[:3])
    return None


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, contents) of the chunks before the pixels."""
    at = 8
    while at + 8 <= len(png) and (name := png[at + 4 : at + 8]) != b"IDAT":
        length = int.from_bytes(png[at : at + 4], "big")
        yield name, png[at + 8 : at + 8 + length]
        at += 12 + length


# --- color ----------------------------------------------------------------------------------------

_SRGB_COLORANTS = np.array(
    [[0.4361, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]]
)
"""XYZ (D50) of sRGB's red, green and blue, IEC 61966-2-1."""
_ALLOWED_DIFFERENCE = 0.05
"""Cameras and scanners write sRGB a little differently; Display P3 differs by 0.09."""


@lru_cache(maxsize=64)
def is_wide_gamut(profile: bytes) -> bool:
    """Whether an ICC profile describes RGB whose primaries are not sRGB's (ICC.1, 9.2)."""
    if profile[16:20] != b"RGB ":
        return False
    count = int.from_bytes(profile[128:132], "big")
    found = {}
    for at in range(132, 132 + 12 * min(count, 100), 12):
        name, offset, _ = struct.unpack_from(">4sII", profile.ljust(at + 12, b"\0"), at)
        value = profile[offset : offset + 20]
        if name in (b"rXYZ", b"gXYZ", b"bXYZ") and value[:4] == b"XYZ " and len(value) == 20:
            found[name] = np.frombuffer(value[8:], ">i4") / 65536
    if len(found) < 3:
        return False
    colorants = np.stack([found[name] for name in (b"rXYZ", b"gXYZ", b"bXYZ")])
    return bool(np.abs(colorants - _SRGB_COLORANTS).max() > _ALLOWED_DIFFERENCE)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB or RGBA image in sRGB; as it is where the profile turns out to be broken."""
    try:
        colors = ImageCms.applyTransform(image.convert("RGB"), _transform(profile))
    except (ImageCms.PyCMSError, OSError):
        return image
    if colors is None:
        return image
    if image.mode == "RGBA":
        colors.putalpha(image.getchannel("A"))
    return colors


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        "RGB",
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
