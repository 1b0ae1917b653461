"""What a picture must be to enter a data set: refuse what is damaged, repair what is odd, leave the rest byte for byte.

The order is: kind by its first bytes (never by its name), size from the header alone, limits, strict decoding, repairs. A picture
that comes out is an upright three-channel 8-bit JPEG that decodes without a warning. A JPEG that needs no repair keeps its bytes.

Strict decoding matters: of JPEGs with damaged bytes OpenCV and PIL return two thirds visibly wrong and without an error, simplejpeg's
strict mode 8 %, and with `ftlib.preparation.jpeg_check` 4 %. torchvision's decoder is not used at all: a damaged PNG can end its process.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from ftlib.data.tiles import encode
from ftlib.preparation.jpeg_check import fault
from ftlib.preparation.options import (
    MAX_ASPECT,
    MIN_SIDE,
    PrepareOptions,
    RejectedImage,
    ValidatedImage,
)
from ftlib.preparation.transcode import tiled

REPAIR_QUALITY = 95
REPAIR_SUBSAMPLING = "444"

Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, from the header, before anything is decoded


Kind = Literal["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM"]
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "AVIF": ("avif",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}


def admit(data: bytes, name: str, rules: PrepareOptions) -> ValidatedImage:
    """The picture in `data` (a whole file called `name`), ready to be stored. Raises RejectedImage."""
    kind = kind_of(data)
    repairs: list[str] = []
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    if (
        extension
        and extension not in EXTENSIONS[kind]
        and any(extension in known for known in EXTENSIONS.values())
    ):
        repairs.append("wrong_extension")
    if kind == "JPEG":
        pixels, subsampling, changes = _read_jpeg(data, rules)
    else:
        pixels, changes = _read_other(data, kind, rules)
        subsampling = REPAIR_SUBSAMPLING
        changes = [f"from_{kind.lower()}", *changes]
    repairs += changes
    if rules.max_side is not None and max(pixels.shape[:2]) > rules.max_side:
        pixels = _reduce(pixels, rules.max_side)
        changes.append("reduced")
        repairs.append("reduced")
    if rules.quality is not None:
        changes.append("reencoded")
        repairs.append("reencoded")
    if {"reduced", "reencoded"} & set(changes) and rules.chroma not in (None, "keep"):
        subsampling = rules.chroma
    jpeg = data if not changes else encode(pixels, rules.quality or REPAIR_QUALITY, subsampling)
    if rules.tiles and not changes:
        jpeg = _in_tiles(data, pixels)
        repairs += ["tiled"] if jpeg is not data else []
    jpeg = finalise(jpeg)
    if jpeg is not data:
        stored = simplejpeg.decode_jpeg(jpeg, "RGB", strict=True)
        if stored.shape != pixels.shape:
            raise RejectedImage(
                "not_reproducible",
                f"encoded again it is {stored.shape[1]} x {stored.shape[0]} pixels, not {pixels.shape[1]} x {pixels.shape[0]}",
            )
    return ValidatedImage(jpeg, pixels.shape[0], pixels.shape[1], tuple(repairs), _moments(pixels))


def _in_tiles(data: bytes, pixels: np.ndarray) -> bytes:
    """The JPEG as tiles; as it is where it cannot be, or where a decoder would see any other pixel in them."""
    jpeg = tiled(data)
    try:
        return (
            jpeg
            if jpeg != data
            and np.array_equal(simplejpeg.decode_jpeg(jpeg, "RGB", strict=True), pixels)
            else data
        )
    except ValueError:
        return data


def finalise(jpeg: bytes) -> bytes:
    """The last step of every picture's bytes before they are stored and hashed. They are stored as they are."""
    return jpeg


# --- kinds and headers ------------------------------------------------------------------------------------------------------------


def kind_of(data: bytes) -> Kind:
    """The file's kind by its first bytes. Raises RejectedImage for what is not a picture, saying what it looks like."""
    if not data:
        raise RejectedImage("empty_file", "the file has no bytes")
    head = data[:16]
    if head[:2] == b"\xff\xd8":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return "TIFF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        raise RejectedImage(
            "unsupported_kind",
            "a HEIC/HEIF picture, which cannot be decoded here; convert it to JPEG",
        )
    if head[:2] == b"BM":
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if not any(data):
        raise RejectedImage(
            "not_a_picture",
            f"all {len(data):,} bytes are zero: the file was never written to the end",
        )
    start = data[:512].lstrip().lower()
    looks = next(
        (
            word
            for mark, word in (
                (b"<!doctype", "an HTML page"),
                (b"<html", "an HTML page"),
                (b"<svg", "an SVG drawing"),
                (b"<?xml", "an XML or SVG file"),
                (b"pk\x03\x04", "a ZIP archive"),
                (b"%pdf", "a PDF"),
            )
            if start.startswith(mark)
        ),
        "",
    )
    raise RejectedImage(
        "not_a_picture",
        f"looks like {looks}"
        if looks
        else f"begins with the bytes {head[:8].hex(' ')}, which no known kind of picture does",
    )


def _check_size(width: int, height: int, rules: PrepareOptions) -> None:
    if width * height > rules.max_megapixels * 1e6:
        raise RejectedImage(
            "too_large",
            f"{width} x {height} is {width * height / 1e6:.1f} megapixels, more than --max-megapixels {rules.max_megapixels:g}",
        )
    if min(width, height) < MIN_SIDE:
        raise RejectedImage(
            "too_small", f"{width} x {height}: the shorter side is under {MIN_SIDE} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RejectedImage(
            "too_narrow", f"{width} x {height}: one side is over {MAX_ASPECT} times the other"
        )


# --- JPEG -------------------------------------------------------------------------------------------------------------------------


def _read_jpeg(data: bytes, rules: PrepareOptions) -> tuple[np.ndarray, str, list[str]]:
    """(uint8[H, W, 3], chroma subsampling to encode with, repairs)."""
    changes: list[str] = []
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError as error:
        raise RejectedImage("damaged", f"JPEG header: {error}") from None
    except KeyError:  # a chroma subsampling that simplejpeg has no name for: mostly damage, now and then an old camera
        width, height = _size_by_pil(data)
        colorspace = subsampling = ""
        changes.append("subsampling")
    _check_size(width, height, rules)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if not rules.accept_warnings:
            raise RejectedImage("damaged", f"JPEG: {error}") from None
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=False)
        except ValueError:
            raise RejectedImage("damaged", f"JPEG: {error}") from None
        changes.append("decoder_warning")
    else:
        if why := fault(data):
            if not rules.accept_warnings:
                raise RejectedImage("damaged", f"JPEG: {why}")
            changes.append("decoder_warning")
    if colorspace == "Gray":
        changes.append("grey")
        subsampling = REPAIR_SUBSAMPLING
    elif colorspace in ("CMYK", "YCCK"):
        changes.append("cmyk")
        subsampling = REPAIR_SUBSAMPLING
    turn = _orientation(data)
    if turn != 1:
        pixels = upright(pixels, turn)
        changes.append("orientation")
    return (
        pixels,
        subsampling if subsampling in ("444", "422", "420", "440", "411") else REPAIR_SUBSAMPLING,
        changes,
    )


def _size_by_pil(data: bytes) -> tuple[int, int]:
    try:
        return Image.open(io.BytesIO(data), formats=["JPEG"]).size
    except Exception as error:
        raise RejectedImage("damaged", f"JPEG header: {error}") from None


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none or it makes no sense."""
    if b"Exif\x00\x00" not in data[: 256 << 10]:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # an unreadable EXIF block says nothing; the pixels were decoded strictly
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels turned as EXIF orientation 1 to 8 asks (TIFF 6.0, tag 274)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1])


# --- everything else --------------------------------------------------------------------------------------------------------------


def _read_other(data: bytes, kind: Kind, rules: PrepareOptions) -> tuple[np.ndarray, list[str]]:
    """(uint8[H, W, 3], repairs) of a picture that is no JPEG, through PIL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=[kind])
            frames = getattr(image, "n_frames", 1)
        except Exception as error:
            raise RejectedImage("damaged", f"{kind} header: {error}") from None
        _check_size(*image.size, rules)
        if frames > 1:
            raise RejectedImage(
                "animation",
                f"{kind} with {frames} frames or pages; which of them shows the class is not known. Extract one",
            )
        if image.mode in ("F", "I") or (
            kind == "TIFF"
            and image.mode
            not in (
                "1",
                "L",
                "LA",
                "P",
                "PA",
                "RGB",
                "RGBA",
                "CMYK",
                "YCbCr",
                "LAB",
                "I;16",
                "I;16B",
                "I;16L",
            )
        ):
            raise RejectedImage(
                "unsupported_depth",
                f"{kind} with 32-bit pixels (mode {image.mode}); convert it to 8 bit, choosing the range",
            )
        try:
            image.load()
            return _to_rgb(image, data, kind, rules)
        except RejectedImage:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, zlib.error ... on damaged files
            raise RejectedImage("damaged", f"{kind}: {error or type(error).__name__}") from None


def _to_rgb(
    image: Image.Image, data: bytes, kind: Kind, rules: PrepareOptions
) -> tuple[np.ndarray, list[str]]:
    changes: list[str] = []
    if kind == "PNG" and cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        raise RejectedImage("damaged", "PNG: a second decoder (OpenCV) cannot read it")
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        changes.append("orientation")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        changes.append("16_bit")
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(
            ((wide * 255 + 32767) // 65535).astype(np.uint8)
        )  # PIL's own conversion clips to white
    if image.mode == "P":
        changes.append("palette")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        changes.append("alpha")
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, (*rules.background, 255))
        image = Image.alpha_composite(behind, image)
    if image.mode in ("L", "1"):
        changes.append("grey")
    if image.mode == "CMYK":
        changes.append("cmyk")
    return np.asarray(image.convert("RGB")), changes


def _reduce(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """The longer side at `max_side` pixels, by area averaging, aspect ratio kept."""
    height, width = pixels.shape[:2]
    scale = max_side / max(height, width)
    return cv2.resize(
        pixels,
        (max(1, round(width * scale)), max(1, round(height * scale))),
        interpolation=cv2.INTER_AREA,
    )


def _moments(pixels: np.ndarray) -> tuple[float, ...]:
    step = max(1, int((pixels.shape[0] * pixels.shape[1] / 10_000) ** 0.5))
    sample = pixels[::step, ::step].reshape(-1, 3).astype(np.float64) / 255
    return (*map(float, sample.mean(axis=0)), *map(float, (sample**2).mean(axis=0)))
