"""A small prepared set and a folder of a run with a model, made in seconds without a training."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ftlib.config import Augment, Data, Evaluate, Model, Run, Train
from ftlib.data.shards import Dataset
from ftlib.preparation.prepare import prepare
from ftlib.settings import to_dict
from ftlib.training import models
from ftlib.training.checkpoint import CheckpointWriter
from ftlib.training.evaluate import normalize

CLASSES = ("disc", "frame", "stripes")


def drawing(kind: str, rng: np.random.Generator, side: int = 40) -> np.ndarray:
    """uint8[side, side, 3]: a shape in a random colour on noise."""
    image = rng.integers(60, 120, (side, side, 3)).astype(np.uint8)
    colour = rng.integers(160, 256, 3).astype(np.uint8)
    y, x = np.mgrid[:side, :side]
    cy, cx = rng.integers(15, side - 15, 2)
    inside = {
        "disc": (y - cy) ** 2 + (x - cx) ** 2 < 90,
        "frame": np.maximum(abs(y - cy), abs(x - cx)) // 3 == 3,
        "stripes": (x + cx) % 8 < 3,
    }[kind]
    image[inside] = colour
    return image


def folders(root: Path, train: int = 12, val: int = 10, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(drawing(kind, rng)).save(folder / f"{i:03d}.jpg", quality=92)
    return root


def dataset(root: Path, **kwargs) -> Dataset:
    return prepare(
        folders(root / "pictures", **kwargs),
        root / "shapes",
        engine="local",
        workers=1,
        progress=False,
    ).dataset


def run_folder(
    root: Path, data: Dataset, steps: int = 8, name: str = "shapes-run", **changes
) -> Path:
    """A run's folder as training leaves it: run.json, best/ and result.json."""
    run = Run(
        name=name,
        stage="phase1",
        data=Data(path=data.path, **changes),
        augment=Augment(size=32),
        evaluate=Evaluate(crop=0.8, batch_size=16),
        model=Model(arch="resnet18"),
        train=Train(epochs=1),
    )
    torch.manual_seed(0)
    model = models.build(run.model, len(data.classes))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    from ftlib.data.augment import EvalTransform

    transform, split = EvalTransform(32, 0.8), data.split("train")
    images = normalize(
        torch.from_numpy(np.stack([transform(split.image(i)) for i in range(len(split))])),
        run.data.mean,
        run.data.std,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.from_numpy(split.labels)).backward()
        optimizer.step()
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    about = {
        "arch": run.model.arch,
        "classes": list(data.classes),
        "size": 32,
        "crop": 0.8,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "epoch": 1,
        "step": steps,
        "scores": {"val/top1": 0.0},
        "data": {"name": data.name, "digest": data.digest},
        "run": name,
        "stage": "phase1",
        "ema": False,
    }
    writer = CheckpointWriter(str(folder), 2, 1)
    writer.save_best(steps, model.state_dict(), about)
    averaged = {
        k: v * 0 if v.is_floating_point() else v for k, v in model.state_dict().items()
    }  # an average that is easily told apart
    writer.save(
        steps,
        {"model": model.state_dict(), "ema": {"module": averaged, "updates": 1}, "step": steps},
    )
    writer.wait()
    writer.close()
    (folder / "run.json").write_text(
        json.dumps(
            {
                "run": to_dict(run),
                "fingerprint": "0",
                "data": {"name": data.name, "digest": data.digest, "classes": list(data.classes)},
                "init": None,
                "mlflow": None,
            }
        )
    )
    (folder / "result.json").write_text(
        json.dumps(
            {
                "status": "completed",
                "epochs": 1,
                "step": steps,
                "metrics": {},
                "best": f"best/step-{steps:08d}",
            }
        )
    )
    return folder
