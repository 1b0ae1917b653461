"""Check a prepared data set: duplicates, leaks from train into val, mistaken labels, odd sizes.

    python jobs/audit.py digits                                   # a page and findings.csv
    python jobs/audit.py DATA --max-leaks 0 --max-suspects 0.02   # exit code 1 above a threshold
    python jobs/audit.py DATA --run phase1                        # judge labels by a run's features

It writes audit.html, classes.png and findings.csv, and changes nothing. It decodes every picture
once (about 2 ms of a core per ImageNet picture); the labels take seconds to minutes more. Exit
code: 1 where a threshold is exceeded.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ftlib.checks import check_data
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.cpus import available_cpus
from ftlib.flags import Metavar, Position
from ftlib.paths import data_path, home, job_command, run_folder
from ftlib.settings import Between
from ftlib.text import wrapped

if TYPE_CHECKING:
    from ftlib.report.audit_page import Audit

Whole = Annotated[int, Between(0, 2**31)]
Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    data: Annotated[str, Position]
    """A prepared data set: a name below $FTLIB_HOME/data, a folder or an address."""
    out: Annotated[str, Metavar("FOLDER")] = ""
    """Where the page goes. By default audits/NAME below $FTLIB_HOME."""
    run: Annotated[str, Metavar("RUN")] = ""
    """A trained run whose features judge the labels. By default small image descriptors do."""
    max_leaks: Whole | None = None
    """Accept this many pairs of pictures, same or nearly so, across train and val."""
    max_conflicts: Whole | None = None
    """Accept this many pairs of pictures, same or nearly so, with different labels."""
    max_duplicates: Share | None = None
    """Accept pairs within a split up to this share of the pictures."""
    max_suspects: Share | None = None
    """Accept suspicious labels up to this share of those that are checked."""
    label_sample: Annotated[int, Between(1, 2**31)] = 20_000
    """Check the labels of at most this many pictures, evenly spread."""
    workers: Annotated[int, Between(0, 4096)] = 0
    """Threads that decode. 0: as many as there are CPUs."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    check_data(asked.data)
    run = run_folder(asked.run) if asked.run else ""
    with reporting(asked) as result:
        from ftlib.report.audit_page import summary, write

        found = audit_pictures(asked, run)
        out = Path(asked.out) if asked.out else home() / "audits" / found.dataset.name
        page = write(found, out)[0]
        train, val = found.train, len(found.labels) - found.train
        print(f"{found.dataset.name}: {train:,} training and {val:,} validation pictures")
        findings = {}
        for what, count, remedy in summary(found):
            line = f"  {count:7,}  {what}" + (f" ({remedy})" if count else "")
            print(wrapped(line, " " * 11))
            findings[what] = count
        print(f"page: {page}")
        if not asked.run:
            print(f"Next: {job_command('probe', shlex.quote(asked.data))}")
        too_many = exceeded(found, asked)
        result.update(page=page, findings=findings, exceeded=too_many)
        if too_many:
            print("too many: " + "; ".join(too_many), file=sys.stderr)
            raise SystemExit(1)


def audit_pictures(asked: Options, run: str) -> "Audit":
    from ftlib.console import Progress
    from ftlib.data.shards import Dataset
    from ftlib.report.audit_page import audit

    dataset = Dataset.open(data_path(asked.data))
    features = None
    if run:
        from ftlib.report.evaluation import features_of, load

        loaded = load(run)
        features = lambda data: features_of(loaded, data)  # noqa: E731
    pictures = len(dataset.split("train")) + len(dataset.split("val"))
    with Progress(
        pictures, f"checking {dataset.name}", unit="pictures", shown=not asked.quiet
    ) as progress:
        return audit(
            dataset,
            features=features,
            label_sample=asked.label_sample,
            workers=asked.workers or available_cpus(),
            tick=progress.advance,
        )


def exceeded(found: "Audit", asked: Options) -> list[str]:
    """The thresholds that are exceeded, in words."""
    pictures, checked = max(len(found.labels), 1), max(found.checked, 1)
    thresholds = [
        ("leaks", len(found.leaks), asked.max_leaks, 1),
        ("conflicts", len(found.conflicts), asked.max_conflicts, 1),
        ("duplicates", len(found.within), asked.max_duplicates, pictures),
        ("suspects", len(found.suspects), asked.max_suspects, checked),
    ]
    return [
        f"{name} {count}, more than --max-{name} {limit:g}"
        for name, count, limit, unit in thresholds
        if limit is not None and count > limit * unit
    ]


if __name__ == "__main__":
    job(main)
