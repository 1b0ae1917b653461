"""One definition of a picture: preparation and the package give the same pixels."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ftlib import picture
from ftlib.data.augment import EvalTransform
from ftlib.packaging.package import picture_rules
from ftlib.picture import PictureError, Preprocessing, Rules
from ftlib.preparation import validate
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox
from tests.picture_files import (
    HEIGHT,
    REFUSED,
    TAKEN,
    WIDTH,
    deep,
    file,
    opencv,
    profile,
    scene,
    transparent,
    with_sbit,
)


def rgb(data: bytes, rules: Rules = Rules()) -> np.ndarray:  # noqa: B008 - immutable
    return np.asarray(picture.to_rgb(picture.open_image(data, rules), rules)[0])


def package_reader(options: PrepareOptions, size: int = 32, short: int = 40) -> Preprocessing:
    """What a package of a set prepared with these options reads files by, through its JSON."""
    meta = {"size": size, "short": short, **picture_rules({"rules": options.to_dict()})}
    return Preprocessing(json.loads(json.dumps(meta)))


@pytest.mark.parametrize("name", TAKEN)
def test_preparation_and_package_give_the_same_pixels(name: str) -> None:
    data, options = TAKEN[name](), PrepareOptions(background=(10, 200, 30))
    if picture.kind_of(data) == "JPEG":
        prepared = validate._read_jpeg(data, options)[0]
    else:
        prepared = validate._read_other(data, options)[0]
    packaged = rgb(data, options.picture)
    difference = np.abs(prepared.astype(int) - packaged)
    assert difference.max() <= (1 if name == "CMYK JPEG" else 0)


@pytest.mark.parametrize("name", TAKEN)
def test_a_package_sees_what_evaluation_sees_of_the_prepared_picture(name: str) -> None:
    data, options = TAKEN[name](), PrepareOptions(background=(10, 200, 30))
    stored = validate.admit(data, "x", options).jpeg
    evaluated, packaged = EvalTransform(32, 0.8)(stored), package_reader(options)(data)
    difference = np.abs(evaluated.astype(int) - packaged)
    if stored == data:
        assert difference.max() == 0
    assert difference.mean() < 3  # what is stored was encoded as JPEG once more


@pytest.mark.parametrize("name", REFUSED)
def test_preparation_and_package_refuse_the_same_files(name: str) -> None:
    make, reason, says = REFUSED[name]
    data = make()
    with pytest.raises(ImageRejectedError) as prepared:
        validate.admit(data, "x", PrepareOptions())
    with pytest.raises(PictureError) as packaged:
        package_reader(PrepareOptions())(data)
    assert prepared.value.reason == packaged.value.reason == reason
    assert says in str(packaged.value)


@pytest.mark.parametrize("name", TAKEN)
def test_the_size_is_known_from_the_header(name: str) -> None:
    size = picture.header(TAKEN[name]()).size
    assert size is not None
    assert {size, size[::-1]} & {(WIDTH, HEIGHT)} or name == "HEIC"  # HEIC codes in blocks of 64


def test_a_heic_picture_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = TAKEN["HEIC"]()
    monkeypatch.setattr(picture, "_can_read_heif", lambda: False)
    with pytest.raises(PictureError, match="pip install pillow-heif"):
        picture.open_image(data, Rules())


def test_the_data_sets_own_limit_of_megapixels_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow itself would refuse above 1,000
    data = file(scene(), "PNG")
    with pytest.raises(PictureError, match=r"more than 0\.001"):
        rgb(data, Rules(max_megapixels=0.001))
    assert rgb(data, Rules(max_megapixels=0.01)).shape == (HEIGHT, WIDTH, 3)


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extension", [".png", ".tiff"])
@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
def test_deep_pictures_are_scaled_by_the_bits_they_use(
    bits: int, extension: str, channels: int
) -> None:
    samples = deep(bits, channels)
    seen = rgb(opencv(extension, samples))
    expected = np.rint(samples / ((1 << bits) - 1) * 255)
    expected = expected if channels == 3 else np.repeat(expected[:, :, None], 3, axis=2)
    assert np.abs(seen - expected).max() <= 1
    assert picture.used_bits(opencv(extension, samples)) == bits


def test_dark_pictures_of_a_deep_set_stay_dark() -> None:
    dark = (deep(12) // 8).astype(np.uint16)
    assert rgb(opencv(".png", dark)).max() > 120, "alone, it is scaled by its own range"
    assert rgb(opencv(".png", dark), Rules(depth_bits=12)).max() < 34


def test_a_declared_depth_wins_over_the_sets() -> None:
    data = with_sbit(opencv(".png", deep(10)), 10)
    assert picture.used_bits(data) is None
    np.testing.assert_array_equal(rgb(data, Rules(depth_bits=12)), rgb(data))
    assert rgb(data).max() > 180


def test_samples_shifted_up_as_the_png_standard_asks_are_not_brightened() -> None:
    shifted = with_sbit(opencv(".png", (deep(10) << 6).astype(np.uint16)), 10)
    low = with_sbit(opencv(".png", deep(10)), 10)
    assert np.abs(rgb(shifted).astype(int) - rgb(low)).max() <= 1


def test_a_given_range_wins_and_reads_32_bits_too() -> None:
    samples = scene()[:, :, 0].astype(np.float32) * 10 - 500
    seen = rgb(file(Image.fromarray(samples), "TIFF"), Rules(depth_range=(0.0, 1000.0)))
    expected = np.clip(np.rint(samples.clip(0) / 1000 * 255), 0, 255)
    assert np.abs(seen[:, :, 0] - expected).max() <= 1
    data = with_sbit(opencv(".png", deep(10)), 10)
    np.testing.assert_array_equal(
        rgb(data, Rules(depth_range=(0, 4095))), rgb(opencv(".png", deep(10)), Rules(depth_bits=12))
    )


def test_scaling_in_pieces_is_scaling_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for samples, low, high in ((deep(12, 3), 0, 4095), (deep(12).astype(np.float32), 7, 900)):
        whole = picture.scaled(samples, low, high)
        monkeypatch.setattr(picture, "ROWS_AT_ONCE", 7)
        np.testing.assert_array_equal(picture.scaled(samples, low, high), whole)


def test_pictures_of_8_bits_use_no_more() -> None:
    for name in ("PNG", "TIFF", "baseline JPEG", "WebP", "palette PNG"):
        assert picture.used_bits(TAKEN[name]()) is None


def test_the_sandbox_measures_used_bits(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(opencv(".png", deep(12)))
    sandbox = DecoderSandbox(PrepareOptions())
    try:
        assert sandbox.used_bits(str(tmp_path / "a.png")) == 12
        assert sandbox.used_bits(file(scene())) is None
        with pytest.raises(ImageRejectedError, match="no bytes"):
            sandbox.used_bits(b"")
        whole = sandbox.examine(file(scene(), "PNG"), "a.jpg")
        assert "wrong_extension" in whole.repairs
    finally:
        sandbox.close()


@given(st.integers(0, 65535), st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_scaling_is_monotonic_and_reaches_both_ends(value: int, bits: int) -> None:
    white = (1 << bits) - 1
    pair = picture.scaled(np.array([value, min(value + 1, 65535)], np.uint16), 0, white)
    assert pair[0] <= pair[1]
    ends = picture.scaled(np.array([0, white], np.uint16), 0, white)
    assert ends.tolist() == [0, 255]


# --- color and transparency -----------------------------------------------------------------------


def test_wide_gamut_is_converted_as_little_cms_does() -> None:
    p3 = profile("Display P3")
    seen = rgb(file(scene(), "PNG", icc_profile=p3))
    expected = ImageCms.profileToProfile(
        Image.fromarray(scene()),
        ImageCms.ImageCmsProfile(io.BytesIO(p3)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    np.testing.assert_array_equal(seen, np.asarray(expected))
    assert np.abs(seen.astype(int) - scene()).max() > 10


@pytest.mark.parametrize("icc", [profile("sRGB"), b"\0" * 3000, b"not one", b"", b"\0" * 130])
def test_other_profiles_change_nothing(icc: bytes) -> None:
    np.testing.assert_array_equal(rgb(file(scene(), "PNG", icc_profile=icc)), scene())


@given(st.binary(max_size=600))
@settings(max_examples=100, deadline=None)
def test_damaged_profiles_are_ignored(tail: bytes) -> None:
    whole = profile("Display P3")
    for data in (tail, whole[:132] + tail, whole[: len(tail)]):
        image = picture.to_srgb(Image.fromarray(scene(8, 8)), data)
        picture.is_wide_gamut(data)
        assert image.size == (8, 8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_over_the_background(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    seen = rgb(file(transparent(), kind, **options), Rules(background=(1, 2, 3)))
    assert (seen[:, WIDTH // 2 :] == (1, 2, 3)).all()
    np.testing.assert_array_equal(seen[:, : WIDTH // 2], scene()[:, : WIDTH // 2])


# --- headers of hostile files ---------------------------------------------------------------------


def test_a_chain_of_pages_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(PictureError, match="more than one frame or page"):
        picture.open_image(REFUSED["a TIFF of two pages"][0](), Rules())


def test_a_tiff_whose_fields_claim_more_than_the_file_is_refused() -> None:
    fields = b"".join(
        tag.to_bytes(2, "little") + b"\x07\0" + (900).to_bytes(4, "little") + bytes(4)
        for tag in range(1, 101)
    )
    data = b"II*\0\x08\0\0\0" + (100).to_bytes(2, "little") + fields + bytes(4) + bytes(500)
    with pytest.raises(PictureError, match="claim more bytes than the file has"):
        picture.header(data)


@given(st.sampled_from(sorted(set(TAKEN) - {"HEIC"})), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_headers_end_in_a_picture_error_or_a_header(name: str, draw: st.DataObject) -> None:
    data = bytearray(TAKEN[name]())
    for _ in range(draw.draw(st.integers(1, 5))):
        data[draw.draw(st.integers(0, min(len(data), 400) - 1))] = draw.draw(st.integers(0, 255))
    cut = bytes(data[: draw.draw(st.integers(0, len(data)))])
    for damaged in (bytes(data), cut):
        try:
            picture.header(damaged)
        except PictureError as error:
            assert error.detail


# --- golden pixels --------------------------------------------------------------------------------


def plain() -> np.ndarray:
    """uint8[24, 32, 3] by integer arithmetic, the same with every version of every library."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 8, y * 10, (x * y) % 256], axis=-1).astype(np.uint8)


def golden_files() -> dict[str, bytes]:
    image = Image.fromarray(plain())
    gray = Image.fromarray(plain()[:, :, 2])
    palette = Image.fromarray((plain()[:, :, 0] // 16).astype(np.uint8), "P")
    palette.putpalette([value for i in range(256) for value in (i, 255 - i, i * 7 % 256)])
    clear = image.copy()
    clear.putalpha(gray)
    return {
        "PNG": file(image, "PNG"),
        "gray PNG": file(gray, "PNG"),
        "palette PNG": file(palette, "PNG"),
        "transparent PNG": file(clear, "PNG"),
        "transparent gray PNG": file(clear.convert("LA"), "PNG"),
        "GIF": file(palette, "GIF"),
        "BMP": file(image, "BMP"),
        "TIFF": file(image, "TIFF"),
        "CMYK TIFF": file(image.convert("CMYK"), "TIFF"),
        "PPM": file(image, "PPM"),
        "lossless WebP": file(image, "WEBP", lossless=True),
    }


GOLDEN = {
    "PNG": "0f43f49ef959f442",
    "gray PNG": "341e41db25593454",
    "palette PNG": "2b4c294d420a9fcc",
    "transparent PNG": "79f6cf990e155ad3",
    "transparent gray PNG": "f4a73d741a37752f",
    "GIF": "2b4c294d420a9fcc",
    "BMP": "0f43f49ef959f442",
    "TIFF": "0f43f49ef959f442",
    "CMYK TIFF": "0f43f49ef959f442",
    "PPM": "0f43f49ef959f442",
    "lossless WebP": "0f43f49ef959f442",
}
"""sha256 of the pixels that preparation gave these files before `ftlib.picture` existed."""


@pytest.mark.filterwarnings("ignore")  # Pillow's mode argument, for pictures with a palette
@pytest.mark.parametrize("name", GOLDEN)
def test_pixels_of_8_bit_pictures_never_change(name: str) -> None:
    seen = rgb(golden_files()[name], Rules(background=(10, 200, 30)))
    assert hashlib.sha256(seen.tobytes()).hexdigest()[:16] == GOLDEN[name]
