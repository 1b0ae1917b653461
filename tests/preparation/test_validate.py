"""What preparation takes, repairs and refuses, with Pillow and OpenCV as oracles.

Holds `ftlib.preparation.validate` and `options`.
"""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from ftlib.preparation import validate as admission
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.validate import admit
from tests.picture_files import exif, file, frames, scene


def pixels(jpeg: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg, "RGB", strict=True).astype(int)


def resized_header(jpeg: bytes, height: int, width: int | None = None) -> bytes:
    """The JPEG with another size in its frame header."""
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    old = struct.unpack(">HH", jpeg[at + 5 : at + 9])
    return jpeg[: at + 5] + struct.pack(">HH", height, width or old[1]) + jpeg[at + 9 :]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def sixteen_bit(channels: int) -> tuple[bytes, np.ndarray]:
    wide = (scene().astype(np.uint16) * 257)[:, :, :channels]
    encoded = cv2.imencode(".png", wide[:, :, ::-1] if channels == 3 else wide[:, :, 0])[
        1
    ].tobytes()
    narrow = scene() if channels == 3 else np.repeat(scene()[:, :, :1], 3, axis=2)
    return encoded, narrow


def hidden_colors(mode: str) -> tuple[bytes, np.ndarray]:
    """Magenta below alpha 0: what an alpha-blind decoder would show."""
    picture = np.dstack([scene(), np.full(scene().shape[:2], 255, np.uint8)])
    picture[:, 32:] = (255, 0, 255, 0)
    seen = scene().copy()
    seen[:, 32:] = 255
    image = Image.fromarray(picture, "RGBA")
    if mode == "LA":
        image = image.convert("LA")
        seen = np.asarray(Image.fromarray(scene()).convert("L").convert("RGB")).copy()
        seen[:, 32:] = 255
    return file(image, "PNG"), seen


KEPT = {
    "baseline 4:4:4": file(scene()),
    "baseline 4:2:0": file(scene(), subsampling=2),
    "progressive": file(scene(), progressive=True),
    "restart markers": cv2.imencode(".jpg", scene(), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[
        1
    ].tobytes(),
    "color profile": file(scene(), icc_profile=b"\0" * 3000),
    "EXIF upright": file(scene(), exif=exif(1)),
    "EXIF orientation 99": file(scene(), exif=exif(99)),
    "bytes after the end": file(scene()) + b"a vendor's second picture",
    "at the limits of shape": file(scene(8, 160)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_needs_no_repair_keeps_its_bytes(name: str) -> None:
    taken = admit(KEPT[name], "x.jpg", PrepareOptions())
    assert taken.jpeg is KEPT[name] and taken.repairs == ()
    assert pixels(taken.jpeg).shape == (taken.height, taken.width, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied_as_pillow_does(orientation: int, kind: str) -> None:
    data = file(scene(), kind, exif=exif(orientation))
    taken = admit(data, "x", PrepareOptions())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert "orientation" in taken.repairs or kind == "TIFF"  # PIL turns a TIFF by itself
    assert b"Exif" not in taken.jpeg
    assert np.abs(pixels(taken.jpeg) - expected).mean() < 3


REPAIRED: dict[str, tuple[bytes, np.ndarray, set[str]]] = {
    "16-bit grey PNG": (*sixteen_bit(1), {"from_png", "16_bit", "grey"}),
    "16-bit color PNG": (*sixteen_bit(3), {"from_png", "16_bit"}),
    "alpha with hidden colors": (*hidden_colors("RGBA"), {"from_png", "alpha"}),
    "grey with alpha": (*hidden_colors("LA"), {"from_png", "alpha"}),
    "palette": (
        file(Image.fromarray(scene()).quantize(64), "PNG"),
        np.asarray(Image.fromarray(scene()).quantize(64).convert("RGB")),
        {"from_png", "palette"},
    ),
    "grey JPEG": (
        file(Image.fromarray(scene()).convert("L")),
        np.asarray(Image.fromarray(scene()).convert("L").convert("RGB")),
        {"grey"},
    ),
    "grey PNG": (
        file(Image.fromarray(scene()).convert("L"), "PNG"),
        np.asarray(Image.fromarray(scene()).convert("L").convert("RGB")),
        {"from_png", "grey"},
    ),
    "1-bit PNG": (
        file(Image.fromarray(scene()).convert("1"), "PNG"),
        np.asarray(Image.fromarray(scene()).convert("1").convert("RGB")),
        {"from_png", "grey"},
    ),
    "CMYK JPEG": (file(Image.fromarray(scene()).convert("CMYK")), scene(), {"cmyk"}),
    "PNG named .jpg": (file(scene(), "PNG"), scene(), {"from_png", "wrong_extension"}),
    "GIF of one frame": (
        file(Image.fromarray(scene()), "GIF"),
        np.asarray(Image.fromarray(scene()).quantize(256).convert("RGB")),
        {"from_gif", "palette", "wrong_extension"},
    ),
    "BMP": (file(scene(), "BMP"), scene(), {"from_bmp", "wrong_extension"}),
    "TIFF": (file(scene(), "TIFF"), scene(), {"from_tiff", "wrong_extension"}),
    "WebP": (file(scene(), "WEBP", lossless=True), scene(), {"from_webp", "wrong_extension"}),
    "AVIF": (file(scene(), "AVIF", quality=95), scene(), {"from_avif", "wrong_extension"}),
    "PPM": (file(scene(), "PPM"), scene(), {"from_ppm", "wrong_extension"}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_odd_pictures_become_upright_rgb_jpegs(name: str) -> None:
    data, expected, repairs = REPAIRED[name]
    taken = admit(
        data,
        "x.png"
        if "JPEG" not in name and data[:4] == b"\x89PNG" and "named" not in name
        else "x.jpg",
        PrepareOptions(),
    )
    assert (
        np.abs(pixels(taken.jpeg) - expected.astype(int)).mean() < 5
        if "GIF" in name
        else np.abs(pixels(taken.jpeg) - expected.astype(int)).mean() < 3.5
    )
    assert set(taken.repairs) == repairs
    assert simplejpeg.decode_jpeg_header(taken.jpeg)[2] == "YCbCr"


def test_palette_with_transparency_is_laid_over_the_background() -> None:
    image = Image.fromarray(np.repeat([[0] * 20 + [1] * 20], 30, axis=0).astype(np.uint8), "P")
    image.putpalette([200, 10, 10, 0, 0, 250])
    taken = admit(
        file(image, "PNG", transparency=1), "x.png", PrepareOptions(background=(10, 200, 30))
    )
    assert "alpha" in taken.repairs
    np.testing.assert_allclose(pixels(taken.jpeg)[15, 5], (200, 10, 10), atol=6)
    np.testing.assert_allclose(pixels(taken.jpeg)[15, 35], (10, 200, 30), atol=6)


CLEAN, PROGRESSIVE = file(scene(96, 128)), file(scene(96, 128), progressive=True)
REFUSED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "empty_file"),
    "zeros": (bytes(5000), "not_a_picture"),
    "garbage": (np.random.default_rng(0).bytes(5000), "not_a_picture"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "not_a_picture"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_a_picture"),
    "HEIC header only": (b"\0\0\0\x18ftypheic" + bytes(100), "damaged"),
    "half a JPEG": (CLEAN[: len(CLEAN) // 2], "damaged"),
    "nine tenths of a JPEG": (CLEAN[: len(CLEAN) * 9 // 10], "damaged"),
    "JPEG less 100 bytes": (CLEAN[:-100], "damaged"),
    "JPEG without its end": (CLEAN[:-2], "damaged"),
    "JPEG header only": (CLEAN[:300], "damaged"),
    "half a progressive JPEG": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "damaged"),
    "half a JPEG with an end": (CLEAN[: len(CLEAN) // 2] + b"\xff\xd9", "damaged"),
    "JPEG whose height lies": (resized_header(CLEAN, 300), "damaged"),
    "JPEG with a zero-filled tail": (
        CLEAN[: len(CLEAN) // 2] + bytes(len(CLEAN) - len(CLEAN) // 2),
        "damaged",
    ),
    "half a PNG": (file(scene(), "PNG")[:2000], "damaged"),
    "half a WebP": (file(scene(), "WEBP", lossless=True)[:1000], "damaged"),
    "animated GIF": (frames("GIF"), "animation"),
    "animated WebP": (frames("WEBP"), "animation"),
    "animated PNG": (frames("PNG"), "animation"),
    "TIFF of two pages": (frames("TIFF"), "animation"),
    "32-bit float TIFF": (
        file(Image.fromarray(scene()[:, :, 0].astype(np.float32)), "TIFF"),
        "unsupported_depth",
    ),
    "one pixel": (file(scene(1, 1)), "too_small"),
    "a bar": (file(scene(8, 170)), "too_narrow"),
    "JPEG of 400 megapixels": (resized_header(CLEAN, 20000, 20000), "too_large"),
    "PNG of 144 megapixels": (png_header(12000, 12000), "too_large"),
    "PNG of 4e18 pixels": (png_header(2_000_000_000, 2_000_000_000), "too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_and_unusable_files_are_refused_with_the_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ImageRejectedError) as caught:
        admit(data, "x.jpg", PrepareOptions())
    assert caught.value.reason == reason or (
        name == "PNG of 4e18 pixels" and caught.value.reason == "damaged"
    )
    assert caught.value.detail


def test_what_is_over_the_limit_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr(cv2, "imdecode", decode)
    for name, (data, reason) in REFUSED.items():
        if reason in ("too_large", "too_small", "too_narrow", "animation"):
            with pytest.raises(ImageRejectedError):
                admit(data, name, PrepareOptions())


def test_the_megapixel_limit_is_an_option() -> None:
    with pytest.raises(
        ImageRejectedError, match=r"0.0 megapixels, more than 0.001 \(--max-megapixels\)"
    ):
        admit(KEPT["baseline 4:4:4"], "x.jpg", PrepareOptions(max_megapixels=0.001))


def test_accept_warnings_stores_damaged_jpegs_that_then_decode_strictly() -> None:
    taken = admit(
        REFUSED["half a JPEG with an end"][0], "x.jpg", PrepareOptions(accept_warnings=True)
    )
    assert taken.repairs == ("decoder_warning",)
    assert pixels(taken.jpeg).shape == (96, 128, 3)


def chroma(jpeg: bytes) -> str:
    return str(simplejpeg.decode_jpeg_header(jpeg)[3])


@pytest.mark.parametrize("again", [{"max_side": 80}, {"quality": 90}])
def test_pictures_encoded_again_have_the_chroma_that_was_asked_for(again: dict[str, int]) -> None:
    for original, name in ((0, "444"), (1, "422"), (2, "420")):
        data = file(scene(90, 160), subsampling=original)
        asked = {
            wanted: chroma(admit(data, "x.jpg", PrepareOptions(**again, subsampling=wanted)).jpeg)
            for wanted in (None, "420", "444", "keep")
        }  # type: ignore[arg-type]
        assert asked == {None: "420", "420": "420", "444": "444", "keep": name}
    assert (
        chroma(admit(file(scene(), "PNG"), "x.png", PrepareOptions()).jpeg) == "444"
    )  # a repair, not a choice
    with pytest.raises(ValueError, match="give max_side or quality"):
        PrepareOptions(subsampling="420")


def test_chroma_enters_the_identity_of_a_set_only_where_it_acts() -> None:
    assert "subsampling" not in PrepareOptions().to_dict()
    assert (
        PrepareOptions(quality=90).to_dict()
        == PrepareOptions(quality=90, subsampling="420").to_dict()
        != PrepareOptions(quality=90, subsampling="keep").to_dict()
    )


def test_max_side_and_quality_encode_again() -> None:
    data = file(scene(90, 160), subsampling=2)
    small = admit(data, "x.jpg", PrepareOptions(max_side=80))
    assert (small.height, small.width, small.repairs) == (45, 80, ("reduced",))
    assert simplejpeg.decode_jpeg_header(small.jpeg)[3] == "420"
    assert (
        np.abs(
            pixels(small.jpeg) - cv2.resize(scene(90, 160), (80, 45), interpolation=cv2.INTER_AREA)
        ).mean()
        < 4
    )
    assert admit(data, "x.jpg", PrepareOptions(max_side=160)).jpeg is data
    worse = admit(data, "x.jpg", PrepareOptions(quality=30))
    assert worse.repairs == ("reencoded",) and len(worse.jpeg) < len(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_side": 4},
        {"quality": 0},
        {"quality": 101},
        {"subsampling": "411", "quality": 90},
        {"max_megapixels": 0},
        {"background": (1, 2, 300)},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrepareOptions(**wrong)  # type: ignore[arg-type]


def test_moments_match_the_pixels() -> None:
    taken = admit(CLEAN, "x.jpg", PrepareOptions())
    real = pixels(CLEAN).reshape(-1, 3) / 255
    np.testing.assert_allclose(
        taken.moments, [*real.mean(axis=0), *(real**2).mean(axis=0)], atol=0.01
    )


def test_the_output_of_finalise_is_stored_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    other = file(scene(48, 64, seed=3))
    monkeypatch.setattr(admission, "finalise", lambda jpeg: other)
    assert admit(KEPT["progressive"], "x.jpg", PrepareOptions()).jpeg == other
    monkeypatch.setattr(admission, "finalise", lambda jpeg: file(scene(50, 64)))
    with pytest.raises(ImageRejectedError, match=r"64 x 50 pixels, not 64 x 48"):
        admit(KEPT["progressive"], "x.jpg", PrepareOptions())


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of nine kinds of damage, as disks, networks and programs do it."""
    b = bytearray(data)
    at = int(rng.integers(2, len(b) - 2))
    n = int(rng.integers(1, max(2, len(b) // 10)))
    match int(rng.integers(9)):
        case 0:
            b[at] ^= 1 << int(rng.integers(8))
        case 1:
            for i in rng.integers(2, len(b), 5):
                b[i] ^= 1 << int(rng.integers(8))
        case 2:
            b[at] = int(rng.integers(256))
        case 3:
            del b[at:]
        case 4:
            b[at : at + n] = bytes(len(b[at : at + n]))
        case 5:
            b[at : at + n] = rng.bytes(len(b[at : at + n]))
        case 6:
            del b[at : at + n]
        case 7:
            b[at:at] = b[at : at + n]
        case _:
            b[at:] = bytes(len(b) - at)
    return bytes(b)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 2}],
    ids=["baseline", "progressive", "420"],
)
def test_at_most_five_percent_of_damaged_jpegs_pass_visibly_damaged(
    options: dict[str, object],
) -> None:
    rng = np.random.default_rng(7)
    rng_noise = np.random.default_rng(8)
    bad = total = 0
    for seed in range(10):
        textured = np.clip(
            scene(120, 160, seed).astype(int) + rng_noise.integers(-25, 26, (120, 160, 3)), 0, 255
        ).astype(np.uint8)
        data = file(textured, **options)
        clean = pixels(data)
        for _ in range(40):
            total += 1
            try:
                taken = admit(mutate(data, rng), "x.jpg", PrepareOptions())
            except ImageRejectedError:
                continue
            seen = pixels(taken.jpeg)
            bad += seen.shape != clean.shape or np.abs(seen - clean).mean() > 1
    assert bad <= 0.05 * total, f"{bad} of {total}"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_damaged_files_of_other_kinds_raise_only_rejections(kind: str) -> None:
    data = file(scene(), kind)
    rng = np.random.default_rng(1)
    passed = damaged = 0
    for _ in range(150):
        try:
            taken = admit(mutate(data, rng), "x", PrepareOptions())
        except ImageRejectedError:
            continue
        passed += 1
        damaged += taken.jpeg != admit(data, "x", PrepareOptions()).jpeg
    if kind == "PNG":  # its checksums show nearly all damage; GIF and BMP have none
        assert damaged <= 0.01 * 150, (passed, damaged)
