"""One small picture in every kind of file that ftlib takes, and files that it refuses by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 48, 64


def scene(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """uint8[height, width, 3]: smooth colors with a bright corner, so that a turn shows."""
    rng = np.random.default_rng(seed)
    small = rng.integers(30, 200, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    picture[: height // 4, : width // 4] = (250, 40, 10)
    return picture


def file(picture: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[274] = orientation
    return block


def opencv(extension: str, samples: np.ndarray) -> bytes:
    ordered = samples[:, :, ::-1] if samples.ndim == 3 else samples
    return cv2.imencode(extension, ordered)[1].tobytes()


def with_sbit(png: bytes, bits: int) -> bytes:
    """The PNG with an sBIT chunk (gray) behind its header."""
    body = b"sBIT" + bytes([bits])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


def profile(name: str) -> bytes:
    """An ICC profile: sRGB, or a wide-gamut one made from sRGB by exchanging its primaries."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if name == "sRGB":
        return srgb
    colorants = {  # Display P3 adapted to D50, SMPTE EG 432-1
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    data = bytearray(srgb)
    for at in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12):
        tag, offset, _ = struct.unpack_from(">4sII", srgb, at)
        if tag in colorants:
            values = [round(value * 65536) for value in colorants[tag]]
            struct.pack_into(">3i", data, offset + 8, *values)
    return bytes(data)


def frames(kind: str) -> bytes:
    second = Image.fromarray(scene(seed=1))
    return file(Image.fromarray(scene()), kind, save_all=True, append_images=[second])


def transparent(mode: str = "RGBA") -> Image.Image:
    """The right half is clear, with magenta behind it that must never show."""
    picture = np.dstack([scene(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    picture[:, WIDTH // 2 :] = (255, 0, 255, 0)
    return Image.fromarray(picture, "RGBA").convert(mode)


def deep(bits: int, channels: int = 1) -> np.ndarray:
    """uint16 samples of `bits` bits, left where they are."""
    samples = np.rint(scene().astype(np.float64) / 255 * ((1 << bits) - 1)).astype(np.uint16)
    return samples[:, :, 0] if channels == 1 else samples


def heic() -> bytes:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return file(Image.fromarray(scene()), "HEIF", quality=95)


def tiff16() -> bytes:
    return file(Image.fromarray(deep(16)), "TIFF")


TAKEN: dict[str, Callable[[], bytes]] = {
    "baseline JPEG": lambda: file(scene()),
    "progressive JPEG": lambda: file(scene(), progressive=True),
    "JPEG 4:2:0": lambda: file(scene(), subsampling=2),
    "gray JPEG": lambda: file(Image.fromarray(scene()).convert("L")),
    "turned JPEG": lambda: file(scene(), exif=exif(6)),
    "mirrored JPEG": lambda: file(scene(), exif=exif(5)),
    "JPEG with an sRGB profile": lambda: file(scene(), icc_profile=profile("sRGB")),
    "JPEG in Display P3": lambda: file(scene(), icc_profile=profile("Display P3")),
    "JPEG with bytes behind its end": lambda: file(scene()) + b"a motion photo's film",
    "MPO of two pictures": lambda: frames("MPO"),
    "CMYK JPEG": lambda: file(Image.fromarray(scene()).convert("CMYK")),
    "PNG": lambda: file(scene(), "PNG"),
    "interlaced PNG in Display P3": lambda: file(scene(), "PNG", icc_profile=profile("P3")),
    "turned PNG": lambda: file(scene(), "PNG", exif=exif(8)),
    "gray PNG": lambda: file(Image.fromarray(scene()).convert("L"), "PNG"),
    "black-and-white PNG": lambda: file(Image.fromarray(scene()).convert("1"), "PNG"),
    "palette PNG": lambda: file(Image.fromarray(scene()).quantize(64), "PNG"),
    "transparent PNG": lambda: file(transparent(), "PNG"),
    "transparent gray PNG": lambda: file(transparent("LA"), "PNG"),
    "transparent PNG in Display P3": lambda: file(transparent(), "PNG", icc_profile=profile("P3")),
    "16-bit gray PNG": lambda: opencv(".png", deep(16)),
    "12-bit gray in a 16-bit PNG": lambda: opencv(".png", deep(12)),
    "10-bit gray in a 16-bit PNG that says so": lambda: with_sbit(opencv(".png", deep(10)), 10),
    "16-bit color PNG": lambda: opencv(".png", deep(16, 3)),
    "12-bit color in a 16-bit PNG": lambda: opencv(".png", deep(12, 3)),
    "GIF": lambda: file(Image.fromarray(scene()).quantize(128), "GIF"),
    "BMP": lambda: file(scene(), "BMP"),
    "TIFF": lambda: file(scene(), "TIFF"),
    "turned TIFF": lambda: file(scene(), "TIFF", exif=exif(6)),
    "compressed TIFF": lambda: file(scene(), "TIFF", compression="tiff_lzw"),
    "CMYK TIFF": lambda: file(Image.fromarray(scene()).convert("CMYK"), "TIFF"),
    "16-bit gray TIFF": tiff16,
    "12-bit color in a 16-bit TIFF": lambda: opencv(".tiff", deep(12, 3)),
    "lossless WebP": lambda: file(scene(), "WEBP", lossless=True),
    "WebP": lambda: file(scene(), "WEBP", quality=90),
    "transparent WebP": lambda: file(transparent(), "WEBP", lossless=True),
    "AVIF": lambda: file(scene(), "AVIF", quality=95),
    "HEIC": heic,
    "JPEG 2000": lambda: file(scene(), "JPEG2000"),
    "16-bit JPEG 2000": lambda: opencv(".jp2", deep(16)),
    "PPM": lambda: file(scene(), "PPM"),
    "PGM of 16 bits": lambda: opencv(".pgm", deep(16)),
}

REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "nothing": (lambda: b"", "empty_file", "no bytes"),
    "zeros": (lambda: bytes(5000), "not_a_picture", "5,000 bytes are zero"),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "not_a_picture",
        "git lfs pull",
    ),
    "DICOM": (lambda: bytes(128) + b"DICM" + b"x" * 99, "unsupported_kind", "a DICOM file"),
    "an HTML page": (lambda: b"\n <!DOCTYPE html><html>", "not_a_picture", "an HTML page"),
    "JPEG XL": (lambda: b"\xff\x0a" + bytes(99), "unsupported_kind", "a JPEG XL picture"),
    "JPEG XL in a container": (
        lambda: b"\x00\x00\x00\x0cJXL \r\n\x87\n" + b"x" * 99,
        "unsupported_kind",
        "a JPEG XL picture",
    ),
    "an SVG drawing": (lambda: b'<svg xmlns="http://w3.org"/>', "not_a_picture", "an SVG"),
    "words": (lambda: b"hello, world", "not_a_picture", "begins with the bytes 68 65 6c 6c"),
    "half a JPEG": (lambda: file(scene())[:1500], "damaged", "JPEG"),
    "half a PNG": (lambda: file(scene(), "PNG")[:2000], "damaged", "PNG"),
    "an animated GIF": (lambda: frames("GIF"), "animation", "more than one frame"),
    "an animated WebP": (lambda: frames("WEBP"), "animation", "more than one frame"),
    "an animated PNG": (lambda: frames("PNG"), "animation", "more than one frame"),
    "an animated AVIF": (lambda: frames("AVIF"), "animation", "more than one frame"),
    "a TIFF of two pages": (lambda: frames("TIFF"), "animation", "more than one frame or page"),
    "a 32-bit TIFF": (
        lambda: file(Image.fromarray(scene()[:, :, 0].astype(np.float32)), "TIFF"),
        "unsupported_depth",
        "--depth-range",
    ),
}
