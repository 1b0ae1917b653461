"""The worst mistakes of an epoch, and what MLflow makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from ftlib.config import Augment, Run
from ftlib.training.worst_images import SHOWN, Losses, sheet

RUN = Run(augment=Augment(size=32))


def add(losses, rows, labels, logits):
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    losses.add(rows, labels, logits.argmax(1), nll)


def filled(logits, labels, batch=7):
    losses = Losses()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        rows = torch.arange(len(labels))[part] + 100
        add(losses, rows, labels[part], logits[part])
    return losses


def test_the_worst_are_the_mistakes_with_the_least_probability_of_the_true_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    probability = logits.softmax(1)[torch.arange(60), labels]
    wrong = [i for i in range(60) if logits[i].argmax() != labels[i]]
    expected = sorted(wrong, key=lambda i: float(probability[i]))[:SHOWN]
    found = filled(logits, labels).worst()
    assert [row - 100 for row, *_ in found] == expected
    for row, nll, label, answer in found:
        i = row - 100
        assert np.exp(-nll) == pytest.approx(float(probability[i]), rel=1e-5)
        assert (label, answer) == (int(labels[i]), int(logits[i].argmax()))


def test_a_sheet_shows_the_pictures_of_the_mistakes(shapes):
    split = shapes.split("val")
    labels = torch.tensor(split.labels[:3].astype(np.int64))
    answers = (labels + 1) % 3
    losses = Losses()
    add(losses, torch.arange(3), labels, torch.eye(3)[answers] * 5)
    page = sheet(losses, split, shapes.classes, RUN)
    assert page.mode == "RGB" and page.width > page.height > 128
    assert np.asarray(page)[20:120, 20:120].std() > 5  # a picture, not paper


def test_without_mistakes_there_is_no_sheet(shapes):
    labels = torch.tensor([0, 1, 2])
    losses = Losses()
    add(losses, torch.arange(3), labels, torch.eye(3) * 5)
    assert sheet(losses, shapes.split("val"), shapes.classes, RUN) is None
    assert sheet(Losses(), shapes.split("val"), shapes.classes, RUN) is None


def test_an_evaluation_remembers_each_of_its_images_and_counts_as_before(shapes):
    from ftlib.data.loader import eval_batches
    from ftlib.training import models
    from ftlib.training.evaluate import count

    torch.manual_seed(0)
    model = models.build(RUN.model, 3).eval()
    kinds = {"classes": 3, "device": torch.device("cpu"), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    rows = np.arange(len(shapes.split("val")))

    def scored(losses):
        batches = eval_batches(
            shapes.split("val"), rows, size=32, crop=1.0, batch_size=8, workers=0
        )
        return count(model, batches, remember=losses, **kinds)

    losses = Losses()
    counts, plain = scored(losses), scored(None)
    assert (counts.top1, counts.loss) == (plain.top1, plain.loss)
    mistakes = counts.images - counts.top1
    assert len(losses.worst()) == min(SHOWN, mistakes)
    assert all(shapes.split("val").labels[row] == label for row, _, label, _ in losses.worst())


def test_mlflow_finds_the_pictures_of_each_step(tmp_path, monkeypatch):
    """By the file names and the tag of its own log_image."""
    from mlflow import MlflowClient

    from ftlib.track.writer import JournalLocation, Writer, machine_id

    theirs = []
    client = MlflowClient("http://127.0.0.1:9")  # never asked
    monkeypatch.setattr(client, "_log_artifact_helper", None)
    monkeypatch.setattr(
        client, "_log_artifact_async_helper", lambda run, path, image: theirs.append(path)
    )
    monkeypatch.setattr(client, "set_tag", lambda run, key, value, synchronous: tags.append(key))
    tags = []
    picture = Image.new("RGB", (40, 30), "red")
    client.log_image("0", picture, key="worst", step=3, timestamp=3, synchronous=False)

    (tmp_path / "journal").mkdir()
    location = JournalLocation(str(tmp_path / "journal"), machine_id())
    for _ in range(2):
        Writer(location, "run.jsonl").image(picture, "worst", 3)
    files = sorted((tmp_path / "journal" / "files").rglob("*.*p*"))
    names = {f"images/{file.name}" for file in files}
    assert len(files) == 4 and len(names) == 2, "given again, it replaces the first"

    def shape(path):
        head, _, rest = path.partition("+timestamp+3+")
        return head, rest[36:]  # without the random part

    assert {shape(n) for n in names} == {shape(p) for p in theirs}
    assert tags == ["mlflow.loggedImages"]
    assert "mlflow.loggedImages" in (tmp_path / "journal" / "run.jsonl").read_text()
