"""Finished runs below a folder, as their files tell. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ftlib.paths import job_command
from ftlib.settings import ConfigError, nearest
from ftlib.storage import DamagedError, folders, join, read_json

NOT_A_STAGE = ("scratch", "imagenet", "pretrained")
"""Values of model.init_from that name no earlier run."""


@dataclass(frozen=True)
class StageRun:
    """A finished run, as a later stage looks for it."""

    name: str
    stage: str
    data: str
    """Name of its data set."""
    digest: str
    """Digest of its data set."""
    top1: float
    """Validation top-1 of its best model in percent; -inf where it is not known."""


def finished_runs(root: str) -> Iterator[StageRun]:
    """The finished runs below `root`, a folder or an address. Damaged ones are passed over."""
    for name in folders(root):
        try:
            about = read_json(join(root, name, "run.json")) or {}
            result = read_json(join(root, name, "result.json")) or {}
        except DamagedError:
            continue
        if result.get("status") == "completed":
            data = about.get("data", {})
            yield StageRun(
                name,
                stage=str(about.get("run", {}).get("stage", "")),
                data=str(data.get("name")),
                digest=str(data.get("digest")),
                top1=float(result.get("metrics", {}).get("best/val_top1", float("-inf"))),
            )


def best_of_stage(stage: str, data: str, digest: str, root: str) -> str:
    """The folder of the best finished run of `stage` on the data set with `digest`, below `root`.

    `data` is what the user calls the data set. Raises ConfigError with what there is instead.
    """
    finished = list(finished_runs(root))
    of_stage = [run for run in finished if run.stage == stage]
    matching = [run for run in of_stage if run.digest == digest]
    if not matching:
        stages = sorted({run.stage for run in finished})
        raise ConfigError(_no_run(stage, data, root, of_stage, stages))
    return join(root, max(matching, key=lambda run: (run.top1, run.name)).name)


def _no_run(
    stage: str, data: str, root: str, others: Sequence[StageRun], stages: Sequence[str]
) -> str:
    near = "" if others else nearest(stage, [*stages, *NOT_A_STAGE])
    known = ""
    if others:
        names = ", ".join(sorted(f"{run.name} (on {run.data})" for run in others)[:5])
        known = (
            f" Finished {stage} runs on other data: {names}; name one as run:NAME with "
            "--model.reset-head."
        )
    return (
        f"model.init_from = {stage}: there is no finished {stage} run on the data set {data!r} "
        f"below {root}.{near} Make one with: {job_command(stage, f'--data.path {data}')}.{known} "
        "Or start from published weights with --model.init-from pretrained"
    )
