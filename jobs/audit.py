"""Look a prepared data set over: duplicates, leaks from train into val, mistaken labels, odd sizes, class counts.

    python jobs/audit.py digits                                   # a page with pictures, and findings.csv
    python jobs/audit.py DATA --max-leaks 0 --max-suspects 0.02   # ends with 1 where there is more, for a pipeline
    python jobs/audit.py DATA --run phase1                        # judge labels by a trained run's features

What comes out: audit.html, classes.png and findings.csv. What it costs: every picture is decoded once (about 2 ms of a core per ImageNet
picture), then seconds to minutes for the labels. Nothing is changed. Exit code: 0, 1 where a threshold is passed, 2 for a mistake in the
command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ftlib.cli import job


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/audit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a prepared data set: a name below $FTLIB_HOME/data, a folder or an address",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the page goes (default: audits/NAME below $FTLIB_HOME)"
    )
    parser.add_argument(
        "--run",
        metavar="RUN",
        default="",
        help="a trained run whose features judge the labels (default: small descriptors)",
    )
    parser.add_argument(
        "--max-leaks",
        type=int,
        metavar="N",
        help="pairs across train and val, same or near, that are let pass",
    )
    parser.add_argument(
        "--max-conflicts",
        type=int,
        metavar="N",
        help="pairs with different labels that are let pass",
    )
    parser.add_argument(
        "--max-duplicates",
        type=float,
        metavar="F",
        help="pairs within a split, as a share of the pictures, that are let pass",
    )
    parser.add_argument(
        "--max-suspects",
        type=float,
        metavar="F",
        help="suspicious labels, as a share of those checked, that are accepted",
    )
    parser.add_argument(
        "--label-sample",
        type=int,
        default=20_000,
        metavar="N",
        help="look at the labels of at most N pictures, evenly spread (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="threads that decode (default: all CPUs)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments = parser.parse_args(argv)
    if arguments.label_sample < 1:
        parser.error("--label-sample needs to be 1 or more")

    from rich.progress import Progress

    from ftlib.data.shards import Dataset
    from ftlib.paths import absolute, data_path, home
    from ftlib.report.audit_page import audit, summary, write

    dataset = Dataset.open(data_path(arguments.data))
    features = None
    if arguments.run:
        from ftlib.report.evaluation import features_of, load

        run = absolute(
            arguments.run if "/" in arguments.run else str(home() / "runs" / arguments.run)
        )
        loaded = load(run)
        features = lambda data: features_of(loaded, data)  # noqa: E731
    out = Path(arguments.out) if arguments.out else home() / "audits" / dataset.name
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(
            f"looking at {dataset.name}",
            total=len(dataset.split("train")) + len(dataset.split("val")),
        )
        found = audit(
            dataset,
            features=features,
            label_sample=arguments.label_sample,
            workers=arguments.workers or os.cpu_count() or 1,
            tick=lambda: progress.advance(task),
        )
    files = write(found, out)
    print(
        f"{dataset.name}: {found.train:,} training and {len(found.labels) - found.train:,} validation pictures"
    )
    for what, count, todo in summary(found):
        print(f"  {count:7,}  {what}" + (f" ({todo})" if count else ""))
    print(f"page: {files[0]}")
    passed = exceeded(found, arguments)
    if passed:
        print("too many: " + "; ".join(passed), file=sys.stderr)
        raise SystemExit(1)


def exceeded(found: Any, arguments: argparse.Namespace) -> list[str]:
    """The thresholds that are passed, in words."""
    n = max(len(found.labels), 1)
    checks = [
        ("leaks", len(found.leaks), arguments.max_leaks, 1),
        ("conflicts", len(found.conflicts), arguments.max_conflicts, 1),
        ("duplicates", len(found.within), arguments.max_duplicates, n),
        ("suspects", len(found.suspects), arguments.max_suspects, max(found.checked, 1)),
    ]
    return [
        f"{name} {count}, more than --max-{name} {limit:g}"
        for name, count, limit, of in checks
        if limit is not None and count > limit * of
    ]


if __name__ == "__main__":
    job(main)
