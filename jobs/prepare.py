"""Image folders, or a built-in sample, to a checked data set that training reads.

    python jobs/prepare.py --source DIR                      # DIR/train/<class>/* and DIR/val/<class>/*
    python jobs/prepare.py --source DIR --val-fraction 0.1   # DIR/<class>/*, a tenth of each class held out
    python jobs/prepare.py --source digits                   # scikit-learn's digits; downloads nothing, takes seconds
    python jobs/prepare.py --verify PATH                     # read a prepared set and check every file's sha256

What comes out: Parquet shards, a manifest, and a report of every file that was refused or repaired, and why. What it costs: about the
size of the pictures on disk and 5 ms of one core per ImageNet picture. Killed, it goes on where it stopped when the same command is
given again. docs/data.md has the rest.
"""

from __future__ import annotations

import argparse
import sys

from ftlib.preparation.options import PrepareOptions


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--source",
        metavar="DIR|NAME",
        help="folder of pictures, or digits, imagenette, cifar10, cifar100, flowers102, food101, pets, stl10, svhn, mnist, fashionmnist (all but digits are downloaded)",
    )
    what.add_argument("--verify", metavar="PATH", help="check a prepared set instead of making one")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="where to: a folder, s3://..., gs://..., or a bare name under $FTLIB_HOME/data (default: the source's name there)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of each class held out for validation, where the source has no val folder; 0 for none",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="chooses the pictures that --val-fraction holds out (default: %(default)s)",
    )
    parser.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="reduce larger pictures to this longer side (default: keep the size)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="1..100",
        help="encode every picture again at this JPEG quality (default: keep the original bytes)",
    )
    parser.add_argument(
        "--subsampling",
        choices=("420", "444", "keep"),
        help="chroma of pictures encoded again for --max-side or --quality: halved (420, the default then), whole, or the original's",
    )
    parser.add_argument(
        "--tiles",
        action="store_true",
        help="store originals so that training decodes only what it crops: the very pixels, 7 %% more bytes, 50 ms more of one core per ImageNet picture",
    )
    parser.add_argument(
        "--background",
        default="255,255,255",
        metavar="R,G,B",
        help="colour behind transparent pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--depth-range",
        metavar="BLACK,WHITE",
        help="sample values of pictures of more than 8 bits that become black and white (default: "
        "what the files declare, else the bits that the set uses)",
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=50.0,
        metavar="MP",
        help="refuse larger pictures, before decoding them (default: %(default)g)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="stop if a larger share of the files is refused (default: %(default)g)",
    )
    parser.add_argument(
        "--accept-warnings",
        action="store_true",
        help="take JPEGs that decode only with a warning; some of them are visibly damaged",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="shards made at a time (default: all CPUs)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "here", "ray"),
        default="auto",
        help="Ray tasks, or processes of this machine; auto takes Ray above 10,000 files or 1 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a set at --out that was made from other files or with other options",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options()
    arguments = parser.parse_args(argv)
    try:
        background = tuple(int(part) for part in arguments.background.split(","))
        rules = PrepareOptions(
            arguments.max_side,
            arguments.quality,
            arguments.subsampling,
            background,
            arguments.max_megapixels,
            arguments.accept_warnings,
            arguments.tiles,
            _depth_range(arguments.depth_range),
        )  # type: ignore[arg-type]
        if arguments.verify:
            return verify(arguments.verify)
        from ftlib.preparation.prepare import prepare
        from ftlib.preparation.report import text

        done = prepare(
            arguments.source,
            arguments.out,
            val_fraction=arguments.val_fraction,
            seed=arguments.seed,
            rules=rules,
            max_bad_fraction=arguments.max_bad_fraction,
            workers=arguments.workers,
            engine=arguments.engine,
            overwrite=arguments.overwrite,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(text(done.path, done.dataset, done.report, done.seconds, done.already_done))
    return 0


def _depth_range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        black, white = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--depth-range {text}: needs two numbers, such as 0,4095") from None
    return black, white


def verify(path: str) -> int:
    from ftlib.data.shards import Dataset
    from ftlib.paths import data_path

    dataset = Dataset.open(data_path(path))
    dataset.verify(deep=True)
    print(f"{dataset!r}: every file has the size and sha256 of its manifest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
