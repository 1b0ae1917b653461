"""Measure ftlib beside what others use: loading, training steps, two workers, checkpoints, start-up; and what faster pictures cost in quality.

    python jobs/benchmark.py --what loader --source FOLDER_OF_PICTURES     # CPU per training image
    python jobs/benchmark.py --what all                                    # everything, on generated photos
    python jobs/benchmark.py --what step,scaling --out bench --mlflow      # benchmark.json and benchmark.png in bench/, and an MLflow run
    python jobs/benchmark.py --what sides --source FOLDER_OF_PICTURES      # which --max-side to prepare with: speed, bytes, quality
    python jobs/benchmark.py --what accuracy --source FOLDER --size 32     # the same training on ftlib's ops and on Albumentations'

Cases are measured by turns, over several rounds; what counts is the ratio within a round, and its spread. Peers (timm, FFCV, DALI) are measured
where they are installed; none is needed. Cost: about 3 minutes for the loader, 1 to 2 for each of the others, on 2 cores. docs/performance.md
says what each number means.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
from ftlib.cli import job

WHAT = ("loader", "step", "scaling", "checkpoint", "startup")
MORE = ("sides", "accuracy")
"""Only where they are asked for by name."""


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--what",
        default="all",
        metavar="NAMES",
        help=f"{', '.join(WHAT)}, several separated by commas, or all (default); and by name only: {', '.join(MORE)}",
    )
    parser.add_argument(
        "--source",
        metavar="FOLDER",
        help="a folder of pictures in class folders (default: generated ones of about 375 x 500 pixels)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="rounds, each with every case once (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=512,
        metavar="N",
        help="images per case and round of the loader (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="side of the loader's training input (default: %(default)s)",
    )
    parser.add_argument(
        "--max-side",
        type=int,
        default=352,
        metavar="PIXELS",
        help="longer side of the re-encoded pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="loader processes (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORDS",
        help="only the loaders whose name contains one of these: --only timm 'ftlib Phase 2'",
    )
    parser.add_argument(
        "--arch",
        default="resnet18",
        metavar="NAME",
        help="model of the training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--step-size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="side of the pictures in the training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="images per training step (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        metavar="N",
        help="training steps per case and round (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=5,
        metavar="N",
        help="epochs of `accuracy`, whose seeds are the rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="write benchmark.json and benchmark.png there"
    )
    parser.add_argument(
        "--mlflow",
        action="store_true",
        help="record ratios, JSON and figure as a run of the MLflow experiment `benchmark`",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    asked = options().parse_args(argv)
    from ftlib.benchmark.measure import BenchmarkError, Part, machine, sentence
    from ftlib.settings import nearest

    names = list(WHAT) if asked.what == "all" else [name.strip() for name in asked.what.split(",")]
    for name in names:
        if name not in (*WHAT, *MORE):
            raise BenchmarkError(
                f"--what {name}: needs {', '.join((*WHAT, *MORE))} or all.{nearest(name, [*WHAT, *MORE])}"
            )
    for flag in ("rounds", "images", "batch", "steps", "size", "step_size", "max_side", "epochs"):
        if getattr(asked, flag) < 1:
            raise BenchmarkError(
                f"--{flag.replace('_', '-')} {getattr(asked, flag)}: needs 1 or more"
            )
    if asked.source and not Path(asked.source).is_dir():
        raise BenchmarkError(f"--source {asked.source}: there is no such folder")
    from ftlib.benchmark import loader, pictures, show, training

    about = machine()
    print(sentence(about), flush=True)
    live = sys.stderr.isatty()

    def say(text: str) -> None:
        if live:
            print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)

    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="ftlib-benchmark-") as folder:
        scratch = Path(folder)
        step = training.BenchmarkSettings(
            asked.arch, asked.step_size, asked.batch, asked.steps, asked.rounds
        )
        source = Path(asked.source) if asked.source else None
        for name in names:
            if name == "sides":
                part = pictures.sides(
                    scratch / name,
                    source,
                    images=asked.images,
                    rounds=asked.rounds,
                    workers=asked.workers,
                    size=asked.size,
                    say=say,
                )
            elif name == "accuracy":
                part = pictures.accuracy(
                    scratch / name,
                    source,
                    seeds=asked.rounds,
                    epochs=asked.epochs,
                    arch=asked.arch,
                    size=asked.size,
                    say=say,
                )
            elif name == "loader":
                part = loader.benchmark(
                    scratch,
                    source,
                    images=asked.images,
                    rounds=asked.rounds,
                    workers=asked.workers,
                    max_side=asked.max_side,
                    size=asked.size,
                    only=asked.only,
                    say=say,
                )
            else:
                part = training.MEASURES[name](step, scratch, say)
            say("")
            show.table(part, sys.stdout)
            parts.append(part)
    command = shlex.join(["python", "jobs/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    found = show.as_json(parts, about, command)
    if asked.out:
        out = Path(asked.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmark.json").write_text(json.dumps(found, indent=1), "utf-8")
        (out / "benchmark.png").write_bytes(show.figure(parts, about))
        print(f"{out / 'benchmark.json'}, {out / 'benchmark.png'}")
    if asked.mlflow:
        from ftlib.benchmark.record import record

        print(f"MLflow: {record(found, show.figure(parts, about))}")


if __name__ == "__main__":
    job(main)
