"""A sweep: trials of a recipe over a space, scored on a tuning split; a report; the best recipe.

`sweep()` is the driver. Ray Tune is behind ray_tune.py, a trial's training in train_trial.py, the
files that survive a crash in trial_store.py, what sweeps share with promotions in trial_runs.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.config import NOT_IN_FINGERPRINT, Run
from ftlib.launch.progress import duration
from ftlib.paths import local_run_folder, runs_root
from ftlib.settings import flat, override, to_dict, to_json
from ftlib.storage import is_remote, join, write_file
from ftlib.text import wrapped
from ftlib.track.links import place_lines
from ftlib.tune import optuna_journal, spaces, suggest, tuning_split
from ftlib.tune.budget import TimeBudget
from ftlib.tune.live_table import TrialTable
from ftlib.tune.options import SweepOptions
from ftlib.tune.optuna_journal import OptunaJournal
from ftlib.tune.promotion_plan import plan_promotion
from ftlib.tune.resources import NOTHING_TO_RUN
from ftlib.tune.spaces import Space
from ftlib.tune.train_trial import SweepInputs
from ftlib.tune.trial_runs import (
    DEFAULT_HOOKS,
    Hooks,
    OpenGroup,
    OpenTracking,
    ParentRun,
    TrialGroup,
    connect,
    open_parent,
    param_name,
    run_trials,
    with_values,
)
from ftlib.tune.trial_store import Trial, TrialStore, leaf_defaults
from ftlib.tune.tuning_split import TuningSplit

if TYPE_CHECKING:
    from ftlib.track.tracked_run import TrackedRun
    from ftlib.track.tracking import Tracking
    from ftlib.track.views import View
    from ftlib.tune.asha import AsynchronousHalving


@dataclass(frozen=True)
class Sweep(SweepOptions):
    """A sweep: its recipe, its space and its options.

    All but `trials`, `budget`, `parallel` and `retry_failed` are its identity: a sweep of the same
    name and another identity is refused.
    """

    recipe: Run
    recipe_name: str
    space: Space

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            object.__setattr__(self, "name", f"{self.space.name}-{Path(self.recipe_name).stem}")

    @property
    def first_rung(self) -> int:
        """Epochs before a trial may be stopped: after the first, scores say little yet of the last
        (docs/search.md)."""
        return self.grace or max(2, (self.epochs or self.recipe.train.epochs) // 9)

    def base(self, split: TuningSplit) -> Run:
        """The recipe as the trials run it: scored on a tuning split, at the trials' length."""
        epochs = {"train.epochs": self.epochs} if self.epochs else {}
        return override(self.recipe, {**split.changes, **epochs})

    def identity(self, base: Run, inputs: SweepInputs) -> dict[str, Any]:
        """What must be equal for a sweep to go on, as JSON."""
        left_out = (*NOT_IN_FINGERPRINT, "model.init_from")
        recipe = {
            path: list(value) if isinstance(value, tuple) else value
            for path, value in flat(base).items()
            if not any(path == out or path.startswith(out + ".") for out in left_out)
        }
        early_stopping: Any = "off"
        if self.early_stopping:
            early_stopping = {"grace": self.first_rung, "reduction": float(self.reduction)}
        return {
            "recipe": recipe,
            "space": self.space.describe(),
            "points": json.loads(json.dumps(self.space.points)),
            "search": self.search,
            "seed": self.seed,
            "early stopping": early_stopping,
            "data": inputs.data_digest,
            "starting weights": inputs.init_sha256,
        }

    def about(self, base: Run, inputs: SweepInputs, split: TuningSplit) -> dict[str, Any]:
        """What sweep.json keeps beside the identity, for reports and promotions."""
        return {
            "kind": "sweep",
            "recipe": to_dict(self.recipe),
            "recipe_name": self.recipe_name,
            "base": to_dict(base),
            "space_name": self.space.name,
            "space": self.space.describe(),
            "axes": [a.path for a in self.space.axes],
            "constants": dict(self.space.constants),
            "split": "tuning",
            "tuning": {"images": split.images, "seen": split.seen},
            "val_images": inputs.val_images,
            "data": {"name": inputs.data_name, "digest": inputs.data_digest},
            "init": {"uri": inputs.init_uri, "sha256": inputs.init_sha256},
            "seed": self.seed,
            "search": self.search,
        }


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found so far."""

    store: TrialStore
    finished: bool
    """False when a signal ended it before its last trial."""
    best: Trial | None
    report: str = ""
    """Folder with index.html, the figures and best.json; empty when nothing was scored."""
    mlflow_url: str = ""
    seconds: float = 0.0


def sweep(plan: Sweep, hooks: Hooks = DEFAULT_HOOKS) -> SweepResult:
    """Run the sweep, or go on with it, or (all trials done) write its report again.

    Ctrl-C and SIGTERM end it in order.
    Raises ConfigError, DataError, LaunchError or TrackingError before anything starts.
    """
    started = time.monotonic()
    inputs = hooks.check(plan.recipe)
    store = TrialStore(runs_root(plan.recipe), plan.name)
    inputs = inputs.at(store.uri)
    with store.lock():
        plan = _with_known_grace(plan, store)
        split = _tuning_split(plan, store, inputs)
        base = plan.base(split)
        spaces.check(plan.space, base)
        resumed = store.open(
            plan.identity(base, inputs), plan.about(base, inputs, split), leaf_defaults(base)
        )
        if plan.retry_failed:
            for trial in store.done():
                if trial.outcome == "failed":
                    store.reopen(trial)
        inputs = replace(inputs, init_uri=store.about["init"]["uri"] or inputs.init_uri)
        inputs.copy_weights(store.uri)
        group = TrialGroup(
            store=store,
            base=base,
            inputs=inputs,
            split="tuning",
            kind="trial",
            tags={"sweep": plan.name, "space": plan.space.name},
            constants=plan.space.constants,
        )
        searched = ", ".join(spaces.short_names(plan.space).values())
        title = (
            f"sweep {plan.name}: {'goes on with ' if resumed else ''}{plan.trials} trials of "
            f"{base.train.epochs} epochs over {searched}; "
            f"{tuning_split.describe(split, inputs.unchecked)}"
        )
        result = _run(plan, group, title, hooks)
    return replace(result, seconds=time.monotonic() - started)


def _run(plan: Sweep, group: TrialGroup, title: str, hooks: Hooks) -> SweepResult:
    """Run what is left of an opened sweep, and conclude it. `title` is what is printed first."""
    store, base = group.store, group.base
    began = time.monotonic()
    budget = TimeBudget(store, plan.budget_seconds)
    most = suggest.size(plan.space, base, plan.search, plan.grid_points)
    total = int(min(plan.trials, most))
    left = total - len(store.done())
    if left > 0 and not budget.allows_another():
        left = 0
    resources = connect(base, left, plan.parallel) if left > 0 else NOTHING_TO_RUN
    table = TrialTable(
        store.trials,
        spaces.short_names(plan.space),
        total=total,
        epochs=base.train.epochs,
        slots=resources.slots,
        split="tuning",
        out=hooks.out,
    )
    tracking, parent = _open(plan, group, hooks.open_tracking)
    with tracking:
        table.say(wrapped(f"{title}; {resources if left > 0 else 'nothing left to run'}"))
        places = {"kept in": store.uri, "MLflow": parent.view_url(_view(plan))}
        table.say("\n".join(place_lines(places, parent.opened_by)))
        finished = True
        if left > 0:
            store.save_about(slots=resources.slots)
            journal = OptunaJournal(_optuna_file(store), plan.name, plan.space)
            journal.start(store.trials.values())
            finished = run_trials(
                OpenGroup(group, resources, tracking, parent, table),
                _proposals(plan, base, store, total, budget),
                hooks.train,
                halving=_halving(plan, store),
                listeners=(budget, journal),
            )
        seconds = time.monotonic() - began
        if finished:
            result = _conclude(plan, store, parent, seconds)
        else:
            result = _stop(store, total, parent, seconds)
    table.say(sentence(plan, result, total, budget))
    return result


def _optuna_file(store: TrialStore) -> Path:
    return local_run_folder(store.uri) / optuna_journal.FILE


def _with_known_grace(plan: Sweep, store: TrialStore) -> Sweep:
    """`plan` with the default grace that its sweep began with: an earlier version had another."""
    if plan.grace or not store.read():
        return plan
    known = store.about["identity"]["early stopping"]
    return plan if known == "off" else replace(plan, grace=known["grace"])


def _tuning_split(plan: Sweep, store: TrialStore, inputs: SweepInputs) -> TuningSplit:
    """The split that the sweep began with, or one of unseen images for a new sweep."""
    data = plan.recipe.data
    if not store.read() or "base" not in store.about:
        return tuning_split.choose(data, inputs, plan.tuning_fraction)
    known = store.about["base"]["data"]
    fraction = data.tuning_fraction or plan.tuning_fraction or known["tuning_fraction"]
    source = known.get("tuning_source", "subset")
    return tuning_split.measure(data, inputs, source, fraction)


def _proposals(
    plan: Sweep, base: Run, store: TrialStore, total: int, budget: TimeBudget
) -> Callable[[], Trial | None]:
    """A function that returns the next trial to run, and None when there is none left."""
    waiting = sorted(store.open_trials(), key=lambda t: t.number)

    def next_trial() -> Trial | None:
        if (waiting or store.about["proposed"] < total) and not budget.allows_another():
            return None
        if waiting:
            return waiting.pop(0)
        number = store.about["proposed"]
        if number >= total:
            return None
        trial = suggest.propose(
            number,
            plan.space,
            base,
            list(store.trials.values()),
            search=plan.search,
            seed=plan.seed,
            grid_points=plan.grid_points,
        )
        if trial is not None:
            store.add(trial)
        return trial

    return next_trial


def _halving(plan: Sweep, store: TrialStore) -> AsynchronousHalving | None:
    from ftlib.tune.asha import AsynchronousHalving

    if not plan.early_stopping:
        return None
    halving = AsynchronousHalving(
        plan.epochs or plan.recipe.train.epochs, plan.first_rung, plan.reduction
    )
    halving.replay(store.trials.values())
    return halving


def _view(plan: Sweep, *, finished_only: bool = False) -> View:
    from ftlib.track.views import sweep_view

    params = [param_name(a.path) for a in plan.space.axes]
    return sweep_view(plan.name, params, "tuning", finished_only=finished_only)


def _open(
    plan: Sweep, group: TrialGroup, open_tracking: OpenTracking | None
) -> tuple[Tracking, TrackedRun]:
    """Tracking and the sweep's parent run, with its saved views."""
    tags = {"space": plan.space.name, "recipe": plan.recipe_name, "search": plan.search}
    run = ParentRun(
        title=f"sweep {plan.name}",
        kind="sweep",
        sweep=plan.name,
        journal=local_run_folder(group.store.uri) / "journal",
        tags=tags,
    )
    goes_on = bool(group.store.about.get("mlflow_run_id"))
    tracking, parent = open_parent(group, run, open_tracking)
    if goes_on:
        parent.writer().tags({"reason": ""})
    for view in (_view(plan), _view(plan, finished_only=True)):
        parent.save_view(view)
    return tracking, parent


def _stop(store: TrialStore, total: int, parent: TrackedRun, seconds: float) -> SweepResult:
    """End the parent run after a signal. `ray job stop` gives 3 s; the report is written later."""
    from ftlib.tune.report import best_trial

    done = len(store.done())
    parent.finish("killed", f"stopped after {done} of {total} trials; the same command goes on")
    return SweepResult(store, False, best_trial(store), mlflow_url=parent.url, seconds=seconds)


def _conclude(plan: Sweep, store: TrialStore, parent: TrackedRun, seconds: float) -> SweepResult:
    """Write the report and best.json, and end the parent run."""
    from ftlib.tune.report import best_trial, note

    best = best_trial(store)
    if best is None:
        reasons = (t.reason for t in store.trials.values() if t.reason)
        parent.finish("failed", f"no trial finished: {next(reasons, 'unknown')}")
        return SweepResult(store, True, None, mlflow_url=parent.url, seconds=seconds)
    folder = local_run_folder(store.uri) / "report"
    files = _write_results(plan, store, best, folder)
    writer = parent.writer()
    for file in files:
        writer.artifact(str(file), "" if file.name == "best.json" else "report")
    own = store.trials[0].score if 0 in store.trials else None
    metrics = {"best/tuning_top1": best.score, "recipe/tuning_top1": own}
    for outcome in ("completed", "pruned", "failed"):
        count = sum(t.outcome == outcome for t in store.trials.values())
        metrics[f"trials/{outcome}"] = float(count)
    writer.metrics({k: v for k, v in metrics.items() if v is not None}, step=0)
    writer.tags({"best_trial": best.name})
    view = parent.view_link(_view(plan))
    parent.finish(
        "completed",
        note(store, plan.space, view, parent.artifact_link("report/index.html")),
    )
    return SweepResult(store, True, best, str(folder), mlflow_url=parent.url, seconds=seconds)


def _write_results(plan: Sweep, store: TrialStore, best: Trial, folder: Path) -> list[Path]:
    """The report's files and best.json, in `folder` and beside a remote store."""
    from ftlib.tune.report import write_report

    files = write_report(store, plan.space, folder)
    recipe = with_values(plan.recipe, best, plan.space.constants)
    files.append(folder / "best.json")
    write_file(str(files[-1]), to_json(replace(recipe, name="")).encode())
    if is_remote(store.uri):
        for file in files:
            write_file(join(store.uri, "report", file.name), file.read_bytes())
    return files


def sentence(plan: Sweep, result: SweepResult, total: int, budget: TimeBudget) -> str:
    """What the terminal says at the end."""
    done = result.store.done()
    if not result.finished:
        return f"stopped after {len(done)} of {total} trials. The same command goes on"
    out_of_time = ""
    if budget.refused:
        out_of_time = "\n" + wrapped(
            f"the budget is used up ({budget}) after {len(done)} of {total} trials; "
            "the same command with a larger --budget goes on"
        )
    from ftlib.tune.report import headline, scored_on

    failed = [t for t in done if t.outcome == "failed"]
    if result.best is None:
        if not done:
            return "no trial was run" + out_of_time
        why = failed[0].reason if failed else "unknown"
        return wrapped(f"all {len(done)} trials failed. The first: {why}") + out_of_time
    pruned = sum(t.outcome == "pruned" for t in done)
    promotion = plan_promotion(result.store)
    lines = [
        f"{len(done)} trials ({pruned} stopped early, {len(failed)} failed) in "
        f"{duration(budget.spent)}.{out_of_time}",
        wrapped(headline(result.store, plan.space)),
    ]
    if scored := scored_on(result.store):
        lines.append(f"Each score is of {scored}.")
    if result.best.number:
        lines.append(wrapped(promotion.reason))
    if promotion.worth:
        lines += [f"To confirm it ({promotion.cost}):", f"  {promotion.command}"]
    return "\n".join([*lines, f"report: {result.report}/index.html"])
