"""Compare finished runs: the settings that differ, their curves, and the paired difference on the same validation images with its interval.

    python jobs/compare.py phase1-imagenet-1a2b3c phase2-imagenet-4d5e6f
    python jobs/compare.py RUN RUN RUN --out comparison/

A run is a name below $FTLIB_HOME/runs or the path of its folder; the first one is what the others are compared with. Runs that differ by their seed only are taken together, and the
interval then covers seeds as well as images. Takes seconds; the first comparison of a run evaluates its best model once on the validation set.
"""

import argparse
from pathlib import Path


def main() -> None:
    from ftlib.paths import absolute, home

    parser = argparse.ArgumentParser(
        prog="python jobs/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="names or folders of finished runs, two at least"
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="FOLDER",
        help="folder for the page and its figures (default $FTLIB_HOME/comparisons/FIRST-LAST)",
    )
    parser.add_argument(
        "--storage", default="", help="where runs are kept (default $FTLIB_HOME/runs)"
    )
    asked = parser.parse_args()

    from ftlib.settings import nearest
    from ftlib.storage import folders, is_remote, join, read_file
    from ftlib.tune import compare

    root = absolute(asked.storage) if asked.storage else str(home() / "runs")

    def folder(run: str) -> str:
        for place in (join(root, run), run if is_remote(run) else absolute(run)):
            if read_file(join(place, "run.json")) is not None:
                return place
        raise compare.ComparisonError(
            f"there is no run {run} below {root}.{nearest(run, list(folders(root)))}"
        )

    runs = compare.distinct_names([compare.FinishedRun.read(folder(run)) for run in asked.runs])
    found = compare.compare(runs)
    out = (
        Path(asked.out).expanduser()
        if asked.out
        else home() / "comparisons" / f"{runs[0].name}-{runs[-1].name}".replace("/", "-")
    )
    compare.write(found, out, " and ".join(r.name for r in runs[:4]))
    print(compare.text(found))
    print(f"page: {out}/index.html")


if __name__ == "__main__":
    from ftlib.cli import job

    job(main)
