"""Measure ftlib beside what others use: loading, training, two workers, checkpoints, start-up.

    python jobs/benchmark.py --what loader --source FOLDER_OF_PICTURES   # CPU per training image
    python jobs/benchmark.py --what all                                  # on generated photos
    python jobs/benchmark.py --what step,scaling --out bench --mlflow    # files and an MLflow run
    python jobs/benchmark.py --what sides --source FOLDER_OF_PICTURES    # which --max-side to use
    python jobs/benchmark.py --what accuracy --source FOLDER --size 32   # ftlib's and others' ops
    python jobs/benchmark.py --what pieces --source FOLDER               # of ftlib's transform
    python jobs/benchmark.py --what cpu --arch resnet50 --step-size 224  # threads, bf16, compile
    python jobs/benchmark.py --what scale                                # 1.3 million rows
    python jobs/benchmark.py --what serve --rounds 3                     # good and hostile clients
    python jobs/benchmark.py --what recipes --source FOLDER --size 32 --out bench  # accuracy
    python jobs/benchmark.py --what gpu --arch resnet50 --batch 256 --out bench    # `make gpu`

Cases are measured in turn, over several rounds; what counts is the ratio within a round, and its
spread. Peers (timm, FFCV, DALI) are measured where they are installed; none is needed. It takes
about 3 minutes for the loader and 1 to 2 for each of the others, on 2 cores. docs/performance.md
says what each number means.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import AtLeastOne, Count, Positive
from ftlib.flags import Commas, Common, Metavar
from ftlib.settings import ConfigError, nearest

if TYPE_CHECKING:
    from ftlib.benchmark.measure import Part
    from ftlib.benchmark.training import BenchmarkSettings

WHAT = ("loader", "step", "scaling", "checkpoint", "startup")
BY_NAME_ONLY = ("pieces", "sides", "accuracy", "cpu", "scale", "serve", "recipes", "gpu")
Pixels = Annotated[AtLeastOne, Metavar("PIXELS")]


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    what: Annotated[tuple[str, ...], Common, Commas, Metavar("NAMES")] = ("all",)
    """One or more of loader, step, scaling, checkpoint and startup, or all of these; and, by name
    only, pieces, sides, accuracy, cpu, scale, serve, recipes and gpu."""
    source: Annotated[str, Common, Metavar("FOLDER")] = ""
    """Pictures in class folders. By default generated ones of about 375 x 500 pixels."""
    rounds: Annotated[AtLeastOne, Common] = 5
    """Rounds, each with every case once."""
    seeds: AtLeastOne = 5
    """Seeds of accuracy and recipes."""
    images: AtLeastOne = 512
    """Images per case and round of the loader."""
    size: Pixels = 224
    """Side of the training input of loader, pieces, sides, accuracy, recipes and gpu."""
    max_side: Pixels = 352
    """Longer side of the pictures that are encoded again."""
    workers: Count = 2
    """Loader processes."""
    only: Annotated[tuple[str, ...], Metavar("WORDS")] = ()
    """Only the loaders whose name contains one of these: --only timm 'ftlib Phase 2'."""
    arch: Annotated[str, Metavar("NAME")] = "resnet18"
    """Model of the training steps, accuracy, cpu, recipes, gpu and serve."""
    step_size: Pixels = 64
    """Side of the pictures in the training steps, also cpu's, and of serve's input."""
    batch: AtLeastOne = 32
    """Images per training step."""
    steps: AtLeastOne = 8
    """Training steps per case and round."""
    epochs: AtLeastOne = 5
    """Epochs of accuracy and recipes."""
    recipes: Annotated[tuple[str, ...], Commas, Metavar("NAMES")] = ("from-scratch-short",)
    """Of recipes: ftlib's, to compare with timm's, torchvision's and a plain loop. The first is
    compared with the others too."""
    timm: Annotated[str, Metavar("FILE")] = ""
    """Of recipes and gpu: timm's train.py, from its repository."""
    timm_lr: Positive = 3e-3
    """Of recipes: the learning rate that timm's train.py gets."""
    out: Annotated[str, Common, Metavar("FOLDER")] = ""
    """Write benchmark.json, benchmark.md and benchmark.png there. recipes also keeps its
    trainings there, and does only those that are missing."""
    mlflow: bool = False
    """Record ratios, JSON and figure as a run of the MLflow experiment `benchmark`."""

    def check(self) -> None:
        known = (*WHAT, *BY_NAME_ONLY)
        for name in self.parts:
            if name not in known:
                raise ConfigError(
                    f"--what {name}: needs {', '.join(known)} or all.{nearest(name, known)}"
                )
        if self.source and not Path(self.source).is_dir():
            raise ConfigError(f"--source {self.source}: there is no such folder")
        if "recipes" in self.parts and not self.source:
            raise ConfigError("--what recipes: needs --source, a folder of pictures to learn from")
        if self.timm and not Path(self.timm).is_file():
            raise ConfigError(f"--timm {self.timm}: there is no such file")

    @property
    def parts(self) -> tuple[str, ...]:
        return WHAT if self.what == ("all",) else self.what


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    from ftlib.benchmark import show
    from ftlib.benchmark.measure import machine, sentence

    with reporting(asked) as result:
        about = machine()
        print(sentence(about), flush=True)
        parts: list[Part] = []
        with tempfile.TemporaryDirectory(prefix="ftlib-benchmark-") as folder:
            for name in asked.parts:
                measured = measure_all(name, asked, Path(folder))
                show_progress("")
                for part in measured:
                    show.table(part, sys.stdout)
                parts += measured
        words = sys.argv[1:] if argv is None else argv
        found = show.as_json(parts, about, shlex.join(["python", "jobs/benchmark.py", *words]))
        result.update(found)
        if asked.out:
            out = Path(asked.out)
            out.mkdir(parents=True, exist_ok=True)
            (out / "benchmark.json").write_text(json.dumps(found, indent=1), "utf-8")
            (out / "benchmark.md").write_text(show.markdown(parts, found), "utf-8")
            (out / "benchmark.png").write_bytes(show.figure(parts, about))
            print(", ".join(str(out / f"benchmark.{kind}") for kind in ("json", "md", "png")))
        if asked.mlflow:
            from ftlib.benchmark.record import record

            print(f"MLflow: {record(found, show.figure(parts, about))}")


def measure_all(name: str, asked: Options, scratch: Path) -> "list[Part]":
    """The tables of one part."""
    if name == "scale":
        from ftlib.benchmark import scale

        return scale.benchmark(
            scratch / name, workers=asked.workers, rounds=asked.rounds, say=show_progress
        )
    if name == "pieces":
        from ftlib.benchmark import loader

        return loader.pieces(
            scratch / name,
            Path(asked.source) if asked.source else None,
            images=asked.images,
            rounds=asked.rounds,
            max_side=asked.max_side,
            size=asked.size,
            say=show_progress,
        )
    if name != "gpu":
        return [measure(name, asked, scratch)]
    from ftlib.benchmark import gpu
    from ftlib.benchmark.training import BenchmarkSettings

    plan = gpu.GpuPlan(
        BenchmarkSettings(asked.arch, asked.size, asked.batch, asked.steps, asked.rounds),
        workers=asked.workers,
        max_side=asked.max_side,
        source=Path(asked.source) if asked.source else None,
        timm=asked.timm,
    )
    return gpu.benchmark(plan, scratch / name, show_progress)


def measure(name: str, asked: Options, scratch: Path) -> "Part":
    """Measure one part in `scratch`."""
    from ftlib.benchmark import loader, pictures, training

    source = Path(asked.source) if asked.source else None
    say: Callable[[str], None] = show_progress
    if name == "cpu":
        from ftlib.benchmark.cpu_settings import cpu_settings

        return cpu_settings(training_settings(asked), say)
    if name == "startup":
        from ftlib.benchmark.startup import startup

        return startup(training_settings(asked), scratch / name, say)
    if name == "serve":
        from ftlib.benchmark import serving

        return serving.benchmark(
            scratch / name, arch=asked.arch, size=asked.step_size, rounds=asked.rounds, say=say
        )
    if name == "recipes":
        from ftlib.benchmark.recipes import RecipesPlan, benchmark

        assert source is not None
        plan = RecipesPlan(
            recipes=asked.recipes,
            arch=asked.arch,
            size=asked.size,
            epochs=asked.epochs,
            seeds=asked.seeds,
            timm=asked.timm,
            timm_lr=asked.timm_lr,
        )
        folder = Path(asked.out) / name if asked.out else scratch / name
        return benchmark(plan, source, folder.resolve(), say)
    if name == "sides":
        return pictures.sides(
            scratch / name,
            source,
            images=asked.images,
            rounds=asked.rounds,
            workers=asked.workers,
            size=asked.size,
            say=say,
        )
    if name == "accuracy":
        return pictures.accuracy(
            scratch / name,
            source,
            seeds=asked.seeds,
            epochs=asked.epochs,
            arch=asked.arch,
            size=asked.size,
            say=say,
        )
    if name == "loader":
        return loader.benchmark(
            scratch,
            source,
            images=asked.images,
            rounds=asked.rounds,
            workers=asked.workers,
            max_side=asked.max_side,
            size=asked.size,
            only=list(asked.only),
            say=say,
        )
    return training.MEASURES[name](training_settings(asked), scratch, say)


def training_settings(asked: Options) -> "BenchmarkSettings":
    """Of the parts that train."""
    from ftlib.benchmark.training import BenchmarkSettings

    return BenchmarkSettings(asked.arch, asked.step_size, asked.batch, asked.steps, asked.rounds)


def show_progress(text: str) -> None:
    """Show what is measured, on a terminal; no text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    job(main)
