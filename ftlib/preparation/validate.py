"""What a picture must be to enter a data set.

Damaged files are refused, odd ones are repaired, the rest is kept byte for byte. Which files are
pictures and which pixels they have is defined in `ftlib.picture`; this module adds what training
needs: strict decoding, limits of shape, and an upright three-channel 8-bit JPEG that decodes
without a warning. A JPEG that needs no repair keeps its bytes.

Strict decoding matters. Of JPEGs with damaged bytes OpenCV and Pillow return two thirds visibly
wrong and without an error, simplejpeg's strict mode 8 %, and with `ftlib.preparation.jpeg_check`
4 %. torchvision's decoder is not used at all: a damaged PNG can end its process.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from ftlib import picture
from ftlib.data.tiles import encode
from ftlib.picture import PictureError
from ftlib.preparation.jpeg_check import fault
from ftlib.preparation.options import (
    MAX_ASPECT,
    MIN_SIDE,
    ImageRejectedError,
    PrepareOptions,
    ValidatedImage,
)
from ftlib.preparation.transcode import tiled

REPAIR_QUALITY = 95
REPAIR_SUBSAMPLING = "444"
SUBSAMPLINGS = ("444", "422", "420", "440", "411")
"""Chroma subsamplings that a repaired JPEG can keep."""

Image.MAX_IMAGE_PIXELS = None  # sizes are checked from the header, before anything is decoded


def admit(data: bytes, name: str, rules: PrepareOptions) -> ValidatedImage:
    """The picture in `data` (a whole file called `name`), ready to be stored.

    Raises ImageRejectedError.
    """
    try:
        return _admit(data, name, rules)
    except PictureError as error:
        hint = " (--max-megapixels)" if error.reason == "too_large" else ""
        raise ImageRejectedError(error.reason, error.detail + hint) from None


def _admit(data: bytes, name: str, rules: PrepareOptions) -> ValidatedImage:
    kind = picture.kind_of(data)
    if kind == "JPEG":
        pixels, subsampling, changes = _read_jpeg(data, rules)
        repairs = [*_wrong_extension(name, kind), *changes]
    else:
        pixels, changes = _read_other(data, rules)
        subsampling = REPAIR_SUBSAMPLING
        changes = [f"from_{kind.lower()}", *changes]
        repairs = [*_wrong_extension(name, kind), *changes]
    by_choice = []
    if rules.max_side is not None and max(pixels.shape[:2]) > rules.max_side:
        pixels = _reduce(pixels, rules.max_side)
        by_choice.append("reduced")
    if rules.quality is not None:
        by_choice.append("reencoded")
    if by_choice and rules.chroma not in (None, "keep"):
        subsampling = rules.chroma
    repairs += by_choice
    jpeg = data
    if changes or by_choice:
        jpeg = encode(pixels, rules.quality or REPAIR_QUALITY, subsampling)
    elif rules.tiles:
        jpeg = _in_tiles(data, pixels)
        repairs += ["tiled"] if jpeg is not data else []
    jpeg = finalise(jpeg)
    if jpeg is not data:
        _check_stored(jpeg, pixels)
    height, width = pixels.shape[:2]
    return ValidatedImage(jpeg, height, width, tuple(repairs), _moments(pixels))


def _wrong_extension(name: str, kind: picture.Kind) -> list[str]:
    """A repair to report where the name says another kind of picture."""
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    known = any(extension in extensions for extensions in picture.EXTENSIONS.values())
    return ["wrong_extension"] if known and extension not in picture.EXTENSIONS[kind] else []


def _check_stored(jpeg: bytes, pixels: np.ndarray) -> None:
    stored = simplejpeg.decode_jpeg(jpeg, "RGB", strict=True)
    if stored.shape != pixels.shape:
        raise ImageRejectedError(
            "not_reproducible",
            f"encoded again it is {stored.shape[1]} x {stored.shape[0]} pixels, "
            f"not {pixels.shape[1]} x {pixels.shape[0]}",
        )


def _in_tiles(data: bytes, pixels: np.ndarray) -> bytes:
    """The JPEG as tiles; `data` itself where a decoder would see any other pixel in them."""
    jpeg = tiled(data)
    if jpeg == data:
        return data
    try:
        same = np.array_equal(simplejpeg.decode_jpeg(jpeg, "RGB", strict=True), pixels)
    except ValueError:
        return data
    return jpeg if same else data


def finalise(jpeg: bytes) -> bytes:
    """The last step before a picture's bytes are stored and hashed. Today it changes nothing."""
    return jpeg


def _check_shape(width: int, height: int, rules: PrepareOptions) -> None:
    picture.check_megapixels(width, height, rules.max_megapixels)
    if min(width, height) < MIN_SIDE:
        raise ImageRejectedError(
            "too_small", f"{width} x {height}: the shorter side is under {MIN_SIDE} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRejectedError(
            "too_narrow", f"{width} x {height}: one side is over {MAX_ASPECT} times the other"
        )


# --- JPEG -----------------------------------------------------------------------------------------


def _read_jpeg(data: bytes, rules: PrepareOptions) -> tuple[np.ndarray, str, list[str]]:
    """(uint8[H, W, 3], chroma subsampling to encode with, repairs)."""
    changes: list[str] = []
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError as error:
        raise ImageRejectedError("damaged", f"JPEG header: {error}") from None
    except KeyError:  # a subsampling without a name: mostly damage, now and then an old camera
        width, height = _size_by_pillow(data)
        colorspace = subsampling = ""
        changes.append("subsampling")
    _check_shape(width, height, rules)
    pixels, warned = _decode_strictly(data, rules.accept_warnings)
    if warned:
        changes.append("decoder_warning")
    if colorspace in ("Gray", "CMYK", "YCCK"):
        changes.append("grey" if colorspace == "Gray" else "cmyk")
        subsampling = REPAIR_SUBSAMPLING
    turn, profile = _metadata(data)
    if profile and colorspace not in ("Gray", "CMYK", "YCCK") and picture.is_wide_gamut(profile):
        changes.append("color_profile")
        pixels = np.asarray(picture.to_srgb(Image.fromarray(pixels), profile))
    if turn != 1:
        pixels = upright(pixels, turn)
        changes.append("orientation")
    kept = subsampling if subsampling in SUBSAMPLINGS else REPAIR_SUBSAMPLING
    return pixels, kept, changes


def _decode_strictly(data: bytes, accept_warnings: bool) -> tuple[np.ndarray, bool]:
    """(uint8[H, W, 3], whether the decoder or the check for hidden damage warned)."""
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        why = fault(data)
    except ValueError as error:
        why = str(error)
        pixels = None
    if why is None:
        return pixels, False
    if not accept_warnings:
        raise ImageRejectedError("damaged", f"JPEG: {why}")
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=False), True
    except ValueError:
        raise ImageRejectedError("damaged", f"JPEG: {why}") from None


def _size_by_pillow(data: bytes) -> tuple[int, int]:
    try:
        return Image.open(io.BytesIO(data), formats=["JPEG"]).size
    except Exception as error:
        raise ImageRejectedError("damaged", f"JPEG header: {error}") from None


def _metadata(data: bytes) -> tuple[int, bytes | None]:
    """(EXIF orientation, ICC profile)."""
    start = data[: 256 << 10]
    if b"Exif\x00\x00" not in start and b"ICC_PROFILE\x00" not in start:
        return 1, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=["JPEG"])
    except (
        Exception
    ):  # the pixels were decoded strictly; metadata that Pillow cannot read say nothing
        return 1, None
    turn = picture.orientation(image) if b"Exif\x00\x00" in start else 1
    return turn, image.info.get("icc_profile")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels turned as EXIF orientation 1 to 8 asks (TIFF 6.0, tag 274)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1])


# --- everything else ------------------------------------------------------------------------------


def _read_other(data: bytes, rules: PrepareOptions) -> tuple[np.ndarray, list[str]]:
    """(uint8[H, W, 3], repairs) of a picture that is no JPEG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = picture.open_image(data, rules.picture)
        kind = opened.kind
        _check_shape(*opened.image.size, rules)
        if kind == "PNG" and not _opencv_reads(data):
            raise ImageRejectedError("damaged", "PNG: a second decoder (OpenCV) cannot read it")
        try:
            image, changes = picture.to_rgb(opened, rules.picture)
        except PictureError:
            raise
        except (
            Exception
        ) as error:  # Pillow raises OSError, SyntaxError, struct.error, zlib.error ...
            raise ImageRejectedError(
                "damaged", f"{kind}: {error or type(error).__name__}"
            ) from None
    return np.asarray(image), changes


def _opencv_reads(data: bytes) -> bool:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is not None


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
