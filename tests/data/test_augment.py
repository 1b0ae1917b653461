import io
import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode

from ftlib import config
from ftlib.data import color
from ftlib.data.augment import (
    ColorJitter,
    EvalTransform,
    TrainTransform,
    crop_and_resize,
    crop_box,
    erase,
)
from ftlib.data.decode import DecodeError
from ftlib.data.rng import Randomness
from ftlib.data.tiles import tiles_of
from ftlib.settings import override

PLAIN = config.Augment(size=64, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, color_jitter_p=0)
RICH = config.Augment(
    size=64, randaugment_n=3, randaugment_m=9, randaugment_p=0.7, color_jitter_p=0.5, erasing_p=0.5
)


def jpeg_of(image, quality=92):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def photo():
    return load_sample_image("china.jpg")


@pytest.fixture(scope="module")
def jpeg(photo):
    return jpeg_of(photo)


def off(a, b):
    return np.abs(a.astype(int) - b.astype(int))


# --- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [RICH, config.Augment(size=64, trivialaugment=True)],
    ids=["randaugment", "trivialaugment"],
)
def test_the_result_depends_only_on_seed_epoch_and_image(jpeg, cfg):
    images = [(epoch, image) for epoch in range(3) for image in range(8)]
    transform = TrainTransform(cfg, seed=5)
    first = {at: transform(jpeg, *at).tobytes() for at in images}
    assert len(set(first.values())) == len(images)
    assert {at: transform(jpeg, *at).tobytes() for at in reversed(images)} == first
    copy = pickle.loads(pickle.dumps(transform))
    assert {at: copy(memoryview(jpeg), *at).tobytes() for at in images} == first
    with ThreadPoolExecutor(4) as threads:
        parts = list(
            threads.map(
                lambda part: [(at, TrainTransform(cfg, 5)(jpeg, *at).tobytes()) for at in part],
                [images[i::4] for i in range(4)],
            )
        )
    assert dict(pair for part in parts for pair in part) == first
    other = TrainTransform(cfg, seed=6)
    assert all(other(jpeg, *at).tobytes() != pixels for at, pixels in first.items())


def test_out_is_filled_in_place(jpeg):
    batch = np.zeros((2, 64, 64, 3), np.uint8)
    transform = TrainTransform(RICH, 1)
    transform(jpeg, 0, 3, batch[1])
    assert np.array_equal(batch[1], transform(jpeg, 0, 3)) and not batch[0].any()
    EvalTransform(64, 0.875)(jpeg, batch[0])
    assert np.array_equal(batch[0], EvalTransform(64, 0.875)(jpeg))


def test_damaged_bytes_raise_decode_error(jpeg):
    for transform in (lambda b: TrainTransform(PLAIN, 1)(b, 0, 0), EvalTransform(64, 0.875)):
        with pytest.raises(DecodeError):
            transform(jpeg[:-500])


# --- crop and resize ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 333, (0.35, 1.0), (3 / 4, 4 / 3)),
        (40, 400, (0.08, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.5, 0.9), (0.5, 2)),
    ],
)
def test_crop_boxes_have_the_distribution_of_torchvisions(height, width, scale, ratio):
    n = 4000
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [T.RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(n)], float
    )
    randomness = Randomness(11)
    ours = np.array([crop_box(height, width, scale, ratio, randomness) for _ in range(n)], float)
    assert (
        (ours[:, 0] >= 0).all()
        and (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] >= 0).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
    )
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (30, 41)])
def test_where_no_box_fits_the_center_box_equals_torchvisions(height, width):
    whole = ((1.0, 1.0), (0.9, 1.1))
    theirs = T.RandomResizedCrop.get_params(
        torch.empty(3, height, width), list(whole[0]), list(whole[1])
    )
    assert crop_box(height, width, *whole, Randomness(1)) == theirs


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((10, 20, 200, 250), 224),
        ((0, 0, 427, 640), 300),
        ((100, 300, 64, 64), 64),
        ((50, 60, 33, 40), 64),
    ],
)
def test_resizing_is_close_to_torchvisions_antialiased_resize(photo, jpeg, box, size):
    decoded = Image.open(io.BytesIO(jpeg)).convert("RGB")
    expected = np.asarray(TF.resized_crop(decoded, *box, [size, size]))
    assert off(crop_and_resize(jpeg, tiles_of(jpeg), box, size), expected).mean() < 6


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 427, 640), 128),
        ((101, 33, 301, 401), 64),
        ((7, 5, 420, 620), 32),
        ((3, 3, 420, 630), 16),
    ],
)
def test_shrinking_in_the_decoder_is_antialiased(photo, jpeg, box, size):
    """Nearer to torchvision's antialiased picture than plain linear interpolation of the whole."""
    decoded = Image.open(io.BytesIO(jpeg)).convert("RGB")
    top, left, height, width = box
    expected = np.asarray(TF.resized_crop(decoded, *box, [size, size]))
    plain = cv2.resize(
        np.asarray(decoded)[top : top + height, left : left + width],
        (size, size),
        interpolation=cv2.INTER_LINEAR,
    )
    ours = crop_and_resize(jpeg, tiles_of(jpeg), box, size)
    assert ours.shape == (size, size, 3)
    assert off(ours, expected).mean() < 0.7 * off(plain, expected).mean()


def test_a_flip_mirrors_the_picture_as_often_as_its_probability_says(jpeg):
    still, always = TrainTransform(PLAIN, 1), TrainTransform(override(PLAIN, {"flip": 1.0}), 1)
    upright = still(jpeg, 0, 0)
    assert np.array_equal(always(jpeg, 0, 0), upright[:, ::-1])
    half = TrainTransform(override(PLAIN, {"flip": 0.5}), 1)
    flipped = sum(np.array_equal(half(jpeg, 0, i), upright[:, ::-1]) for i in range(300))
    assert abs(flipped - 150) < 3.3 * math.sqrt(75)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"),
    [(427, 640), (640, 427), (300, 301), (256, 256), (100, 130), (33, 500), (224, 224), (500, 375)],
)
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (224, 1.0), (176, 0.95)])
def test_evaluation_equals_torchvisions_resize_and_center_crop(photo, height, width, size, crop):
    data = jpeg_of(np.asarray(Image.fromarray(photo).resize((width, height))))
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for mode, most in ((InterpolationMode.BILINEAR, 2), (InterpolationMode.BICUBIC, 4)):
        resized = TF.resize(picture, [round(size / crop)], interpolation=mode)
        expected = np.asarray(TF.center_crop(resized, [size, size]))
        difference = off(EvalTransform(size, crop, mode.value)(data), expected)
        assert difference.max() <= most and difference.mean() < 0.2


def test_evaluation_of_large_pictures_stays_close_to_torchvisions(photo):
    data = jpeg_of(cv2.resize(photo, (2560, 1708), interpolation=cv2.INTER_CUBIC))
    expected = np.asarray(TF.center_crop(TF.resize(Image.open(io.BytesIO(data)), [73]), [64, 64]))
    assert off(EvalTransform(64, 0.875)(data), expected).mean() < 1.5


# --- color jitter --------------------------------------------------------------------------------


def test_color_jitter_equals_torchvisions_for_the_same_factors(photo):
    """The same order and factors through torchvision's functions on PIL."""
    image = cv2.resize(photo, (128, 128), interpolation=cv2.INTER_AREA)
    functions = {
        color.brightness: TF.adjust_brightness,
        color.contrast: TF.adjust_contrast,
        color.saturation: TF.adjust_saturation,
        color.hue: TF.adjust_hue,
    }
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)
    for k in range(20):
        ours = jitter(image, Randomness(k))
        randomness = Randomness(k)
        randomness.python.random()
        theirs = Image.fromarray(image)
        for function, low, high in randomness.python.sample(jitter.steps, 4):
            theirs = functions[function](theirs, randomness.python.uniform(low, high))
        difference = off(ours, np.asarray(theirs))
        assert difference.mean() < 2 and np.percentile(difference, 99) <= 6


def test_color_jitter_draws_order_and_factors_as_torchvision_does(monkeypatch):
    """Order and factors, over 2000 draws; ranges of a strength above 1 are cut at 0."""
    drawn = []

    def recorder(name):
        return lambda image, factor: drawn.append((name, factor)) or image

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(color, name, recorder(name))
    jitter, randomness = ColorJitter(0.4, 0.4, 1.5, 0.1, p=0.2), Randomness(1)
    for _ in range(10_000):
        jitter(np.zeros((1, 1, 3), np.uint8), randomness)
    assert abs(len(drawn) / 4 - 2000) < 3.3 * math.sqrt(10_000 * 0.2 * 0.8)
    orders = Counter(tuple(name for name, _ in drawn[i : i + 4]) for i in range(0, len(drawn), 4))
    assert len(orders) == 24 and chisquare(list(orders.values())).pvalue > 0.001
    for name, low, width in (
        ("brightness", 0.6, 0.8),
        ("contrast", 0.6, 0.8),
        ("saturation", 0.0, 2.5),
        ("hue", -0.1, 0.2),
    ):
        assert kstest([f for n, f in drawn if n == name], "uniform", (low, width)).pvalue > 0.001
    assert tuple(T.ColorJitter(saturation=1.5).saturation) == (0.0, 2.5)


def test_color_jitter_without_strength_returns_the_picture_itself(photo):
    assert ColorJitter(0, 0, 0, 0, p=1.0)(photo, Randomness(1)) is photo


# --- erasing --------------------------------------------------------------------------------------


def test_erased_boxes_have_the_distribution_of_torchvisions():
    scale, n = (0.02, 0.33), 1500
    torch.manual_seed(0)
    theirs = []
    for _ in range(n):
        _, _, h, w, _ = T.RandomErasing.get_params(
            torch.empty(3, 64, 48), scale, (0.3, 1 / 0.3), [0.0]
        )
        theirs.append((h, w))
    ours, values, randomness = [], [], Randomness(2)
    for _ in range(n):
        image = np.full((64, 48, 3), 300, np.uint16)  # a value that no erased pixel can have
        erase(image, scale, randomness)
        rows, cols = (
            np.flatnonzero((image[..., 0] < 256).any(1)),
            np.flatnonzero((image[..., 0] < 256).any(0)),
        )
        ours.append((np.ptp(rows) + 1, np.ptp(cols) + 1) if len(rows) else (64, 48))
        values.append(image[image < 256][:50])
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b.prod(1)):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
    assert chisquare(np.bincount(np.concatenate(values), minlength=256)).pvalue > 0.001


def test_images_are_erased_as_often_as_the_probability_says(jpeg):
    plain = TrainTransform(PLAIN, 1)(jpeg, 0, 0)
    erasing = TrainTransform(override(PLAIN, {"erasing_p": 0.25}), 1)
    share = np.mean([not np.array_equal(erasing(jpeg, 0, i), plain) for i in range(400)])
    assert abs(share - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 400)
