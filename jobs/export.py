"""Export a run's best model for other programs: torch.export, ONNX, or an MLflow package.

    python jobs/export.py RUN --out exported                  # model.pt2, model.onnx and meta.json
    python jobs/export.py RUN --out folder --formats mlflow   # a package: bytes in, scores out
    python jobs/export.py RUN --out folder --formats mlflow --register NAME --alias champion

Each export is checked against the model. A package needs no ftlib where it is used; --register
makes it models:/NAME@champion in MLflow. ONNX needs `pip install "ftlib[onnx]"`. It takes some
seconds per format, and one pass over at most 2,000 pictures to fit the temperature (none with
--temperature).
"""

import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ftlib import storage
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import Positive
from ftlib.flags import Commas, Metavar, Position
from ftlib.gc_pause import lasting_imports
from ftlib.paths import job_command, run_folder
from ftlib.settings import ConfigError

if TYPE_CHECKING:
    from ftlib.training.initial_weights import LoadedModel

Format = Literal["torch", "onnx", "mlflow"]
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    run: Annotated[str, Position]
    """A run's name or its folder."""
    out: Annotated[str, Metavar("FOLDER")]
    """Where the files go."""
    formats: Annotated[tuple[Format, ...], Commas, Metavar("A,B")] = ("torch", "onnx")
    """One or more of torch, onnx and mlflow."""
    temperature: Annotated[Positive, Metavar("T")] | None = None
    """Divide the logits by this. By default it is fitted on validation pictures."""
    register: Annotated[str, Metavar("NAME")] = ""
    """Make the package a version of this registered model in MLflow."""
    alias: Annotated[str, Metavar("NAME")] = "candidate"
    """The alias that then points at it, such as candidate or champion."""

    @property
    def package(self) -> Path:
        """The folder of the package."""
        return Path(self.out) / "package" if set(self.formats) - {"mlflow"} else Path(self.out)

    def check(self) -> None:
        if not self.formats:
            raise ConfigError("--formats: needs one or more of torch, onnx, mlflow")
        if self.register and "mlflow" not in self.formats:
            raise ConfigError("--register needs the package: add --formats mlflow")
        if "mlflow" in self.formats and self.package.is_dir() and any(self.package.iterdir()):
            raise ConfigError(
                f"--out {self.out}: {self.package} is not empty, and a package needs a folder of "
                "its own. Name another, or delete that one"
            )
        needed = ("onnx", "onnxscript", "onnxruntime") if "onnx" in self.formats else ()
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f'--formats onnx needs {", ".join(missing)}: pip install "ftlib[onnx]"'
            )


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    run_dir = run_folder(asked.run)
    with lasting_imports():
        from ftlib.report.evaluation import load

    with reporting(asked) as result:
        loaded = load(run_dir)
        temperature, fitted_on = asked.temperature or 1.0, "given by hand"
        if asked.temperature is None:
            temperature, fitted_on = fit_temperature(loaded)
        result.update(run=run_dir, temperature=temperature, files=[])
        if plain := [name for name in asked.formats if name != "mlflow"]:
            result["files"] += write_files(loaded, plain, temperature, Path(asked.out))
        if "mlflow" in asked.formats:
            made = write_package(loaded, temperature, fitted_on, asked.package)
            result["files"].append(str(made))
            model = shlex.quote(str(made))
            if asked.register:
                result["registered"], model = register(asked, run_dir, made)
        on = fitted_on if asked.temperature else f"fitted on {fitted_on}"
        print(f"temperature {temperature:.4g}, {on}")
        if "mlflow" in asked.formats:
            print(f"\nNext: {job_command('predict', f'--model {model} --source PICTURE')}")
            print(f"      {job_command('serve', f'--model {model}')}")


def fit_temperature(loaded: "LoadedModel") -> tuple[float, str]:
    """(temperature, the pictures it was fitted on). Leaves the model on the CPU."""
    from ftlib.data.shards import open_dataset
    from ftlib.report.evaluation import score

    dataset = open_dataset(loaded.run.data)
    calibration = score(loaded, dataset, limit=2000).calibration
    loaded.model.cpu()
    return calibration.temperature, calibration.fitted_on


def write_files(
    loaded: "LoadedModel", formats: Sequence[str], temperature: float, out: Path
) -> list[str]:
    """Write model.pt2 and model.onnx; return their paths."""
    from ftlib.packaging import export

    differences = export.write(
        loaded.model,
        loaded.run,
        loaded.classes,
        temperature=temperature,
        out=out,
        formats=list(formats),
    )
    for name, largest in differences.items():
        print(f"{out / FILES[name]}: logits differ from the model's by at most {largest:.1e}")
    return [str(out / FILES[name]) for name in differences]


def write_package(loaded: "LoadedModel", temperature: float, fitted_on: str, place: Path) -> Path:
    """Write the MLflow package; return its folder."""
    from ftlib.packaging import package

    made = package.package(
        loaded.model,
        loaded.run,
        loaded.classes,
        scores=loaded.about.get("scores", {}),
        temperature=temperature,
        out=place,
        data=loaded.about.get("data"),
        calibrated_on=fitted_on,
    )
    megabytes = package.size_bytes(made) / 1e6
    print(f"{made} ({megabytes:.1f} MB). From Python:")
    print(f'  mlflow.pyfunc.load_model("{made}").predict([jpeg_bytes])')
    return Path(made)


def register(asked: Options, run_dir: str, package: Path) -> tuple[str, str]:
    """Register the package in the MLflow store of its run.

    Returns its address, and the words by which a job finds it.
    """
    from ftlib.packaging.register import register as register_package
    from ftlib.track.redact import redact
    from ftlib.track.store import resolve_uri, store_of_run

    known = (storage.read_json(storage.join(run_dir, "run.json")) or {}).get("mlflow") or {}
    if not known.get("run_id"):
        raise ConfigError(
            f"--register {asked.register}: {asked.run} was never tracked in MLflow, "
            "so there is no run to register the model of"
        )
    uri = store_of_run(known.get("uri", ""), known["run_id"], run_dir)
    address = register_package(
        package,
        asked.register,
        asked.alias,
        uri=uri,
        run_id=known["run_id"],
        experiment_id=known["experiment_id"],
    )
    print(f"registered: {address} in {redact(uri)}")
    elsewhere = "" if uri == resolve_uri() else f" --tracking-uri {shlex.quote(redact(uri))}"
    return address, address + elsewhere


if __name__ == "__main__":
    job(main)
