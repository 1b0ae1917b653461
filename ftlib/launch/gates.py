"""Success criteria of a run, checked at its end. No phase starts from a model that failed them, or
that was trained on the images that score it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftlib.config import Gates, Run
from ftlib.data import sampler
from ftlib.data.shards import Dataset
from ftlib.launch.errors import LaunchError
from ftlib.training import seen_rows
from ftlib.training.initial_weights import InitialWeights


@dataclass(frozen=True)
class Gate:
    """One criterion and its result."""

    name: str
    """The setting's name, such as val_top1."""
    wanted: float
    """Percent or points."""
    got: float | None
    """None when it could not be measured, which fails the gate."""
    passed: bool

    def __str__(self) -> str:
        words = {
            "val_top1": "best validation top-1 at least",
            "max_gap": "train minus validation top-1 at most",
            "gain": "gain over the starting model at least",
        }
        got = "not measured" if self.got is None else f"{self.got:.2f}"
        if self.name == "max_gap" and self.got is not None and self.got < 0:
            got += " (training is scored on mixed and augmented pictures)"
        return f"{'passed' if self.passed else 'FAILED'}  {words[self.name]} {self.wanted:g}: {got}"


def check(gates: Gates, metrics: Mapping[str, float], start_top1: float | None) -> list[Gate]:
    """The gates that are set, against a finished run's metrics (percent).

    Args:
        metrics: best/val_top1 (or best/tuning_top1) and final/gap.
        start_top1: the validation score of the model the run started from; None for none.
    """
    best = _first(metrics, "best/val_top1", "best/tuning_top1")
    gap = _first(metrics, "final/gap")
    gain = None if best is None or start_top1 is None else best - start_top1
    off = Gates()
    checked = []
    if gates.val_top1 != off.val_top1:
        checked.append(
            Gate("val_top1", gates.val_top1, best, best is not None and best >= gates.val_top1)
        )
    if gates.max_gap != off.max_gap:
        checked.append(
            Gate("max_gap", gates.max_gap, gap, gap is not None and gap <= gates.max_gap)
        )
    if gates.gain != off.gain:
        checked.append(Gate("gain", gates.gain, gain, gain is not None and gain >= gates.gain))
    return checked


def as_json(gates: Sequence[Gate]) -> dict[str, Any]:
    """{"passed": bool, "gates": [...]}, for result.json."""
    return {"passed": all(g.passed for g in gates), "gates": [asdict(g) for g in gates]}


def tags(gates: Sequence[Gate]) -> dict[str, str]:
    """MLflow tags: `gates` = passed, failed or none, and one per gate."""
    each = {f"gate.{g.name}": "passed" if g.passed else "failed" for g in gates}
    overall = "failed" if "failed" in each.values() else "passed"
    return {"gates": overall if each else "none", **each}


def refuse_failed(run: Run, source_name: str, result: Mapping[str, Any]) -> str:
    """Refuse to start from a model whose run failed its gates, unless gates.force gives a reason.

    Returns what to record, or ''. Raises LaunchError.
    """
    outcome = result.get("gates") or {}
    failed = [g for g in outcome.get("gates", []) if not g.get("passed")]
    if not failed:
        return ""
    what = "; ".join(_wanted_and_got(gate) for gate in failed)
    if run.gates.force:
        return (
            f"started from {source_name}, which failed its gates ({what}), "
            f"because: {run.gates.force}"
        )
    raise LaunchError(
        f"model.init_from = {run.model.init_from}: {source_name} failed its success criteria "
        f"({what}). Improve that phase, set its --gates to what you expect of your data, or start "
        'all the same with --gates.force "the reason"'
    )


def refuse_seen(run: Run, dataset: Dataset, source: InitialWeights, root: str) -> str:
    """Refuse to choose the best epoch on images that the starting weights were trained on, unless
    gates.force gives a reason.

    Returns what to record, or ''. Raises LaunchError.
    """
    seen = seen_rows.of_weights(source, run.model.init_from, root, dataset)
    if run.data.tuning_fraction:
        _, rows = sampler.run_rows(dataset.split("train").labels, run.data)
        hits, name = seen.in_split(dataset, "train")[0][rows], "tuning"
        remedy = (
            "Set data.tuning_source = reserve, where the runs before had a data.subset below 1, or "
            "leave the same data.tuning_fraction aside in those"
        )
    else:
        hits, name = seen.in_split(dataset, "val")[0], "validation"
        remedy = "Prepare the data set again with the validation images that those runs had"
    if not hits.any():
        return ""
    weights = " and before it ".join(seen.runs)
    what = f"of the {len(hits):,} {name} images {weights} had trained on {hits.sum():,}"
    if run.gates.force:
        return f"{what}; started all the same, because: {run.gates.force}"
    raise LaunchError(
        f"model.init_from = {run.model.init_from}: {what}, so their scores would be too high, and "
        f"they choose the best epoch. {remedy}; or start from other weights, or all the same with "
        '--gates.force "the reason"'
    )


def _wanted_and_got(gate: Mapping[str, Any]) -> str:
    got = "nothing" if gate["got"] is None else f"{gate['got']:.2f}"
    return f"{gate['name']} wanted {gate['wanted']:g}, got {got}"


def _first(metrics: Mapping[str, float], *names: str) -> float | None:
    return next(
        (float(metrics[n]) for n in names if n in metrics and math.isfinite(metrics[n])), None
    )
