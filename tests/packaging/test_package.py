"""Packages: the pixels and scores of evaluation, without ftlib and without a pickle.

Modules: package, image_classifier, model_card.
"""

import base64
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import mlflow.utils.requirements_utils
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ftlib.config import Augment, Evaluate, Model, Run
from ftlib.data.augment import EvalTransform
from ftlib.packaging import package as P
from ftlib.storage import StorageError
from ftlib.training import models
from ftlib.training.evaluate import normalize
from tests.failing_writes import FailingWrites, whole

code = P.image_classifier

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
RUN = Run(
    name="tiny",
    stage="phase2",
    model=Model(arch="resnet18"),
    augment=Augment(size=32),
    evaluate=Evaluate(crop=0.8),
)


def photo(height, width, seed=0):
    """Smooth noise: like a photograph, it has detail at all scales but no hard grid."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.build(RUN.model, len(CLASSES)).eval()
    with torch.no_grad():  # BatchNorm statistics that are not those of a fresh layer
        model.train()
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "model"
    return P.package(
        model,
        RUN,
        CLASSES,
        {"val/top1": 91.2345, "val/top5": 99.1},
        1.7,
        out,
        data={"name": "zoo", "digest": "0123456789abcdef"},
        calibrated_on="1,000 images",
    )


def test_no_file_list_of_an_installed_package_is_read(model, tmp_path, monkeypatch):
    """MLflow would read them all to compare the requirements with what is installed."""
    read = []
    for name in ("_init_modules_to_packages_map", "_init_packages_to_modules_map"):
        monkeypatch.setattr(mlflow.utils.requirements_utils, name, lambda: read.append(1))
    made = P.package(model, RUN, CLASSES, {}, 1.0, tmp_path / "model")
    P.load(str(made))
    assert not read
    mlflow.pyfunc.load_model(str(made))  # as others load it: it does compare
    assert read


@pytest.fixture(scope="module")
def loaded(folder):
    return P.load(str(folder))


@pytest.mark.parametrize(
    ("height", "width"),
    [(40, 40), (33, 90), (90, 33), (500, 331), (1200, 900), (257, 2000), (20, 31)],
)
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95, "subsampling": 0},
        {"quality": 75, "subsampling": 2},
        {"quality": 60, "subsampling": 1, "progressive": True},
    ],
)
def test_pixels_are_those_of_evaluation_bit_for_bit(height, width, options):
    jpeg = encoded(photo(height, width), **options)
    for size, crop, mode in ((32, 0.8, "bilinear"), (64, 0.875, "bicubic"), (48, 1.0, "bicubic")):
        meta = {
            "size": size,
            "short": max(size, round(size / crop)),
            "interpolation": mode,
            **P.picture_rules({}),
        }
        np.testing.assert_array_equal(
            code.pictures.Preprocessing(meta)(jpeg), EvalTransform(size, crop, mode)(jpeg)
        )


def test_probabilities_are_those_of_the_model_in_any_batch(model, loaded):
    jpegs = [encoded(photo(40 + i, 50, seed=i)) for i in range(67)]
    transform = EvalTransform(32, 0.8)
    images = torch.from_numpy(np.stack([transform(j) for j in jpegs]))
    with torch.inference_mode():
        logits = model(normalize(images, RUN.data.mean, RUN.data.std))
    expected = torch.softmax(logits.double() / 1.7, dim=1).numpy()
    answers = loaded.predict(jpegs, params={"top_k": len(CLASSES)})
    got = np.array(
        [
            [next(t["probability"] for t in a["top"] if t["class"] == c) for c in CLASSES]
            for a in answers
        ]
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert [a["class"] for a in answers] == [CLASSES[i] for i in logits.argmax(1)]
    assert [a["class"] for a in answers[:3]] == [loaded.predict([j])[0]["class"] for j in jpegs[:3]]
    assert all(a["top"] == sorted(a["top"], key=lambda t: -t["probability"]) for a in answers)


def test_no_file_names_the_folders_of_this_machine(folder):
    names = [str(pathlib.Path(module.__file__).parents[1]).encode() for module in (P, torch)]
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        contents = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                contents += [parts.read(part) for part in parts.namelist()]
        assert not [n for n in names for data in contents if n in data], file


def test_bytes_path_and_base64_are_the_same_picture(loaded, tmp_path):
    jpeg = encoded(photo(60, 60))
    (tmp_path / "a.jpg").write_bytes(jpeg)
    text = base64.b64encode(jpeg).decode()
    forms = [
        jpeg,
        tmp_path / "a.jpg",
        text,
        f"data:image/jpeg;base64,{text}",
        base64.encodebytes(jpeg).decode(),
    ]
    answers = loaded.predict(forms, params={"top_k": 2})
    assert all(a == answers[0] for a in answers) and len(answers[0]["top"]) == 2


def test_a_text_is_never_read_as_a_path(loaded, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(photo(40, 40)))
    with pytest.raises(Exception, match="not base64"):
        loaded.predict([str(tmp_path / "a.jpg")])


def test_kind_orientation_alpha_and_depth_do_not_change_the_answer(loaded):
    upright = photo(48, 64)
    sure = loaded.predict([encoded(upright, "PNG")])[0]
    assert loaded.predict([encoded(upright, "BMP")])[0] == sure
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: stored lying, shown upright
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert loaded.predict([turned])[0] == sure
    clear = upright.convert("RGBA")
    clear.putalpha(0)
    white = encoded(Image.new("RGB", upright.size, "white"), "PNG")
    assert loaded.predict([encoded(clear, "PNG")])[0] == loaded.predict([white])[0]
    grey = np.asarray(upright.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (
        loaded.predict([encoded(deep, "PNG")])[0]
        == loaded.predict([encoded(Image.fromarray(grey), "PNG")])[0]
    )


def bomb():
    """A PNG header that claims 10,000 x 10,000 pixels."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    data[16:24] = (10_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (b"", "the file has no bytes"),
        (b"<html>404</html>", "an HTML page"),
        (encoded(photo(200, 200))[:2000], "damaged"),
        (bomb(), "megapixels, more than 50"),
        (
            encoded(photo(20, 20), "GIF", save_all=True, append_images=[photo(20, 20, 1)]),
            "more than one frame",
        ),
        ("not base64!", "not base64"),
        (17, "not int"),
        (pathlib.Path("/nowhere/a.jpg"), "cannot be read"),
    ],
)
def test_files_that_are_no_pictures_are_explained(loaded, picture, says):
    good = encoded(photo(40, 40))
    with pytest.raises(Exception, match=rf"picture 1: .*{says}"):
        loaded.predict([good, picture])
    rows = loaded.predict([good, picture, good], params={"on_error": "row"})
    assert says in rows[1]["error"] and rows[0] == rows[2] and "class" in rows[0]


def test_pictures_are_read_as_the_data_set_was_prepared(model, tmp_path):
    rules = {"background": [255, 0, 0], "depth_bits": 12, "max_megapixels": 0.001, "tiles": True}
    data = {"name": "zoo", "digest": "0", "rules": rules}
    folder = P.package(model, RUN, CLASSES, {}, 1.0, tmp_path / "model", data=data)
    packaged = P.load(str(folder)).unwrap_python_model()
    clear = encoded(Image.new("RGBA", (20, 20), (0, 255, 0, 0)), "PNG")
    assert (packaged.prepare(clear) == (255, 0, 0)).all()
    bright = encoded(Image.fromarray(np.full((20, 20), 4095, np.uint16)), "PNG")
    assert (packaged.prepare(bright) == 255).all()
    dark = encoded(Image.fromarray(np.full((20, 20), 255, np.uint16)), "PNG")
    assert (packaged.prepare(dark) == 16).all()
    with pytest.raises(ValueError, match=r"more than 0\.001"):
        packaged.prepare(encoded(photo(40, 40)))
    assert packaged.meta["data"] == {"name": "zoo", "digest": "0"}


def test_two_packages_keep_their_own_way_of_reading_pictures(folder, loaded, tmp_path):
    """A later version of `picture.py` does not change what an older package sees."""
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    source = (other / "picture.py").read_text("utf-8")
    (other / "picture.py").write_text(
        source.replace("MAX_MEGAPIXELS = 50.0", "MAX_MEGAPIXELS = 1.0")
    )
    meta = json.loads((other / "artifacts" / "meta.json").read_text())
    del meta["max_megapixels"]
    (other / "artifacts" / "meta.json").write_text(json.dumps(meta))
    large = encoded(photo(1100, 1100))
    with pytest.raises(ValueError, match="more than 1"):
        P.load(str(other)).unwrap_python_model().prepare(large)
    assert loaded.unwrap_python_model().prepare(large).shape == (32, 32, 3)


def test_impossible_parameters_are_refused(loaded):
    with pytest.raises(Exception, match="top_k must be 1 or more"):
        loaded.predict([P.example()], params={"top_k": 0})


ALONE = """
import io, json, pickle, sys
def refuse(*a, **k): raise AssertionError("something was unpickled")
import mlflow, torch
torch.load = pickle.load = pickle.loads = refuse
sys.modules["ftlib"] = None  # installed or not, it cannot be imported
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict([open(sys.argv[2], "rb").read()], params={"top_k": 3})))
assert not {"torchvision", "timm"} & set(sys.modules)
"""


def answer_alone(folder, jpeg, cwd):
    """What a copy of the package answers in a process that finds no ftlib."""
    (cwd / "a.jpg").write_bytes(jpeg)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(folder), str(cwd / "a.jpg")],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_package_of_a_timm_model_needs_no_timm(tmp_path):
    torch.manual_seed(0)
    run = replace(RUN, model=Model(arch="timm/test_vit"), augment=Augment(size=160))
    model = models.build(run.model, len(CLASSES)).eval()
    folder = P.package(model, run, CLASSES, {}, 1.0, tmp_path / "model")
    jpeg = encoded(photo(200, 180))
    pixels = P.load(str(folder)).unwrap_python_model().prepare(jpeg)
    with torch.inference_mode():
        scale = normalize(torch.tensor(pixels)[None], run.data.mean, run.data.std)
        expected = torch.softmax(model(scale).double(), 1)[0]
    (answer,) = answer_alone(folder, jpeg, tmp_path)
    for entry in answer["top"]:
        assert entry["probability"] == pytest.approx(
            float(expected[CLASSES.index(entry["class"])]), abs=1e-5
        )
    assert f"{P.size_bytes(folder / 'artifacts') / 1e6:.0f}" != "0"
    assert " MB and runs on a CPU" in (folder / "README.md").read_text()


def test_a_copied_package_works_in_a_fresh_process_without_ftlib_and_without_pickle(
    folder, loaded, tmp_path
):
    shutil.copytree(folder, tmp_path / "elsewhere")
    jpeg = encoded(photo(50, 50))
    answer = answer_alone(tmp_path / "elsewhere", jpeg, tmp_path)
    assert answer == loaded.predict([jpeg], params={"top_k": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "elsewhere"], (
        "loading left files behind"
    )


def test_nothing_in_it_is_a_pickle_and_nothing_names_this_machine(folder):
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert path.suffix not in {".pkl", ".pt", ".pth", ".joblib"}
        if path.suffix != ".pt2":
            assert str(folder.parent).encode() not in path.read_bytes(), path
    with zipfile.ZipFile(folder / "artifacts" / "program.pt2") as archive:
        for entry in archive.infolist():
            assert not archive.read(entry).startswith(
                (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
            ) or entry.filename.startswith("archive/data/weights/")
        assert not archive.read("archive/data/sample_inputs/model.pt")


def test_a_program_with_a_smuggled_pickle_is_not_loaded(folder, tmp_path):
    source, target = folder / "artifacts" / "program.pt2", tmp_path / "program.pt2"
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w") as b:
        for entry in a.infolist():
            b.writestr(
                entry.filename,
                b"\x80\x04N." if "sample_inputs" in entry.filename else a.read(entry),
            )
    with pytest.raises(ValueError, match="a pickle can run any code"):
        code.program(target)


def test_the_weights_file_loads_into_the_model(folder, model):
    again = models.build(RUN.model, len(CLASSES))
    again.load_state_dict(load_file(folder / "artifacts" / "model.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values())
    )


def test_the_card_and_the_metadata_say_what_it_is(folder):
    text = (folder / "README.md").read_text()
    for word in (
        "zoo",
        "0123456789ab",
        "91.23",
        "resnet18",
        "gnu",
        "1.7",
        "1,000 images",
        "## Limits",
        "32 x 32",
    ):
        assert word in text
    meta = json.loads((folder / "artifacts" / "meta.json").read_text())
    assert meta["recipe"]["augment"]["size"] == 32 and meta["scores"]["val/top1"] == 91.2345
    assert (
        "torch==" in (folder / "requirements.txt").read_text()
        and "+" not in (folder / "requirements.txt").read_text()
    )


def test_the_serving_example_of_the_package_is_classified(folder, loaded):
    """What `mlflow models serve` is sent: base64 texts."""
    body = json.loads((folder / "serving_input_example.json").read_text())
    answers = loaded.predict(body["inputs"], params=body["params"])
    assert answers == loaded.predict([P.example()])


def test_an_occupied_folder_and_a_missing_package_are_explained(folder, model, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        P.package(model, RUN, CLASSES, {}, 1.0, folder)
    with pytest.raises(ValueError, match="cannot be loaded as a packaged model"):
        P.load(str(tmp_path))


def test_every_write_of_a_package_may_fail(model, tmp_path, monkeypatch):
    """Each file in turn, MLflow's own too: nothing is left at its place but a whole package."""
    program = P.export(model, RUN)
    monkeypatch.setattr(P, "export", lambda *_: program)  # most of the time
    faults = FailingWrites(monkeypatch, opens=tmp_path)

    def make(name):
        out = tmp_path / name / "model"
        return P.package(model, RUN, CLASSES, {}, 1.0, out)

    expected = set(whole(make("whole")))
    writes = faults.count
    assert writes > 10 and {"MLmodel", "artifacts/model.safetensors", "README.md"} <= expected
    for first in range(writes):
        faults.count, faults.wanted = 0, lambda number, _, k=first: number == k
        try:
            made = make(f"{first}")
        except StorageError as error:
            assert "the disk is full" in str(error)
            left = [str(p) for p in (tmp_path / f"{first}").rglob("*")]
            assert not left, f"write {first} of {writes} failed"
        else:
            assert set(whole(made)) == expected, f"write {first} of {writes} failed"
