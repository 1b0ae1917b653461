"""A trained model as an MLflow model that anyone can load: no ftlib, no pickle, preprocessing inside.

A package is a folder: `MLmodel`, `image_classifier.py` (a models-from-code pyfunc) and `picture.py`
(how files become pixels), `artifacts/program.pt2` (torch.export), `artifacts/meta.json`, `artifacts/model.safetensors` (torchvision's keys, for training on and for other tools), and `README.md`, the
model card. torch.export files are tied to the torch that reads them; the safetensors file is what outlives it.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ftlib import picture
from ftlib.config import Run
from ftlib.settings import to_dict

logging.getLogger("mlflow.types.type_hints").setLevel(
    logging.ERROR
)  # pictures of several forms are described by a union, on purpose
with warnings.catch_warnings():  # mlflow.pyfunc warns about its own type hints while it is imported
    warnings.simplefilter("ignore")
    import mlflow.models
    import mlflow.pyfunc

    from ftlib.packaging import image_classifier

BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
CODE = Path(image_classifier.__file__)
PICTURE_CODE = Path(picture.__file__)
REQUIREMENTS = ("torch", "numpy", "pillow", "pandas", "mlflow")
"""What a package needs, pinned to the versions it was made with."""


class PackageError(ValueError):
    """A package that cannot be written or read; the message says why and what to do."""


class Program(nn.Module):
    """A classifier from pixels: uint8[b, S, S, 3] -> logits float32[b, C], normalisation included."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std)]))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(
            torch.addcmul(self.shift, images.to(torch.float32), self.scale).permute(0, 3, 1, 2)
        )


def evaluation_size(run: Run) -> tuple[int, int]:
    """(side of the model's input, length the shorter side of a picture is resized to), in pixels."""
    size = run.eval_size
    return size, max(size, round(size / run.evaluate.crop))


def export(model: nn.Module, run: Run) -> torch.export.ExportedProgram:
    """The model with its normalisation for the run's evaluation size and any batch size, on the CPU in float32."""
    size, _ = evaluation_size(run)
    example = torch.zeros(
        2, size, size, 3, dtype=torch.uint8
    )  # a batch of one would freeze the batch size at one
    program = torch.export.export(
        Program(model, run.data.mean, run.data.std),
        (example,),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    program.example_inputs = None  # they would be written as a pickle
    return program


def package(
    model: nn.Module,
    run: Run,
    classes: Sequence[str],
    scores: Mapping[str, float],
    temperature: float,
    out: Path,
    data: Mapping[str, Any] | None = None,
    calibrated_on: str = "",
) -> Path:
    """Write the package to the folder `out` (which must not exist or be empty) and return it.

    scores: metric name -> value, for the card and the metadata. temperature: what logits are divided
    by (1 for none), fitted on `calibrated_on`. data: name and digest of the training data, and
    `rules`, the options it was prepared with: pictures are then read in the same way.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise PackageError(f"{out} is not empty. A package needs a folder of its own")
    size, short = evaluation_size(run)
    meta = {
        "classes": list(classes),
        "size": size,
        "short": short,
        "temperature": temperature,
        **picture_rules(data or {}),
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "arch": run.model.arch,
        "run": run.name,
        "data": {key: value for key, value in (data or {}).items() if key != "rules"},
        "scores": {k: float(v) for k, v in scores.items()},
        "recipe": to_dict(run),
    }
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        torch.export.save(export(model, run), str(here / "program.pt2"))
        (here / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
            here / "model.safetensors",
            metadata={"arch": run.model.arch, "classes": json.dumps(list(classes))},
        )
        with _quiet():
            mlflow.pyfunc.save_model(
                path=str(out),
                python_model=str(CODE),
                pip_requirements=[f"{name}=={_release(name)}" for name in REQUIREMENTS],
                artifacts={
                    "program": str(here / "program.pt2"),
                    "meta": str(here / "meta.json"),
                    "weights": str(here / "model.safetensors"),
                },
                input_example=([example()], {"top_k": 5, "on_error": "raise"}),
                metadata={"arch": run.model.arch, "classes": len(classes), "input_size": size},
            )
    _forget_paths(out)
    shutil.copyfile(PICTURE_CODE, out / "picture.py")
    (out / "README.md").write_text(
        card(run, classes, scores, temperature, data or {}, calibrated_on), "utf-8"
    )
    return out


def picture_rules(data: Mapping[str, Any]) -> dict[str, Any]:
    """How a package reads pictures: as the data set was prepared (`ftlib.picture.Rules`, JSON)."""
    prepared: Mapping[str, Any] = data.get("rules") or {}
    rules = picture.Rules()._asdict()
    rules.update({name: prepared[name] for name in rules if prepared.get(name) is not None})
    return rules


def example() -> bytes:
    """A small JPEG that shows what goes in."""
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(
        np.stack(
            [
                np.tile(ramp, (32, 1)),
                np.tile(ramp[:, None], (1, 32)),
                np.full((32, 32), 128, np.uint8),
            ],
            axis=-1,
        )
    ).save(buffer, "JPEG")
    return buffer.getvalue()


def load(uri: str, tracking: str = "") -> Any:
    """The packaged model at a folder, `models:/NAME@ALIAS`, `models:/m-...` or `runs:/...` (an mlflow PyFuncModel). `tracking` is the
    MLflow tracking URI to ask for names.

    Raises PackageError naming what is missing.
    """
    try:
        if tracking:
            mlflow.set_tracking_uri(tracking)
        with _quiet():
            return mlflow.pyfunc.load_model(uri)
    except (mlflow.exceptions.MlflowException, OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PackageError(
            f"{uri} cannot be loaded as a packaged model: {first}. Name a package's folder, or models:/NAME@ALIAS of the tracking server"
        ) from error


def check(uri: str, tracking: str = "") -> None:
    """PackageError unless there is a package at the address; reads its description only, not the weights."""
    try:
        if tracking:
            mlflow.set_tracking_uri(tracking)
        mlflow.models.get_model_info(uri)
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PackageError(
            f"{uri} is no packaged model: {first}. Name a package's folder, or models:/NAME@ALIAS of the tracking server"
        ) from error


def _release(name: str) -> str:
    """The version without a local part such as +cpu, which no index has."""
    return version(name).partition("+")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice and no progress bars from mlflow: inputs are described by their type hint on purpose, the requirements are pinned."""
    loggers = [
        logging.getLogger(name)
        for name in ("mlflow.pyfunc", "mlflow.models", "mlflow.types.type_hints", "mlflow.utils")
    ]
    levels = [logger.level for logger in loggers]
    bar = os.environ.get(BAR)
    os.environ[BAR] = "false"
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\.")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        os.environ.pop(BAR)
        if bar is not None:
            os.environ[BAR] = bar


def _forget_paths(out: Path) -> None:
    """mlflow writes the absolute paths of the machine into MLmodel; loading does not need them."""
    described = mlflow.models.Model.load(str(out))
    flavor = described.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    described.save(str(out / "MLmodel"))
    shutil.rmtree(out / "__pycache__", ignore_errors=True)


def card(
    run: Run,
    classes: Sequence[str],
    scores: Mapping[str, float],
    temperature: float,
    data: Mapping[str, Any],
    calibrated_on: str,
) -> str:
    """The model card (Mitchell et al. 2019), Markdown."""
    size, short = evaluation_size(run)
    shown = ", ".join(list(classes)[:30]) + (
        f" and {len(classes) - 30} more (meta.json)" if len(classes) > 30 else ""
    )
    dataset = (
        f"{data['name']} (digest {str(data.get('digest', ''))[:12]})"
        if data.get("name")
        else run.data.path or "not recorded"
    )
    mixing = (
        ", ".join(
            f"{name} alpha {alpha:g}"
            for name, alpha in (("Mixup", run.mix.mixup_alpha), ("CutMix", run.mix.cutmix_alpha))
            if alpha
        )
        or "none"
    )
    policy = (
        "TrivialAugment"
        if run.augment.trivialaugment
        else f"RandAugment N {run.augment.randaugment_n}, M {run.augment.randaugment_m:g}"
        if run.augment.randaugment_n
        else "crop, flip, colour jitter"
    )
    ema = (
        f", exponential moving average of the weights (decay {run.train.ema_decay:g})"
        if run.train.ema_decay
        else ""
    )
    lines = [
        f"# {run.name or run.stage}: {run.model.arch} for {len(classes)} classes",
        "",
        "## Use",
        "```python",
        "import mlflow",
        'model = mlflow.pyfunc.load_model("THIS FOLDER, OR models:/NAME@ALIAS")',
        'model.predict([open("picture.jpg", "rb").read()], params={"top_k": 3})',
        "```",
        "Pictures go in as bytes, `pathlib.Path` or base64 text; class names and probabilities come out.",
        "",
        "## Classes",
        shown,
        "",
        "## Data",
        f"Trained on {dataset}"
        + (
            f", {run.data.subset:.0%} of it (stratified, seed {run.data.subset_seed})."
            if run.data.subset < 1
            else "."
        ),
        "",
        "## Recipe",
        f"{run.train.epochs} epochs at {run.augment.size} px, batch {run.train.batch_size}, {type(run.optimizer).__name__} (lr {run.optimizer.lr:g}), "
        f"{type(run.schedule).__name__}, {type(run.loss).__name__}; augmentation: {policy}; mixing: {mixing}; dropout {run.model.dropout:g}; started from {run.model.init_from}{ema}. "
        "The whole recipe is in `artifacts/meta.json`.",
        "",
        "## Scores",
        *(f"- {name}: {value:.4g}" for name, value in scores.items()),
        "",
        "## Preprocessing",
        f"The shorter side is resized to {short} px (antialiased, aspect ratio kept), the central {size} x {size} px are used. Transparent pictures are laid on a background.",
        "",
        "## Probabilities",
        f"Softmax of the logits divided by {temperature:.4g}"
        + (f", fitted on {calibrated_on}." if calibrated_on else "."),
        "",
        "## Limits",
        "- It always names one of the classes above, also for pictures of anything else; a low probability is a hint, not a proof, that a picture is foreign.",
        "- The scores hold for pictures like those of the data above. Other cameras, places, crops or qualities can be worse, and the probabilities are then too sure.",
        "- Only the centre of a picture is seen: what lies at the far ends of a wide or tall one is cut off.",
        "- Scores per class and the worst mistakes are in the run's report; look at them before relying on a class.",
    ]
    return "\n".join(lines) + "\n"
