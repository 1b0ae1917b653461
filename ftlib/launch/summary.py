"""What a launch prints at its start and end, and the note on the run's page in MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from ftlib.config import Run
from ftlib.launch.cluster import Placement
from ftlib.launch.outcome import Outcome
from ftlib.launch.progress import duration
from ftlib.paths import home
from ftlib.text import wrapped
from ftlib.track.links import place_lines
from ftlib.track.tracked_run import TrackedRun
from ftlib.training.checkpoint import step_name
from ftlib.training.initial_weights import InitialWeights


def starting(
    run: Run, run_dir: str, tracked: TrackedRun, placement: Placement, *, resumed: bool
) -> str:
    """The lines at a run's start."""
    resources = placement.resources.items()
    each = ", ".join(f"{v:g} {k}{'s' if v != 1 else ''}" for k, v in resources)
    workers = str(placement.low)
    if placement.low != placement.high:
        workers += f" to {placement.high}"
    plural = "" if workers == "1" else "s"
    verb = "going on" if resumed else "training"
    lines = [wrapped(f"{run.name}: {verb} with {workers} worker{plural} ({each} each)")]
    if run.train.microbatches > 1:
        lines.append(
            f"  a batch of {run.train.batch_size} = {run.train.microbatches} microbatches of "
            f"{run.train.microbatch_size}, shared out among the workers"
        )
    places = {"kept in": run_dir, "MLflow": tracked.charts_url}
    return "\n".join([*lines, *place_lines(places, tracked.opened_by)])


def finished(outcome: Outcome) -> str:
    """The lines at a run's end."""
    lines = [f"{outcome.name}: finished in {duration(outcome.seconds)}", *_results(outcome)]
    if not outcome.passed:
        lines.append(
            wrapped(
                "  This run failed its success criteria; the next phase will not start from it "
                'without --gates.force "reason".'
            )
        )
    return "\n".join([*lines, *_places(outcome)])


def already_finished(outcome: Outcome) -> str:
    """The lines for a command that was given again."""
    return "\n".join(
        [
            f"{outcome.name}: this run is finished already",
            *_results(outcome),
            *_places(outcome),
            "  Change a setting to make another run, or give it another --name to repeat this one.",
        ]
    )


def scores(outcome: Outcome) -> str:
    """Such as: Best val top-1 97.22 % (epoch 9), top-5 99.90 %, 3.10 points above the model ..."""
    metrics = outcome.metrics
    split = "tuning" if "best/tuning_top1" in metrics else "val"
    if f"best/{split}_top1" not in metrics:
        return "It was never scored."
    top1 = metrics[f"best/{split}_top1"]
    text = f"Best {split} top-1 {top1:.2f} %"
    if not outcome.best_dir.endswith(step_name(0)):  # a probe has no epochs
        text += f" (epoch {metrics.get('best/epoch', 0):.0f})"
    if f"best/{split}_top5" in metrics:
        text += f", top-5 {metrics[f'best/{split}_top5']:.2f} %"
    if outcome.start_top1 is not None:
        gain = top1 - outcome.start_top1
        direction = "above" if gain >= 0 else "below"
        text += f", {abs(gain):.2f} points {direction} the model it started from"
    return text + "."


def _results(outcome: Outcome) -> list[str]:
    test = [f"test split  {outcome.test}"] if outcome.test else []
    lines = [scores(outcome), *test, *map(str, outcome.gates)]
    return [wrapped(f"  {line}", "    ") for line in lines]


def _places(outcome: Outcome) -> list[str]:
    places = {
        "best model": outcome.best_dir,
        "report": next((file for file in outcome.figures if file.endswith(".html")), ""),
        "MLflow": outcome.mlflow_url,
        "all runs": outcome.compare_url,
    }
    return place_lines(places, outcome.mlflow_opened_by)


def note(outcome: Outcome, source: InitialWeights | None, report_link: str) -> str:
    """Markdown for the run's page: the result first, then where it comes from and where it is."""
    lines = [f"**{scores(outcome)}**  "]  # two spaces: the page cuts the note after few lines
    if report_link:
        lines.append(f"[Report of its errors and its calibration]({report_link})")
    lines.append("")
    if outcome.test:
        lines.append(f"- test split: {outcome.test}")
    lines += [f"- {gate}" for gate in outcome.gates]
    if source is not None:
        lines.append(f"- started from {source.label}")
    lines += [
        f"- best model: `{outcome.best_dir}`",
        f"- run folder: `{outcome.run_dir}`",
        f"- took {duration(outcome.seconds)} in this launch",
    ]
    return "\n".join(lines)


class Gain(Protocol):
    """The paired difference of two models' scores, in points, with its 95 % interval."""

    @property
    def points(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def sample(
    phases: Mapping[str, Outcome],
    changes: Mapping[str, str],
    gains: Sequence[Gain],
    commands: Sequence[tuple[str, str]],
    seconds: float,
) -> str:
    """The end of `make run`.

    Args:
        phases: what came of each phase, in order.
        changes: what each phase does, in words.
        gains: of each phase but the first over the one before.
        commands: what to do next, and how.
    """
    lines = ["", f"Done in {duration(seconds)}: top-1 on the held-out digits", ""]
    for number, (name, outcome) in enumerate(phases.items()):
        gained = ""
        if number:
            gain = gains[number - 1]
            gained = f"{gain.points:+.2f} [{gain.low:+.2f} to {gain.high:+.2f}]"
        top1 = outcome.metrics["best/val_top1"]
        lines.append(f"  {name}  {top1:6.2f} %  {gained:<24}  {changes[name]}")
    lines += ["", "  In brackets: 95 % interval of the gain, in points, over the held-out digits."]
    lines += ["", "Where it is", f"  home         {home()}"]
    for name, outcome in phases.items():
        shown = [f for f in outcome.figures if f.endswith(".html")]
        report = os.path.relpath(shown[0], outcome.run_dir) if shown else "report/"
        lines.append(f"  {name}      {outcome.run_dir}/{report}")
    lines += ["", "What next"]
    lines += [f"  {what:<28} {command}" for what, command in commands]
    return "\n".join(lines)
