"""Turn folders of pictures, or a built-in sample, into a checked data set that training reads.

    python jobs/prepare.py --source DIR                      # DIR/train/CLASS/* and DIR/val/CLASS/*
    python jobs/prepare.py --source DIR --val-fraction 0.1   # DIR/CLASS/*, 10 % held out
    python jobs/prepare.py --source digits                   # scikit-learn's digits, in seconds
    python jobs/prepare.py --verify PATH                     # check every file's sha256

It writes Parquet shards, a manifest, and a report of every file that was refused or repaired, and
why. It takes about the size of the pictures on disk, and 5 ms of one core per ImageNet picture. The
same command goes on after an interruption. docs/data.md has the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.flags import FormerValue, Hidden, Metavar
from ftlib.preparation.options import PrepareOptions
from ftlib.settings import Between, ConfigError

if TYPE_CHECKING:
    from ftlib.data.shards import Dataset


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, PrepareOptions):
    """The options of a picture, and those of the whole set."""

    source: Annotated[str, Metavar("DIR|NAME")] = ""
    """A folder of pictures; or digits, imagenette, cifar10, cifar100, flowers102, food101, pets,
    stl10, svhn, mnist or fashionmnist, of which all but digits are downloaded."""
    verify: Annotated[str, Metavar("PATH")] = ""
    """Check a prepared set instead of making one."""
    out: Annotated[str, Metavar("PATH")] = ""
    """Where to: a name below $FTLIB_HOME/data, a folder, or an s3:// or gs:// address. By default
    the source's name."""
    val_fraction: Annotated[float, Between(0, 1, open_high=True)] | None = None
    """Share of each class that is held out for validation if the source has no val folder; 0 for
    none."""
    seed: int = 42
    """Seed that chooses the pictures of --val-fraction."""
    subsampling: Literal["420", "444", "keep"] | None = None
    background: Annotated[tuple[int, int, int], Metavar("R,G,B")] = (255, 255, 255)
    depth_range: Annotated[tuple[float, float], Metavar("BLACK,WHITE")] | None = None
    depth_bits: Annotated[int, Hidden] | None = None
    max_bad_fraction: Annotated[float, Between(0, 1, open_high=True)] = 0.01
    """Stop if a larger share of the files is refused."""
    workers: Annotated[int, Between(0, 4096)] = 0
    """Shards that are made at a time. 0: as many as there are CPUs."""
    engine: Annotated[Literal["auto", "local", "ray"], FormerValue("here", "local")] = "auto"
    """Processes of this machine (local) or Ray tasks; auto chooses by the size of the source."""
    overwrite: bool = False
    """Replace a set at --out that was made from other files or with other options."""

    def __post_init__(self) -> None:
        ResultOptions.__post_init__(self)
        PrepareOptions.__post_init__(self)
        if bool(self.source) == bool(self.verify):
            raise ConfigError("give either --source DIR to prepare, or --verify PATH to check")

    @property
    def rules(self) -> PrepareOptions:
        return PrepareOptions(**{f.name: getattr(self, f.name) for f in fields(PrepareOptions)})


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    with reporting(asked) as result:
        if asked.verify:
            result.update(verify(asked.verify))
            return
        from ftlib.preparation.prepare import prepare
        from ftlib.preparation.report import text

        done = prepare(
            asked.source,
            asked.out or None,
            val_fraction=asked.val_fraction,
            seed=asked.seed,
            rules=asked.rules,
            max_bad_fraction=asked.max_bad_fraction,
            workers=asked.workers,
            engine="here" if asked.engine == "local" else asked.engine,
            overwrite=asked.overwrite,
        )
        print(text(done.path, done.dataset, done.report, done.seconds, done.already_done))
        result.update(path=done.path, already_done=done.already_done, **summary(done.dataset))


def verify(path: str) -> dict[str, object]:
    """Compare every file of the set with its manifest. Raises DataError."""
    from ftlib.checks import check_data
    from ftlib.data.shards import Dataset
    from ftlib.paths import data_path

    check_data(path)
    dataset = Dataset.open(data_path(path))
    dataset.verify(deep=True)
    print(f"{dataset!r}: every file has the size and sha256 of its manifest")
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
