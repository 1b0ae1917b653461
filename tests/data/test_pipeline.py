"""A user's own Albumentations pipeline: read, checked, seeded per picture, refused where it cannot
work. Also the settings behind it (`config.pipeline_text`), vertical flips and quarter turns."""

import json

import albumentations as A
import cv2
import numpy as np
import pytest

from ftlib import config
from ftlib.data.augment import TrainTransform, check, turn
from ftlib.data.pipeline import Pipeline
from ftlib.data.rng import Randomness
from ftlib.settings import ConfigError, override

PLAIN = config.Augment(size=32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, color_jitter_p=0)
AERIAL = A.Compose(
    [
        A.RandomFog(fog_coef_range=(0.2, 0.6), p=0.5),
        A.OneOf([A.CLAHE(p=1), A.GaussNoise(p=1), A.RGBShift(p=1)], p=0.8),
        A.Affine(rotate=(-20, 20), p=0.7),
    ]
)


def text_of(transform):
    return json.dumps(A.to_dict(transform))


@pytest.fixture(scope="module")
def jpeg():
    draw = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    picture = cv2.resize(draw, (48, 48), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture)[1].tobytes()


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_the_setting_keeps_the_contents_of_the_file(tmp_path, form, jpeg):
    file = tmp_path / f"aerial.{form}"
    A.save(AERIAL, str(file), data_format=form)
    cfg = override(PLAIN, {"pipeline": str(file)})
    file.unlink()
    assert json.loads(cfg.pipeline)["transform"]["__class_fullname__"] == "Compose"
    again = override(cfg, {"flip": 0.5})  # the contents are a value like any other
    assert again.pipeline == cfg.pipeline == config.Augment(pipeline=cfg.pipeline).pipeline
    check(cfg)
    assert TrainTransform(cfg, 1)(jpeg, 0, 3).shape == (32, 32, 3)


def test_yaml_and_json_give_the_same_setting(tmp_path):
    for form in ("yaml", "json"):
        A.save(AERIAL, str(tmp_path / form), data_format=form)
    text = text_of(A.GaussNoise(std_range=(1e-5, 2e-5), p=1))
    assert "[1e-05,2e-05]" in config.pipeline_text(text)
    texts = {config.pipeline_text(str(tmp_path / form)) for form in ("yaml", "json")}
    assert len(texts) == 1


def test_the_result_depends_only_on_seed_epoch_and_image(jpeg):
    cfg = override(PLAIN, {"pipeline": text_of(AERIAL), "vflip": 0.5, "rotate90": 0.5})
    images = [(epoch, image) for epoch in range(3) for image in range(12)]
    first = {at: TrainTransform(cfg, 5)(jpeg, *at).tobytes() for at in images}
    transform = TrainTransform(cfg, 5)
    assert {at: transform(jpeg, *at).tobytes() for at in reversed(images)} == first
    assert len(set(first.values())) > 30
    other = TrainTransform(cfg, seed=6)
    assert sum(other(jpeg, *at).tobytes() == pixels for at, pixels in first.items()) < 3


def test_a_seed_in_the_file_is_ignored(jpeg):
    seeded = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], seed=1)
    transform = TrainTransform(override(PLAIN, {"pipeline": text_of(seeded)}), 1)
    assert len({transform(jpeg, 0, i).tobytes() for i in range(40)}) == 4


def test_the_result_equals_albumentations(jpeg):
    """Given the same generators, called directly."""
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    theirs = A.Compose(AERIAL.transforms)
    for k in range(10):
        randomness = Randomness(k)
        theirs.set_random_state(randomness.generator, randomness.python)
        expected = theirs(image=picture)["image"]
        assert np.array_equal(Pipeline(text_of(AERIAL))(picture, Randomness(k)), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid YAML or JSON"),
        ("a: [1", "cannot be read"),
        ('{"a": 1}', "holds no Albumentations transform"),
        ('{"transform": {"__class_fullname__": .nan}}', "holds no|not valid"),
        ("missing/aerial.yaml", "the file missing/aerial.yaml cannot be read"),
        ('{"transform": {"x": "' + "y" * 70_000 + '"}}', "is longer than 65,536 bytes"),
    ],
)
def test_values_that_are_no_pipeline_are_refused(text, message):
    with pytest.raises(ConfigError, match=rf"augment\.pipeline: .*({message})"):
        config.Augment(pipeline=text)


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "!!python/object/apply:os.getcwd []"])
def test_files_that_hold_no_pipeline_are_refused(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.yaml (is not valid|holds no)"):
        config.Augment(pipeline=str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"__class_fullname__": "NoSuchTransform"}, "cannot build it .*NoSuchTransform"),
        ({"__class_fullname__": "os.system", "command": "true"}, "cannot build it"),
        (
            {"__class_fullname__": "HorizontalFlip", "probability": 1},
            "does not know the argument probability of HorizontalFlip",
        ),
        ({"__class_fullname__": "GaussNoise", "std_range": [3, 4], "p": 1}, "cannot build it"),
        (A.to_dict(A.Resize(16, 16))["transform"], r"into uint8\[16, 16, 3\]"),
        (A.to_dict(A.Normalize())["transform"], r"into float32\[32, 32, 3\]"),
        (A.to_dict(A.ToGray(num_output_channels=1))["transform"], "does not work"),
        (A.to_dict(A.RandomCrop(300, 300, p=1))["transform"], "does not work"),
    ],
)
def test_pipelines_that_albumentations_cannot_run_are_refused(transform, message):
    transform = {**transform, "p": transform.get("p", 1.0)}
    text = json.dumps({"__version__": A.__version__, "transform": transform})
    with pytest.raises(ConfigError, match=message):
        check(override(PLAIN, {"pipeline": text}))


def test_a_pipeline_with_randomness_of_its_own_is_refused(monkeypatch):
    loose = np.random.default_rng(0)
    monkeypatch.setattr(
        A.RandomFog,
        "apply",
        lambda self, img, **_: loose.integers(0, 256, img.shape, np.uint8),
    )
    with pytest.raises(ConfigError, match="different pictures from the same random numbers"):
        check(override(PLAIN, {"pipeline": text_of(A.RandomFog(p=1))}))


# --- flips and turns ------------------------------------------------------------------------------


def test_flips_and_turns_give_all_eight_symmetries_equally_often(jpeg):
    """All are reached, as often as their probabilities say, and no pixel changes."""
    upright = TrainTransform(PLAIN, 1)(jpeg, 0, 0)
    symmetries = {
        np.ascontiguousarray(np.rot90(picture, k)).tobytes(): (k, flipped)
        for flipped, picture in enumerate((upright, upright[::-1]))
        for k in range(4)
    }
    transform = TrainTransform(override(PLAIN, {"vflip": 0.5, "rotate90": 0.75}), 1)
    counts = np.zeros((4, 2))
    for image in range(1600):
        counts[symmetries[transform(jpeg, 0, image).tobytes()]] += 1
    assert abs(counts - 200).max() < 4 * np.sqrt(200 * 7 / 8)


@pytest.mark.parametrize(("vflip", "rotate90"), [(0.0, 0.0), (1.0, 0.0)])
def test_a_probability_of_0_draws_nothing(vflip, rotate90):
    """So that runs from before these settings keep their random streams."""
    picture = np.zeros((8, 8, 3), np.uint8)
    randomness, untouched = Randomness(3), Randomness(3)
    turn(picture, vflip, rotate90, randomness)
    if vflip:
        untouched.python.random()
    assert randomness.python.random() == untouched.python.random()
