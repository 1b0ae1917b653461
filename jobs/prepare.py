"""Check pictures, from whatever layout they lie in, and write the data set that training reads.

    python jobs/prepare.py --source DIR                      # DIR/train/CLASS/* and DIR/val/CLASS/*
    python jobs/prepare.py --source DIR --val-fraction 0.1   # DIR/CLASS/*, 10 % held out
    python jobs/prepare.py --source DIR/labels.csv --val-fraction 0.1
    python jobs/prepare.py --source pictures.zip             # or .tar, .tar.gz; s3://..., hf://...
    python jobs/prepare.py --source DIR --dry-run            # only say what was understood
    python jobs/prepare.py --source MORE --out SET --append  # add pictures, or a class, to a set
    python jobs/prepare.py --verify PATH                     # check every file's sha256

It prints what it takes the source for, then writes Parquet shards, a manifest, and a report of
every file that was refused or repaired, and why. It takes about the size of the pictures on disk,
and some milliseconds of one core per picture. The same command goes on after an interruption.
docs/data.md has the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.flags import Common, FormerValue, Hidden, Metavar
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.sources.options import SourceOptions
from ftlib.settings import Between, ConfigError
from ftlib.text import wrapped

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, PrepareOptions, SourceOptions):
    """The options of a source, of a picture, and of the whole set."""

    source: Annotated[str, Common, Metavar("DIR|FILE|ADDRESS|NAME")] = ""
    """A folder, archive, table of labels or address; or digits, imagenette, cifar10, cifar100,
    flowers102, food101, pets, stl10, svhn, mnist or fashionmnist, of which all but digits are
    downloaded."""
    verify: Annotated[str, Common, Metavar("PATH")] = ""
    """Check a prepared set instead of making one."""
    out: Annotated[str, Common, Metavar("PATH")] = ""
    """Where to: a name below $FTLIB_HOME/data, a folder, or an s3:// or gs:// address. By default
    the source's name."""
    dry_run: Annotated[bool, Common] = False
    """Say what the source was taken for, and stop before anything is written."""
    append: Annotated[bool, Common] = False
    """Add what the source has and the set at --out does not. Old rows and splits stay."""
    val_fraction: Annotated[float, Common, Between(0, 1, open_high=True)] | None = None
    labels: Annotated[str, Common, Metavar("FILE")] = ""
    class_names: Annotated[str, Metavar("FILE")] = ""
    file_column: Annotated[str, Metavar("NAME")] = ""
    label_column: Annotated[str, Metavar("NAME")] = ""
    split_column: Annotated[str, Metavar("NAME")] = ""
    group_column: Annotated[str, Metavar("NAME")] = ""
    group_pattern: Annotated[str, Metavar("REGEX")] = ""
    subsampling: Literal["420", "444", "keep"] | None = None
    background: Annotated[tuple[int, int, int], Metavar("R,G,B")] = (255, 255, 255)
    depth_range: Annotated[tuple[float, float], Metavar("BLACK,WHITE")] | None = None
    depth_bits: Annotated[int, Hidden] | None = None
    max_bad_fraction: Annotated[float, Between(0, 1, open_high=True)] = 0.01
    """Stop if a larger share of the files is refused."""
    workers: Annotated[int, Between(0, 4096)] = 0
    """Shards that are made at a time. 0: as many as there are CPUs."""
    engine: Annotated[Literal["auto", "local", "ray"], FormerValue("here", "local")] = "auto"
    """Processes of this machine (local) or Ray tasks; auto takes Ray where RAY_ADDRESS is
    set."""
    overwrite: bool = False
    """Replace a set at --out that was made from other files or with other options."""

    def __post_init__(self) -> None:
        ResultOptions.__post_init__(self)
        PrepareOptions.__post_init__(self)
        SourceOptions.__post_init__(self)
        if bool(self.source) == bool(self.verify):
            raise ConfigError("give either --source DIR to prepare, or --verify PATH to check")

    @property
    def reading(self) -> SourceOptions:
        return SourceOptions(**{f.name: getattr(self, f.name) for f in fields(SourceOptions)})

    @property
    def rules(self) -> PrepareOptions:
        return PrepareOptions(**{f.name: getattr(self, f.name) for f in fields(PrepareOptions)})


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    with reporting(asked) as result:
        if asked.verify:
            result.update(verify(asked.verify))
            return
        if asked.dry_run:
            result.update(look(asked))
            return
        from ftlib.launch.cluster import connect
        from ftlib.preparation.prepare import prepare
        from ftlib.preparation.report import text
        from ftlib.preparation.sources.listing import describe

        done = prepare(
            asked.source,
            asked.out or None,
            reading=asked.reading,
            rules=asked.rules,
            max_bad_fraction=asked.max_bad_fraction,
            workers=asked.workers,
            engine=asked.engine,
            connect_ray=connect,
            overwrite=asked.overwrite,
            append=asked.append,
            progress=not asked.quiet,
            understood=lambda listing: print(describe(listing), flush=True),
        )
        print(text(done.path, done.dataset, done.report, done.seconds, done.already_done))
        result.update(path=done.path, already_done=done.already_done, **summary(done.dataset))


def look(asked: Options) -> dict[str, object]:
    """Say what the source was taken for. Raises DataError."""
    from ftlib.preparation.prepare import list_source
    from ftlib.preparation.sources.listing import describe

    _, listing = list_source(asked.source, asked.reading, adding=asked.append)
    print(describe(listing))
    print("Nothing was written. The same command without --dry-run prepares the set")
    return {
        "layout": listing.layout,
        "classes": list(listing.classes),
        "pictures": listing.counts,
        "left_aside": listing.aside,
        "warnings": list(listing.warnings),
    }


def verify(path: str) -> dict[str, object]:
    """Compare every file of the set with its manifest. Raises DataError."""
    from ftlib.checks import check_data
    from ftlib.data.shards import Dataset
    from ftlib.paths import data_path

    check_data(path)
    dataset = Dataset.open(data_path(path))
    dataset.verify(deep=True)
    print(wrapped(f"{dataset!r}: every file has the size and sha256 of its manifest"))
    return {"path": dataset.path, "verified": True, **summary(dataset)}


def summary(dataset: "Dataset") -> dict[str, object]:
    """What a prepared set holds."""
    splits = {name: about["rows"] for name, about in dataset.manifest["splits"].items()}
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "classes": len(dataset.classes),
        "pictures": splits,
    }


if __name__ == "__main__":
    job(main)
