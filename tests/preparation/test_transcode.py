"""Transcoded files keep every pixel, and crops are decoded from few of their bytes."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from ftlib.data.decode import decode
from ftlib.data.tiles import TABLE, encode, tiles_of
from ftlib.preparation import validate as admission
from ftlib.preparation.jpeg_check import segments
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.transcode import tiled
from ftlib.preparation.validate import admit

PHOTO = load_sample_image("flower.jpg")


def jpeg(pixels=PHOTO, quality=90, **options):
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "JPEG", quality=quality, **options)
    return out.getvalue()


@given(
    st.integers(8, 200),
    st.integers(8, 260),
    st.integers(0, 200),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([5, 50, 75, 90, 100]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_transcoding_keeps_every_pixel_for_any_size_and_tables(
    height, width, top, subsampling, quality, optimize
):
    before = jpeg(
        PHOTO[top : top + height, top : top + width],
        quality,
        subsampling=subsampling,
        optimize=optimize,
    )
    after = tiled(before)
    assert TABLE in after and tiled(after) == after
    assert np.array_equal(decode(after), decode(before))


@pytest.mark.parametrize(
    ("subsampling", "factors"), [("444", (1, 1)), ("440", (1, 2)), ("411", (4, 1)), ("420", (2, 2))]
)
def test_crops_decode_alone_in_every_subsampling(subsampling, factors):
    before = cv2.imencode(
        ".jpg",
        PHOTO,
        [
            cv2.IMWRITE_JPEG_QUALITY,
            92,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling}"),
        ],
    )[1].tobytes()
    after = tiled(before)
    part = tiles_of(after).cut(100, 200, 90, 110)
    assert np.array_equal(decode(after), decode(before))
    assert len(part.jpeg) < 0.35 * len(before)
    assert np.array_equal(
        decode(part.jpeg)[100 - part.top :, 200 - part.left :][:90, :110],
        decode(before)[100:190, 200:310],
    )


def test_other_decoders_agree_and_metadata_is_kept():
    exif = Image.Exif()
    exif[271] = "a camera"
    before = jpeg(exif=exif, comment=b"a comment", icc_profile=b"not really one")
    after = tiled(before)
    opened = Image.open(io.BytesIO(after))
    assert np.array_equal(np.asarray(opened), np.asarray(Image.open(io.BytesIO(before))))
    assert np.array_equal(
        cv2.imdecode(np.frombuffer(after, np.uint8), cv2.IMREAD_COLOR),
        cv2.imdecode(np.frombuffer(before, np.uint8), cv2.IMREAD_COLOR),
    )
    assert (
        opened.getexif()[271] == "a camera"
        and opened.info["comment"] == b"a comment"
        and opened.info["icc_profile"] == b"not really one"
    )
    assert len(after) < 1.15 * len(before)


def categories(data):
    """Symbols of the table for first coefficients of the brightness."""
    return {
        symbol
        for marker, body in segments(data)
        if marker == 0xC4 and body[0] == 0
        for symbol in body[17 : 17 + sum(body[1:17])]
    }


def test_values_without_a_huffman_code_get_one():
    """In a slow ramp all differences are alike: its tables have no codes for most values."""
    ramp = np.repeat(np.linspace(0, 255, 512, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    before = jpeg(ramp, 95, optimize=True)
    after = tiled(before)
    assert {7, 8} & categories(before) == set() and {7, 8} <= categories(after)
    assert TABLE in after
    for decoder in (decode, lambda data: np.asarray(Image.open(io.BytesIO(data)))):
        assert np.array_equal(decoder(after), decoder(before))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("progressive", jpeg(progressive=True)),
        ("grey", jpeg(PHOTO[..., 1])),
        ("other restart markers", jpeg(restart_marker_blocks=7)),
        ("cut short", jpeg()[:20_000]),
        ("more behind the end", jpeg() + b"more"),
        ("only a header", jpeg()[:300]),
        ("no JPEG", b"<html>"),
        ("nothing", b""),
    ],
)
def test_other_files_come_back_unchanged(name, data):
    assert tiled(data) == data


def test_tiles_come_back_unchanged():
    assert tiled(encode(PHOTO, 90)) == encode(PHOTO, 90)


SMALL = jpeg(PHOTO[:64, :80])


@given(
    st.lists(st.tuples(st.integers(2, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_damaged_jpegs_raise_nothing(changes):
    data = bytearray(SMALL)
    for at, value in changes:
        data[at] = value
    assert isinstance(tiled(bytes(data)), bytes)


# --- preparation ---------------------------------------------------------------------------------


def test_preparation_stores_tiles_on_request():
    data = jpeg(quality=85)
    plain, tiles = (
        admit(data, "a.jpg", PrepareOptions()),
        admit(data, "a.jpg", PrepareOptions(tiles=True)),
    )
    assert plain.jpeg == data and plain.repairs == ()
    assert (
        tiles.jpeg == tiled(data) and tiles.repairs == ("tiled",) and tiles.moments == plain.moments
    )
    assert admit(jpeg(progressive=True), "a.jpg", PrepareOptions(tiles=True)).repairs == ()


@pytest.mark.parametrize(
    "wrong", [lambda data: jpeg(quality=60), lambda data: data[:-500], lambda data: b"no JPEG"]
)
def test_tiles_with_other_pixels_are_not_stored(monkeypatch, wrong):
    monkeypatch.setattr(admission, "tiled", wrong)
    data = jpeg(quality=85)
    assert admit(data, "a.jpg", PrepareOptions(tiles=True)).jpeg is data
