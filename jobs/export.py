"""Export a run's best model for other programs: torch.export, ONNX, or an MLflow package; each is checked against the model.

    python jobs/export.py RUN --out exported                     # model.pt2, model.onnx and meta.json
    python jobs/export.py RUN --out folder --formats mlflow      # a package: bytes in, probabilities out, no ftlib needed
    python jobs/export.py RUN --out folder --formats mlflow --register NAME --alias champion      # and models:/NAME@champion in MLflow

RUN is a name below $FTLIB_HOME/runs, or a run's folder. ONNX needs `pip install onnx onnxscript onnxruntime`. What it costs: some seconds
per format, and one pass over at most 2,000 pictures to fit the temperature (none with --temperature).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's name or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to")
    parser.add_argument(
        "--formats",
        default="torch,onnx",
        metavar="A,B",
        help="torch, onnx, mlflow (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="what logits are divided by (default: fitted on validation pictures)",
    )
    parser.add_argument(
        "--register",
        metavar="NAME",
        default="",
        help="make the package a version of this registered model in MLflow",
    )
    parser.add_argument(
        "--alias",
        default="candidate",
        help="alias that then points at it, such as candidate or champion (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments = parser.parse_args(argv)
    formats = [f for f in arguments.formats.split(",") if f]
    if not formats or set(formats) - {"torch", "onnx", "mlflow"}:
        parser.error(f"--formats {arguments.formats}: needs one or more of torch, onnx, mlflow")
    if arguments.temperature is not None and not arguments.temperature > 0:
        parser.error(f"--temperature {arguments.temperature:g}: must be above 0")
    if arguments.register and "mlflow" not in formats:
        parser.error("--register needs the package: add --formats mlflow")
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if "onnx" in formats and not _there(name)
    ]
    if missing:
        parser.error(
            f"--formats onnx needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime"
        )

    from ftlib import storage
    from ftlib.data.shards import Dataset
    from ftlib.packaging import export, package, register
    from ftlib.paths import absolute, data_path, home
    from ftlib.report.evaluation import load, score
    from ftlib.track.redact import redact
    from ftlib.track.store import store_of_run

    run_dir = absolute(
        arguments.run if "/" in arguments.run else str(home() / "runs" / arguments.run)
    )
    loaded = load(run_dir)
    temperature, fitted_on = arguments.temperature or 1.0, "given by hand"
    if arguments.temperature is None:
        scored = score(loaded, Dataset.open(data_path(loaded.run.data.path)), limit=2000)
        temperature, fitted_on = scored.calibration.temperature, scored.calibration.fitted_on
        loaded.model.cpu()
    out = Path(arguments.out)
    plain = [f for f in formats if f != "mlflow"]
    if plain:
        for kind, away in export.write(
            loaded.model, loaded.run, loaded.classes, temperature, out, plain
        ).items():
            print(
                f"{out / {'torch': 'model.pt2', 'onnx': 'model.onnx'}[kind]}: logits differ from the model's by at most {away:.1e}"
            )
    if "mlflow" in formats:
        place = out / "package" if plain else out
        made = package.package(
            loaded.model,
            loaded.run,
            loaded.classes,
            loaded.about.get("scores", {}),
            temperature,
            place,
            loaded.about.get("data"),
            fitted_on,
        )
        print(f'{made}: mlflow.pyfunc.load_model("{made}").predict([jpeg_bytes])')
        if arguments.register:
            known = (storage.read_json(storage.join(run_dir, "run.json")) or {}).get("mlflow") or {}
            if not known.get("run_id"):
                raise package.PackageError(
                    f"--register {arguments.register}: {arguments.run} was never tracked in MLflow, so there is no run to register the model of"
                )
            uri = store_of_run(known.get("uri", ""), known["run_id"], run_dir)
            address = register.register(
                made,
                arguments.register,
                arguments.alias,
                uri=uri,
                run_id=known["run_id"],
                experiment_id=known["experiment_id"],
            )
            print(f"registered: {address} in {redact(uri)}")
    print(f"temperature {temperature:.4g}, {fitted_on}")


def _there(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    job(main)
