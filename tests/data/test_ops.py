"""The table of ops: against PIL and torchvision where those have the op, else against the
statistics that it promises.

Modules: ops, color.
"""

import ast
import hashlib
from math import atan, degrees
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torchvision.transforms.functional as TF
from albumentations.augmentations.blur.functional import create_motion_kernel
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode

import ftlib.data
from ftlib.data import color, ops
from ftlib.data.ops import GROUPS, OPS
from ftlib.data.policy import apply
from ftlib.data.rng import Randomness

BY_NAME = {op.name: op for op in OPS}
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture(scope="module")
def photos():
    whole = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [
        cv2.resize(w[:, left : left + 427], (224, 224), interpolation=cv2.INTER_AREA)
        for w in whole
        for left in (0, 213)
    ]


def run(op, strength, image, key=0):
    return apply(op.at(strength, len(image)), image, Randomness(key))


def off(a, b):
    return np.abs(a.astype(int) - b.astype(int))


# --- every row of the table -----------------------------------------------------------------------


def test_the_table_is_complete_and_its_names_are_unique():
    assert len(BY_NAME) == len(OPS)
    assert {op.group for op in OPS} == set(GROUPS)
    assert all(op.at_most for op in OPS)
    assert {op.name for op in OPS} >= set(ops.TABLE_2026_11)


@each_op
def test_strength_0_changes_nothing(op, photos):
    for key, image in enumerate(photos):
        assert np.array_equal(run(op, 0.0, image, key), image)
        assert np.array_equal(run(op, 0.0, image[:32, :32], key), image[:32, :32])


@each_op
def test_more_strength_changes_more(op, photos):
    change = [
        np.mean(
            [off(run(op, s, image, key), image).mean() for image in photos for key in range(12)]
        )
        for s in (0, 0.1, 0.3, 0.6, 1)
    ]
    assert change == sorted(change)
    assert change[0] == 0 and change[2] > 0.1 and change[-1] > 1.2 * change[2]


@each_op
def test_results_keep_shape_and_type_and_the_source_is_untouched(op, photos):
    for image in (
        photos[0],
        np.ascontiguousarray(photos[1][:32, :32]),
        np.zeros((224, 224, 3), np.uint8),
        np.full((32, 32, 3), 255, np.uint8),
    ):
        before = image.copy()
        out = run(op, 1.0, image)
        assert out.shape == image.shape and out.dtype == np.uint8
        assert np.array_equal(image, before)


@each_op
def test_the_result_depends_only_on_the_key(op, photos):
    transform = op.at(0.7, 224)
    results = [apply(transform, photos[0], Randomness(key)) for key in (1, 2, 1)]
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(
        run(op, 0.7, photos[0], 1), results[0]
    )  # another object for the same strength


@each_op
def test_a_strength_outside_0_to_1_is_refused(op):
    for strength in (-0.01, 1.01):
        with pytest.raises(ValueError, match=op.name):
            op.at(strength, 224)


def test_signed_ops_draw_both_signs_equally_often():
    """A warp, a color and a hue: the sign of each from its effect, over 400 keys."""
    gray = np.full((32, 32, 3), 100, np.uint8)
    ramp = np.tile(np.arange(0, 224, 7, dtype=np.uint8)[None, :, None], (32, 1, 3))
    ups = {
        "brightness": np.mean(
            [run(BY_NAME["brightness"], 0.5, gray, k)[0, 0, 0] > 100 for k in range(400)]
        ),
        "translate_x": np.mean(
            [
                run(BY_NAME["translate_x"], 0.5, ramp, k)[0, 16, 0] > ramp[0, 16, 0]
                for k in range(400)
            ]
        ),
        "gamma": np.mean([run(BY_NAME["gamma"], 0.5, gray, k)[0, 0, 0] > 100 for k in range(400)]),
    }
    for name, share in ups.items():
        assert abs(share - 0.5) < 3.3 * 0.5 / 20, name


def test_docs_list_every_op_with_what_it_does():
    page = (Path(__file__).parents[2] / "docs" / "augmentation.md").read_text()
    for op in OPS:
        row = f"| {op.name} | {op.group} | {op.at_most} |"
        assert row in page, f"docs/augmentation.md lacks the row of an op in its table: {row}"
    assert page.count("| geometric |") + page.count("| noise |") + page.count("| color |") == len(
        OPS
    )


# --- against PIL and torchvision ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.0, 1.4, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (color.brightness, ImageEnhance.Brightness),
        (color.contrast, ImageEnhance.Contrast),
        (color.saturation, ImageEnhance.Color),
        (color.sharpness, ImageEnhance.Sharpness),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness"],
)
def test_enhancements_equal_pils(photos, ours, theirs, factor):
    for image in photos:
        expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor))
        assert off(ours(image, factor), expected).max() <= (
            2 if ours is color.sharpness else 1
        )  # PIL rounds the smoothed picture first
        if factor == 1:
            assert np.array_equal(ours(image, factor), image)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.03, 0.25])
def test_hue_equals_torchvisions(photos, turns):
    for image in photos:
        expected = np.asarray(TF.adjust_hue(Image.fromarray(image), turns))
        difference = off(color.hue(image, turns), expected)
        assert (
            difference.mean() < 1.2 and np.percentile(difference, 99) <= 5
        )  # both through 8-bit HSV, rounded differently


def test_autocontrast_and_equalize_equal_pils(photos):
    for image in photos:
        muted = (image * 0.6 + 30).astype(np.uint8)
        for picture in (image, muted, np.full_like(image, 7)):
            pil = Image.fromarray(picture)
            assert np.array_equal(
                run(BY_NAME["autocontrast"], 1.0, picture), np.asarray(ImageOps.autocontrast(pil))
            )
            assert np.array_equal(
                run(BY_NAME["equalize"], 1.0, picture), np.asarray(ImageOps.equalize(pil))
            )
        assert (
            off(
                run(BY_NAME["autocontrast"], 1.0, muted),
                A.AutoContrast(method="pil", p=1)(image=muted)["image"],
            ).max()
            <= 1
        )


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_posterize_and_solarize_equal_pils(photos, strength):
    for image in photos:
        pil = Image.fromarray(image)
        bits = 8 - int(np.ceil(4 * strength))
        assert np.array_equal(
            run(BY_NAME["posterize"], strength, image), np.asarray(ImageOps.posterize(pil, bits))
        )
        threshold = int(np.ceil(255 * (1 - strength)))
        assert np.array_equal(
            run(BY_NAME["solarize"], strength, image), np.asarray(ImageOps.solarize(pil, threshold))
        )


def test_gamma_equals_torchvisions(photos):
    for octaves in (-1, -0.3, 0.5, 1):
        assert (
            off(
                color.gamma(photos[0], octaves),
                np.asarray(TF.adjust_gamma(Image.fromarray(photos[0]), 2**octaves)),
            ).max()
            <= 1
        )


@pytest.mark.parametrize(
    ("name", "amount", "affine"),
    [
        ("rotate", 30, lambda v, n: {"angle": v, "translate": (0, 0), "scale": 1, "shear": 0}),
        (
            "shear_x",
            0.3,
            lambda v, n: {
                "angle": 0,
                "translate": (0, 0),
                "scale": 1,
                "shear": (degrees(atan(v)), 0),
            },
        ),
        (
            "shear_y",
            0.3,
            lambda v, n: {
                "angle": 0,
                "translate": (0, 0),
                "scale": 1,
                "shear": (0, degrees(atan(v))),
            },
        ),
        (
            "translate_x",
            0.3,
            lambda v, n: {"angle": 0, "translate": (v * n, 0), "scale": 1, "shear": 0},
        ),
        (
            "translate_y",
            0.3,
            lambda v, n: {"angle": 0, "translate": (0, v * n), "scale": 1, "shear": 0},
        ),
        ("zoom", 0.5, lambda v, n: {"angle": 0, "translate": (0, 0), "scale": 2**v, "shear": 0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_warps_equal_torchvisions_affine(photos, name, amount, affine, strength):
    """To within interpolation, at one of the two signs."""
    for image in photos[:2]:
        ours = run(BY_NAME[name], strength, image)
        expected = [
            np.asarray(
                TF.affine(
                    Image.fromarray(image),
                    **affine(sign * amount * strength, 224),
                    interpolation=InterpolationMode.BILINEAR,
                    fill=[128] * 3,
                )
            )
            for sign in (1, -1)
        ]
        inside = [np.median(off(ours, e)) + off(ours, e).mean() for e in expected]
        assert min(inside) < 2.5 and max(inside) > 10


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_perspective_equals_torchvisions_and_shows_the_whole_quadrilateral(photos, strength):
    size, moved = 224, []
    corners = [[0, 0], [size - 1, 0], [size - 1, size - 1], [0, size - 1]]
    for key in range(12):
        ours = run(BY_NAME["perspective"], strength, photos[0], key)
        shares = np.minimum(
            np.abs(Randomness(key).generator.normal(0, 0.12 * strength, (4, 2))), 0.32
        )  # the op's only draw
        points = np.array(corners) + (size - 1) * shares * [[1, 1], [-1, 1], [-1, -1], [1, -1]]
        expected = TF.perspective(
            Image.fromarray(photos[0]), points.tolist(), corners, InterpolationMode.BILINEAR
        )
        difference = off(ours, np.asarray(expected))[
            2:-2, 2:-2
        ]  # PIL looks up to half a pixel further
        assert np.median(difference) <= 2 and 4 * difference.mean() < off(ours, photos[0]).mean()
        moved.append(shares)
    assert (
        abs(np.mean(moved) / (0.12 * strength * np.sqrt(2 / np.pi)) - 1) < 0.2
    )  # the mean of |N(0, s)|


def test_motion_blur_uses_albumentations_kernels():
    draw = np.random.default_rng(0)
    for length in (3, 5, 11, 17):
        for angle, direction in [
            *draw.uniform([0, -1], [360, 1], (40, 2)),
            (90, 1),
            (0, -1),
            (45, 0),
        ]:
            theirs = create_motion_kernel(
                length, angle, direction, allow_shifted=False, random_state=None
            )
            assert np.allclose(
                ops.MotionBlur(length).kernel(angle, direction), theirs / theirs.sum()
            )


def test_dropout_covers_what_albumentations_covers():
    """The same share of the picture, center and corner: six holes of a given side, anywhere within
    the picture."""
    white, side, n = np.full((64, 64, 3), 255, np.uint8), 12, 600
    stock = A.CoarseDropout(
        num_holes_range=(6, 6),
        hole_height_range=(side, side),
        hole_width_range=(side, side),
        fill=128,
        p=1,
    )
    stock.set_random_state(Randomness(1).generator, Randomness(1).python)
    theirs = np.mean([stock(image=white.copy())["image"] == 128 for _ in range(n)], axis=0)
    ours = np.mean(
        [apply(ops.Dropout(side), white, Randomness(k)) == 128 for k in range(n)], axis=0
    )
    assert abs(ours.mean() - theirs.mean()) < 0.01
    for part in (np.s_[:8, :8], np.s_[28:36, 28:36], np.s_[:8, 28:36]):
        assert abs(ours[part].mean() - theirs[part].mean()) < 0.04


def test_warping_through_a_fourth_channel_changes_no_pixel(photos):
    y, x = np.indices((224, 224), np.float32)
    places = np.dstack([0.9 * x - 0.2 * y + 3.3, 0.2 * x + 0.8 * y + 1.7])
    for image in photos:
        for warp, *arguments in (
            (cv2.warpAffine, np.array([[0.9, -0.2, 20.3], [0.2, 0.9, 5.5]]), (224, 224)),
            (
                cv2.warpPerspective,
                np.array([[0.9, -0.2, 20], [0.2, 0.9, 5.5], [3e-4, 2e-4, 1]]),
                (224, 224),
            ),
            (cv2.remap, places, None, cv2.INTER_LINEAR),
        ):
            assert np.array_equal(
                ops.with_fourth_channel(warp, image, *arguments), warp(image, *arguments)
            ), warp.__name__


@pytest.mark.parametrize(
    "op",
    [op for op in OPS if isinstance(op.at(0.5, 64), ops.PixelTransform)],
    ids=lambda op: op.name,
)
def test_own_transforms_work_in_an_albumentations_compose(op, photos):
    """As within a user's own Compose."""
    transform, randomness = op.at(0.7, 224), Randomness(5)
    transform.set_random_state(randomness.generator, randomness.python)
    assert np.array_equal(transform(image=photos[1])["image"], run(op, 0.7, photos[1], 5))
    assert type(transform).__name__ in repr(A.Compose([transform]))


# --- statistics of the cheap replacements ---------------------------------------------------------


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_noise_is_gaussian_independent_and_of_the_documented_size(strength):
    image = np.full((224, 224, 3), 128, np.uint8)
    for name, sigma in (("gauss_noise", 50 * strength), ("multiplicative_noise", 64 * strength)):
        noise = (
            np.concatenate([run(BY_NAME[name], strength, image, k)[None] for k in range(8)]).astype(
                float
            )
            - 128
        )
        z = np.clip(noise, -127, 127) / sigma
        assert abs(z.mean()) < 0.02
        if strength < 1:  # little is cut off at 0 and 255
            assert abs(z.std() - 1) < 0.03
            assert (
                abs((np.abs(z) < 1).mean() - 0.683) < 0.03 + 0.4 / sigma
            )  # rounding to whole levels
        for a, b in (
            (z[:, :-1], z[:, 1:]),
            (z[:, :, :-1], z[:, :, 1:]),
            (z[..., 0], z[..., 1]),
            (z[:-1], z[1:]),
        ):
            assert abs((a * b).mean()) < 0.02


def test_gauss_noise_has_the_statistics_of_albumentations(photos):
    """The same mean, spread and quantiles of the change as A.GaussNoise."""
    ours = (
        np.stack([run(BY_NAME["gauss_noise"], 0.4, photos[0], k) for k in range(10)]).astype(float)
        - photos[0]
    )
    stock = A.GaussNoise(std_range=(20 / 255, 20 / 255), noise_scale_factor=1, p=1)
    stock.set_random_state(Randomness(9).generator, Randomness(9).python)
    theirs = (
        np.stack([stock(image=photos[0])["image"] for _ in range(10)]).astype(float) - photos[0]
    )
    for share in (1, 10, 25, 50, 75, 90, 99):
        assert abs(np.percentile(ours, share) - np.percentile(theirs, share)) <= 1.5


def test_elastic_has_the_statistics_of_albumentations_field():
    """Standard deviation and autocorrelation of the displacement, against blurring white noise at
    full size as A.ElasticTransform does."""
    side, sigma, amount = 224, 11.2, 4.0
    ours = ops.Elastic(amount, sigma)
    generator = Randomness(1).generator
    fields = np.stack([ours.field(side, side, generator) for _ in range(150)])
    stock = A.ElasticTransform(alpha=1, sigma=sigma, noise_distribution="uniform", p=1)
    stock.set_random_state(Randomness(2).generator, Randomness(2).python)
    grid = np.arange(side, dtype=np.float32)
    params = [
        stock.get_params_dependent_on_data({"shape": (side, side, 3)}, {}) for _ in range(150)
    ]
    theirs = np.stack(
        [np.dstack([p["map_x"] - grid[None, :], p["map_y"] - grid[:, None]]) for p in params]
    )
    theirs = theirs[:, 40:-40, 40:-40]  # its borders weigh more than its inside
    theirs *= amount / theirs.std()
    assert fields.shape == (150, side, side, 2)
    assert abs(fields.std() - amount) < 0.06 * amount and abs(fields.mean()) < 0.1 * amount
    spread = fields.std(axis=(0, 3))
    assert (
        spread.min() / amount > 0.8 and spread.max() / amount < 1.2
    )  # the same everywhere, the edges too

    def correlation(f, lag):
        return (f[:, :, :-lag] * f[:, :, lag:]).mean() / (f**2).mean(), (
            f[:, :-lag] * f[:, lag:]
        ).mean() / (f**2).mean()

    for lag in (4, 11, 22):
        expected = np.exp(-(lag**2) / (4 * sigma**2))
        assert np.allclose(correlation(fields, lag), expected, atol=0.05)
        assert np.allclose(correlation(theirs, lag), expected, atol=0.05)
    assert abs((fields[..., 0] * fields[..., 1]).mean()) < 0.1 * amount**2  # x and y apart


def test_lengths_scale_with_the_side():
    """At half the side the same strength draws the same picture, at half the scale."""
    large = np.zeros((224, 224, 3), np.uint8)
    large[80:120, 60:140] = 255
    small = large[::2, ::2].copy()
    for name in ("rotate", "shear_x", "translate_x", "zoom", "perspective", "blur"):
        halved = cv2.resize(
            run(BY_NAME[name], 0.8, large, 3), (112, 112), interpolation=cv2.INTER_AREA
        )
        assert off(halved, run(BY_NAME[name], 0.8, small, 3)).mean() < 4, name


# --- golden ---------------------------------------------------------------------------------------

AVX2 = 11  # cv::CPU_AVX2, which the Python module does not name
GOLDEN = Path(__file__).with_name("golden_ops.txt")


def golden_lines():
    """One line per op: the hash of its results on a drawn picture, at two strengths and three
    keys."""
    y, x = np.indices((64, 64))
    image = np.dstack(
        [
            (x * 4 + y) % 256,
            (y * 3 + (x // 8) * 20) % 256,
            ((x - 32) ** 2 + (y - 32) ** 2) // 8 % 256,
        ]
    ).astype(np.uint8)
    for op in OPS:
        digest = hashlib.sha256()
        for strength in (0.3, 0.9):
            for key in (1, 2, 3):
                digest.update(run(op, strength, image, key).tobytes())
        yield f"{op.name} {digest.hexdigest()[:16]}"


def test_pixels_have_not_changed_since_they_were_recorded():
    """The same bits as when they were recorded; `python tests/data/test_ops.py` records them anew.
    OpenCV rounds differently from release to release and on processors without AVX2, so the
    hashes hold for the versions named in the file's first line."""
    first, *lines = GOLDEN.read_text().splitlines()
    if (
        first != f"opencv {cv2.__version__} albumentations {A.__version__} numpy {np.__version__}"
        or not cv2.checkHardwareSupport(AVX2)
    ):
        pytest.skip(f"recorded for {first} with AVX2")
    assert list(golden_lines()) == lines, "record it: PYTHONPATH=. python tests/data/test_ops.py"


# --- lint -----------------------------------------------------------------------------------------


def test_albumentations_own_seeding_is_never_used():
    """Compose(seed=...) and set_random_seed give every transform the same stream in 2.0.8."""
    found = []
    for path in Path(ftlib.data.__file__).parent.parent.rglob("*.py"):
        text = path.read_text()
        if "albumentations" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            seeded = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).startswith(("A.", "albumentations."))
                and any(k.arg == "seed" for k in node.keywords)
            )
            if seeded or (isinstance(node, ast.Attribute) and node.attr == "set_random_seed"):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_albumentations_seeding_makes_two_flips_fire_together():
    """Two flips under one seed fire together or not at all; under one shared generator they are
    independent."""
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

    def outcomes(flips):
        return {flips(image=image)["image"].tobytes() for _ in range(60)}

    seeded = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], seed=1)
    shared = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    randomness = Randomness(1)
    shared.set_random_state(randomness.generator, randomness.python)
    assert len(outcomes(seeded)) == 2
    assert len(outcomes(shared)) == 4


if __name__ == "__main__":
    GOLDEN.write_text(
        "\n".join(
            [
                f"opencv {cv2.__version__} albumentations {A.__version__} numpy {np.__version__}",
                *golden_lines(),
            ]
        )
        + "\n"
    )
