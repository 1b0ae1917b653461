"""Compare finished runs on the same validation pictures, with intervals and p-values.

    python jobs/compare.py phase1-imagenet-1a2b3c phase2-imagenet-4d5e6f
    python jobs/compare.py RUN RUN RUN --out comparison/

The others are compared with the first run: the settings that differ, the curves, and the paired
difference. Runs that differ in their seed only form one group, whose interval covers seeds as well
as pictures. It takes seconds; the first comparison of a run evaluates its best model once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.flags import Metavar, Position
from ftlib.gc_pause import lasting_imports
from ftlib.paths import home, run_folder
from ftlib.settings import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    runs: Annotated[tuple[str, ...], Position, Metavar("RUN")]
    """Finished runs, two at least: their names or folders."""
    out: Annotated[str, Metavar("FOLDER")] = ""
    """Where the page and its figures go. By default comparisons/FIRST-LAST below $FTLIB_HOME."""
    storage: Annotated[str, Metavar("FOLDER")] = ""
    """Where the runs are. By default $FTLIB_HOME/runs."""

    def check(self) -> None:
        if len(self.runs) < 2:
            raise ConfigError(f"{' '.join(self.runs)}: a comparison needs two runs at least")


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    folders = [run_folder(run, asked.storage) for run in asked.runs]
    with lasting_imports():
        from ftlib.tune import compare

    with reporting(asked) as result:
        runs = compare.distinct_names([compare.FinishedRun.read(folder) for folder in folders])
        found = compare.compare(runs)
        name = f"{runs[0].name}-{runs[-1].name}".replace("/", "-")
        out = Path(asked.out).expanduser() if asked.out else home() / "comparisons" / name
        compare.write(found, out, " and ".join(run.name for run in runs[:4]))
        print(compare.text(found))
        print(f"page: {out}/index.html")
        result.update(
            page=f"{out}/index.html",
            sentences=found.sentences(),
            settings=found.settings,
            cautions=found.cautions,
            groups=[{"name": g.name, "top1": g.mean_top1} for g in found.groups],
            differences=[
                {"name": group, **asdict(difference), "p": p}
                for (group, difference, _), p in zip(found.rows(), found.adjusted)
            ],
        )


if __name__ == "__main__":
    job(main)
