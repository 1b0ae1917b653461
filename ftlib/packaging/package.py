"""Packages a trained model as an MLflow model that anyone can load: no ftlib and no pickle needed.

A package is a folder: `MLmodel`, `image_classifier.py` (a models-from-code pyfunc), `picture.py`
(how files become pixels), `artifacts/program.pt2` (torch.export, preprocessing inside),
`artifacts/meta.json`, `artifacts/model.safetensors` (the weights under the model library's names,
for training on and for other tools) and `README.md`, the model card. torch.export files are tied
to the torch that reads them; the safetensors file outlives it.
"""

from __future__ import annotations

import copy
import errno
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
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ftlib import picture, storage
from ftlib.config import Run
from ftlib.packaging.model_card import evaluation_size, model_card
from ftlib.settings import to_dict
from ftlib.track.store import ensure_store, first_line, reach, resolve_uri

# Pictures of several forms are described by a union, on purpose.
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)
with warnings.catch_warnings():  # mlflow.pyfunc warns about its own type hints while it is imported
    warnings.simplefilter("ignore")
    import mlflow.models
    import mlflow.pyfunc
    import mlflow.utils.environment

    from ftlib.packaging import image_classifier

PROGRESS_BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
CODE = Path(image_classifier.__file__)
PICTURE_CODE = Path(picture.__file__)
REQUIREMENTS = ("torch", "numpy", "pillow", "pandas", "mlflow")
"""What a package needs, pinned to the versions it was made with."""


class PackageError(ValueError):
    """A package that cannot be written or read; the message says why and what to do."""


Prediction = TypedDict(
    "Prediction", {"class": str, "probability": float, "top": list[dict[str, Any]]}
)
"""Of one picture: its most probable class, and the `top_k` most probable ones with theirs."""


class PackagedModel(Protocol):
    """A loaded package: MLflow's PyFuncModel, as far as it is used here."""

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[Prediction]:
        """One entry per picture; see `ftlib.packaging.image_classifier`."""

    def unwrap_python_model(self) -> image_classifier.ImageClassifier:
        """The classifier itself."""


class Program(nn.Module):
    """A classifier of pixels: uint8[b, S, S, 3] -> logits float32[b, C], normalization inside."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std)]))

    def forward(self, images: Tensor) -> Tensor:
        normalized = torch.addcmul(self.shift, images.to(torch.float32), self.scale)
        logits: Tensor = self.model(normalized.permute(0, 3, 1, 2))
        return logits


def export(model: nn.Module, run: Run) -> torch.export.ExportedProgram:
    """The model with its normalization as a program for the CPU in float32.

    It takes the run's evaluation size and any batch size.
    """
    size, _ = evaluation_size(run)
    # Two images: an example of one would freeze the batch size at one.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    program = torch.export.export(
        Program(model, run.data.mean, run.data.std),
        (example,),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    program.example_inputs = None  # they would be written as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names this machine's folders
    return program


def serialized(program: torch.export.ExportedProgram) -> bytes:
    """An exported program as a file's bytes. On a full disk torch's own writer of files does not
    raise, it ends the process."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


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
    """Write the package to the folder `out` and return it.

    Args:
        scores: metric name -> value, for the card and the metadata.
        temperature: what logits are divided by; 1 leaves them as they are.
        out: must not exist or be empty.
        data: name and digest of the training data, and `rules`, the options it was prepared with:
            pictures are then read in the same way.
        calibrated_on: what the temperature was fitted on, for the card.

    Raises:
        PackageError: `out` is not empty.
        StorageError: it cannot be written; nothing is left at `out`.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise PackageError(f"{out} is not empty. A package needs a folder of its own: name another")
    meta = _metadata(run, classes, scores=scores, temperature=temperature, data=data or {})
    # Made beside its place, then moved there: what stands at `out` is whole.
    with _explained(out), _temporary_folder(out.parent) as folder:
        here, made = Path(folder), Path(folder) / "package"
        (here / "program.pt2").write_bytes(serialized(export(model, run)))
        (here / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        about = {"arch": run.model.arch, "classes": json.dumps(list(classes))}
        (here / "model.safetensors").write_bytes(save(weights, about))
        with _quiet():
            mlflow.pyfunc.save_model(
                path=str(made),
                python_model=str(CODE),
                pip_requirements=[f"{name}=={_release(name)}" for name in REQUIREMENTS],
                artifacts={
                    "program": str(here / "program.pt2"),
                    "meta": str(here / "meta.json"),
                    "weights": str(here / "model.safetensors"),
                },
                input_example=([example()], {"top_k": 5, "on_error": "raise"}),
                metadata={
                    "arch": run.model.arch,
                    "classes": len(classes),
                    "input_size": meta["size"],
                },
            )
        _forget_paths(made)
        shutil.copyfile(PICTURE_CODE, made / "picture.py")
        text = model_card(
            run,
            classes,
            scores=scores,
            temperature=temperature,
            data=data or {},
            calibrated_on=calibrated_on,
            program_bytes=(made / "artifacts" / "program.pt2").stat().st_size,
        )
        (made / "README.md").write_text(text, "utf-8")
        _move(made, out)
    return out


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[str]:
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".tmp-") as folder:
        yield folder


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn errors of the disk, also where MLflow hides them, into a StorageError on `out`."""
    try:
        yield
    except (OSError, mlflow.exceptions.MlflowException) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise storage.StorageError(storage.explain(str(out), cause)) from error


def _move(made: Path, out: Path) -> None:
    """Give a finished package its name; of one that cannot be whole, nothing is left."""
    try:
        if out.exists():
            out.rmdir()
        made.rename(out)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        try:  # a volume is mounted there
            shutil.copytree(made, out, dirs_exist_ok=True)
        except BaseException:
            for entry in out.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a package."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _metadata(
    run: Run,
    classes: Sequence[str],
    *,
    scores: Mapping[str, float],
    temperature: float,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """meta.json: what the classifier needs, and what the model is."""
    size, short = evaluation_size(run)
    return {
        "classes": list(classes),
        "size": size,
        "short": short,
        "interpolation": run.evaluate.interpolation,
        "temperature": temperature,
        **picture_rules(data),
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "arch": run.model.arch,
        "run": run.name,
        "data": {key: value for key, value in data.items() if key != "rules"},
        "scores": {k: float(v) for k, v in scores.items()},
        "recipe": to_dict(run),
    }


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


def locate(address: str, tracking_uri: str = "") -> tuple[str, str]:
    """(the model's address, the tracking address to ask for it or "") from what a user wrote.

    `models:/...` and `runs:/...` are asked of the first that is given: `tracking_uri`,
    $MLFLOW_TRACKING_URI, the database below $FTLIB_HOME; registered names of $MLFLOW_REGISTRY_URI
    if it is set. Anything else is a folder, which becomes absolute.

    Raises:
        TrackingError: the store cannot be reached.
    """
    if not address.startswith(("models:/", "runs:/")):
        return str(Path(address).expanduser().absolute()), ""
    tracking = resolve_uri(tracking_uri)
    ensure_store(tracking)
    reach(tracking)
    return address, tracking


def load(uri: str, tracking: str = "") -> PackagedModel:
    """The packaged model at a folder, `models:/NAME@ALIAS`, `models:/m-...` or `runs:/...`.

    Args:
        tracking: the MLflow tracking address to ask for names.

    Raises:
        PackageError: with what is missing.
    """
    try:
        if tracking:
            mlflow.set_tracking_uri(tracking)
        with _quiet():
            loaded: PackagedModel = mlflow.pyfunc.load_model(uri, suppress_warnings=True)
            return loaded
    except (mlflow.exceptions.MlflowException, OSError, ValueError, RuntimeError) as error:
        raise PackageError(
            f"{uri} cannot be loaded as a packaged model: {first_line(error)}. {_ADDRESSES}"
        ) from error


def check(uri: str, tracking: str = "") -> None:
    """Raise PackageError unless there is a package; reads its description, not the weights."""
    try:
        if tracking:
            mlflow.set_tracking_uri(tracking)
        mlflow.models.get_model_info(uri)
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        raise PackageError(
            f"{uri} is no packaged model: {first_line(error)}. {_ADDRESSES}"
        ) from error


_ADDRESSES = "Name a package's folder, or models:/NAME@ALIAS of the tracking server"


def _release(name: str) -> str:
    """The version without a local part such as +cpu, which package indexes do not have."""
    return version(name).partition("+")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MLflow's advice and progress bars.

    Inputs are described by their type hint on purpose, and the requirements are pinned to what is
    installed. Comparing the two, MLflow would read the file lists of all installed packages.
    """
    environment = mlflow.utils.environment
    checks = environment.warn_dependency_requirement_mismatches
    names = ("mlflow.pyfunc", "mlflow.models", "mlflow.types.type_hints", "mlflow.utils")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bar = os.environ.get(PROGRESS_BAR)
    os.environ[PROGRESS_BAR] = "false"
    try:
        environment.warn_dependency_requirement_mismatches = lambda model_requirements: None
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\.")
            yield
    finally:
        environment.warn_dependency_requirement_mismatches = checks
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        os.environ.pop(PROGRESS_BAR)
        if bar is not None:
            os.environ[PROGRESS_BAR] = bar


def _forget_paths(out: Path) -> None:
    """Remove this machine's absolute paths from MLmodel; loading does not need them."""
    described = mlflow.models.Model.load(str(out))
    flavor = described.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    described.save(str(out / "MLmodel"))
    shutil.rmtree(out / "__pycache__", ignore_errors=True)
