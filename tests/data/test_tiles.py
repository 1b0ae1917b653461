import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from ftlib.data import tiles
from ftlib.data.augment import crop_and_resize
from ftlib.data.decode import DecodeError, decode
from ftlib.data.tiles import encode, tiles_of

PHOTO = load_sample_image("flower.jpg")


def cut(jpeg, *box_and_shrink):
    found = tiles_of(jpeg)
    return None if found is None else found.cut(*box_and_shrink)


@st.composite
def pictures_and_boxes(draw):
    """Sizes that are and are not multiples of an MCU, and boxes anywhere, at the edges too."""
    height, width = draw(st.integers(8, 400)), draw(st.integers(8, 600))
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - h)), draw(st.integers(0, width - w))
    return height, width, (top, left, h, w)


@given(
    pictures_and_boxes(),
    st.sampled_from(["444", "422", "420"]),
    st.sampled_from([60, 90, 98]),
    st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=150, deadline=None)
def test_pixels_within_the_box_equal_those_of_the_whole_picture(
    shape, subsampling, quality, shrink
):
    height, width, box = shape
    jpeg = encode(np.ascontiguousarray(PHOTO[:height, :width]), quality, subsampling)
    part = cut(jpeg, *box, shrink)
    if part is None:
        return
    top, left, h, w = box
    whole, few = decode(jpeg, shrink), decode(part.jpeg, shrink)
    assert part.top % 8 == part.left % 8 == 0
    assert few.size < whole.size
    y0, x0, y1, x1 = (
        top // shrink,
        left // shrink,
        -(-(top + h) // shrink),
        -(-(left + w) // shrink),
    )
    dy, dx = part.top // shrink, part.left // shrink
    assert np.array_equal(few[y0 - dy : y1 - dy, x0 - dx : x1 - dx], whole[y0:y1, x0:x1])


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_pixels_equal_those_of_an_ordinary_jpeg(subsampling):
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(
        out, "JPEG", quality=90, subsampling=("444", "422", "420").index(subsampling)
    )
    tiled = encode(PHOTO, 90, subsampling)
    assert np.array_equal(decode(tiled), decode(out.getvalue()))
    assert len(tiled) < 1.15 * len(out.getvalue())


def test_gray_pictures_have_tiles_too():
    out = io.BytesIO()
    Image.fromarray(PHOTO[..., 1]).save(out, "JPEG", quality=90, restart_marker_blocks=8)
    part = cut(out.getvalue(), 100, 200, 90, 110)
    assert part is not None
    assert np.array_equal(
        decode(part.jpeg)[100 - part.top : 190 - part.top, 200 - part.left : 310 - part.left],
        decode(out.getvalue())[100:190, 200:310],
    )


def test_every_decoder_opens_a_cut():
    jpeg = encode(PHOTO, 90)
    for data in (jpeg, bytes(cut(jpeg, 50, 60, 200, 220).jpeg)):
        ours = decode(data)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), ours)
        assert np.array_equal(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], ours
        )


def test_a_small_box_needs_few_bytes():
    jpeg = encode(PHOTO, 90)
    assert len(cut(jpeg, 200, 300, 60, 60).jpeg) < 0.15 * len(jpeg)


def without_table(jpeg):
    at = jpeg.index(tiles.TABLE) - 4
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_the_table_changes_nothing_but_the_search(monkeypatch, subsampling):
    jpeg = encode(PHOTO, 90, subsampling)
    plain = without_table(jpeg)
    assert tiles.with_table(plain) == jpeg == tiles.with_table(jpeg)
    searched = cut(plain, 100, 120, 150, 200)
    monkeypatch.setattr(tiles, "_found", None)  # not even looked for
    assert cut(jpeg, 100, 120, 150, 200) == searched
    assert (
        cut(memoryview(jpeg), 100, 120, 150, 200)
        == cut(np.frombuffer(jpeg, np.uint8), 100, 120, 150, 200)
        == searched
    )


@pytest.mark.parametrize("aim", [0xFF80, 0x10080])
def test_tables_work_around_64_kib(aim):
    noise = np.random.default_rng(0).integers(0, 256, (256, 400, 3), np.uint8)
    jpeg = min(
        (encode(noise[:, :width].copy(), 90) for width in range(160, 400, 2)),
        key=lambda data: abs(len(data) - aim),
    )
    height, width, _ = decode(jpeg).shape
    part = cut(jpeg, height - 60, width - 60, 50, 50)
    assert np.array_equal(
        decode(part.jpeg)[height - 60 - part.top :, width - 60 - part.left :][:50, :50],
        decode(jpeg)[height - 60 : height - 10, width - 60 : width - 10],
    )


def test_a_table_of_another_picture_is_ignored():
    jpeg, other = encode(PHOTO, 90), encode(PHOTO[:, ::-1].copy(), 90)

    def table(data):
        return slice(
            at := data.index(tiles.TABLE), at + int.from_bytes(data[at - 2 : at], "big") - 2
        )

    forged = jpeg[: table(jpeg).start] + other[table(other)] + jpeg[table(jpeg).stop :]
    assert cut(forged, 100, 120, 150, 200) == cut(jpeg, 100, 120, 150, 200)


def test_files_with_too_many_tiles_get_no_table():
    assert tiles.with_table(jpeg_with()) == jpeg_with()
    huge = io.BytesIO()
    Image.new("RGB", (8 * 200, 8 * 200)).save(
        huge, "JPEG", subsampling=0, restart_marker_blocks=1
    )  # 40,000 tiles
    assert tiles.with_table(huge.getvalue()) == huge.getvalue()
    assert np.array_equal(decode(cut(huge.getvalue(), 800, 800, 9, 9).jpeg), np.zeros((16, 16, 3)))


def jpeg_with(**options):
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "jpeg"),
    [
        ("no markers", jpeg_with()),
        ("progressive", jpeg_with(progressive=True, restart_marker_blocks=4)),
        ("interval beyond a row", jpeg_with(restart_marker_blocks=37)),
        ("no JPEG", b"<html>"),
        ("nothing", b""),
        ("only a header", jpeg_with()[:200]),
    ],
)
def test_other_jpegs_are_not_cut(name, jpeg):
    assert cut(jpeg, 10, 10, 50, 50) is None


def test_a_box_of_nearly_the_whole_picture_is_not_cut():
    assert cut(encode(PHOTO, 90), 0, 0, 427, 640) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3000], lambda b: b[:-2], lambda b: b[: len(b) // 2] + b"\xff\xd9"]
)
def test_damaged_files_are_judged_by_the_decoder(damage):
    data = damage(encode(PHOTO, 90))
    assert cut(data, 10, 10, 50, 50) is None
    with pytest.raises(DecodeError):
        crop_and_resize(data, tiles_of(data), (10, 10, 50, 50), 32)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((13, 57, 200, 301), 128),
        ((0, 0, 300, 500), 64),
        ((100, 300, 321, 310), 32),
        ((400, 600, 27, 40), 64),
    ],
)
def test_training_gets_the_same_pixels_from_tiles(box, size):
    jpeg = encode(PHOTO, 90)
    found = tiles_of(jpeg)
    assert found is not None
    assert np.array_equal(
        crop_and_resize(jpeg, found, box, size), crop_and_resize(jpeg, None, box, size)
    )
