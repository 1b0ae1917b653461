"""A sweep: a recipe, a space, and trials on a tuning split until the budget is used up; then a report and the winner as a recipe.

The driver's story is `sweep()`. What a trial does is in trial.py and training.py; what survives a crash is in ledger.py; Ray Tune is behind engine.py.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config import NOT_IN_FINGERPRINT, Run
from ftlib.paths import home, runs_root
from ftlib.settings import ConfigError, flat, override, to_dict, to_json
from ftlib.storage import is_remote, join, write_file
from ftlib.tune import spaces, suggest, train_trial
from ftlib.tune.live_table import Table, duration
from ftlib.tune.resources import TrialResources, room
from ftlib.tune.spaces import Space
from ftlib.tune.trial_store import Trial, TrialStore

TUNING_FRACTION = 0.1


@dataclass(frozen=True)
class Sweep:
    """What a sweep is. Everything but `trials`, `parallel` and `retry_failed` is its identity: the same name with another identity is refused."""

    recipe: Run
    recipe_name: str
    space: Space
    name: str = ""
    """Empty: SPACE-RECIPE."""
    trials: int = 32
    """All trials, the recipe's own and those of earlier starts included; may be raised later."""
    search: suggest.Search = "tpe"
    seed: int = 0
    epochs: int = 0
    """Length of a trial; 0: the recipe's."""
    tuning_fraction: float = TUNING_FRACTION
    """Part of the training images that scores the trials; a recipe that has its own keeps it."""
    early_stopping: bool = True
    grace: int = 0
    """Epochs before a trial may be stopped; 0: a ninth of a trial's length, at least 1."""
    reduction: float = 3
    """At each rung 1/reduction of the trials go on."""
    grid_points: int = 3
    """Values per continuous setting in a grid."""
    parallel: int = 0
    """Trials at once; 0: as many as the cluster holds, four on CPUs."""
    retry_failed: bool = False
    """Run trials that failed in an earlier start again."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials {self.trials}: at least 1, the recipe itself")
        if self.epochs < 0 or self.grace < 0 or self.parallel < 0:
            raise ConfigError("--epochs, --grace and --parallel must not be negative")
        if self.reduction <= 1:
            raise ConfigError(
                f"--reduction {self.reduction:g}: must be above 1; 3 lets a third of the trials go on"
            )
        if not self.name:
            object.__setattr__(self, "name", f"{self.space.name}-{Path(self.recipe_name).stem}")

    @property
    def base(self) -> Run:
        """The recipe as the trials run it: scored on a tuning split, at the trials' length."""
        changes: dict[str, Any] = {}
        if not self.recipe.data.tuning_fraction:
            if not 0 < self.tuning_fraction <= 0.5:
                raise ConfigError(
                    f"--tuning-fraction {self.tuning_fraction:g}: needs more than 0 and at most 0.5; the validation set is not for choosing"
                )
            changes["data.tuning_fraction"] = self.tuning_fraction
        if self.epochs:
            changes["train.epochs"] = self.epochs
        return override(self.recipe, changes)

    @property
    def first_rung(self) -> int:
        return self.grace or max(1, self.base.train.epochs // 9)

    def identity(self, basis: train_trial.SweepInputs) -> dict[str, Any]:
        kept = {
            p: list(v) if isinstance(v, tuple) else v
            for p, v in flat(self.base).items()
            if not any(
                p == o or p.startswith(o + ".") for o in (*NOT_IN_FINGERPRINT, "model.init_from")
            )
        }
        early = (
            {"grace": self.first_rung, "reduction": float(self.reduction)}
            if self.early_stopping
            else "off"
        )
        return {
            "recipe": kept,
            "space": self.space.describe(),
            "points": json.loads(json.dumps(self.space.points)),
            "search": self.search,
            "seed": self.seed,
            "early stopping": early,
            "data": basis.data_digest,
            "starting weights": basis.init_sha256,
        }


@dataclass(frozen=True)
class Result:
    """What a sweep found so far."""

    ledger: TrialStore
    finished: bool
    """False when a signal ended it before its last trial."""
    best: Trial | None
    report: str
    """Folder with index.html, the figures and best.json; empty when nothing was scored."""
    mlflow_url: str
    seconds: float


def sweep(
    plan: Sweep,
    *,
    check: Callable[[Run], train_trial.SweepInputs] = train_trial.check,
    train: Callable[..., dict[str, Any]] = train_trial.train_run,
    tracking_for: Callable[..., Any] | None = None,
    out: Any = None,
) -> Result:
    """Run the sweep, or go on with it, or (all trials done) write its report again. Ends in order after Ctrl-C or SIGTERM.

    `check`, `train` and `tracking_for` are replaced in tests. Raises ConfigError, DataError, LaunchError, TrackingError before anything starts.
    """
    started = time.monotonic()
    base = plan.base
    spaces.check(plan.space, base)
    basis = check(base)
    ledger = TrialStore(runs_root(plan.recipe), plan.name)
    with ledger.lock():
        resumed = ledger.open(
            plan.identity(basis),
            {
                "kind": "sweep",
                "recipe": to_dict(plan.recipe),
                "recipe_name": plan.recipe_name,
                "base": to_dict(base),
                "space_name": plan.space.name,
                "space": plan.space.describe(),
                "axes": [a.path for a in plan.space.axes],
                "constants": dict(plan.space.constants),
                "split": "tuning",
                "data": {"name": basis.data_name, "digest": basis.data_digest},
                "init": {"uri": basis.init_uri, "sha256": basis.init_sha256},
                "seed": plan.seed,
                "search": plan.search,
            },
        )
        if plan.retry_failed:
            for trial in [t for t in ledger.done() if t.outcome == "failed"]:
                trial.outcome = trial.reason = ""
                ledger.save(trial)
        basis = replace(basis, init_uri=ledger.about["init"]["uri"] or basis.init_uri)
        total = int(min(plan.trials, suggest.size(plan.space, base, plan.search, plan.grid_points)))
        left = total - len(ledger.done())
        place = connect(base, left, plan.parallel) if left > 0 else TrialResources(1, {}, True)
        names = spaces.short_names(plan.space)
        table = Table(ledger.trials, names, total, base.train.epochs, place.slots, "tuning", out)
        tracking, parent = _open(plan, ledger, base, basis, tracking_for)
        with tracking:
            table.say(
                f"sweep {plan.name}: {'goes on with' if resumed else ''} {total} trials of {base.train.epochs} epochs over {', '.join(names.values())}; {words(place) if left > 0 else 'all done'}; "
                f"scored on {base.data.tuning_fraction:.0%} of the training images".replace(
                    ":  ", ": "
                )
            )
            if parent.url:
                table.say(f"MLflow: {parent.url}")
            keeper = TrialListener(
                ledger,
                table,
                tracking,
                parent.reference,
                base,
                plan.space.constants,
                {"sweep": plan.name, "space": plan.space.name},
                "trial",
                place.local,
            )
            finished = True
            if left > 0:
                finished = _run(
                    plan, base, basis, ledger, total, place, tracking, parent, keeper, table, train
                )
            result = _conclude(
                plan, ledger, total, tracking, parent, keeper, finished, time.monotonic() - started
            )
        table.say(sentence(plan, result, total))
    return result


def _run(
    plan: Sweep,
    base: Run,
    basis: train_trial.SweepInputs,
    ledger: TrialStore,
    total: int,
    place: TrialResources,
    tracking: Any,
    parent: Any,
    keeper: TrialListener,
    table: Table,
    train: Callable[..., dict[str, Any]],
) -> bool:
    from ftlib.tune import ray_tune
    from ftlib.tune.asha import AsynchronousHalving

    halving = None
    if plan.early_stopping:
        halving = AsynchronousHalving(base.train.epochs, plan.first_rung, plan.reduction)
        halving.replay(ledger.trials.values())
    waiting = sorted(ledger.open_trials(), key=lambda t: t.number)

    def next_trial() -> Trial | None:
        if waiting:
            return waiting.pop(0)
        number = ledger.about["proposed"]
        if number >= total:
            return None
        trial = suggest.propose(
            number,
            plan.space,
            base,
            list(ledger.trials.values()),
            plan.search,
            plan.seed,
            plan.grid_points,
        )
        if trial is not None:
            ledger.add(trial)
        return trial

    shared = train_trial.TrialContext(
        "tuning", place.local, "trial", keeper.tags, parent.reference, tracking.handle()
    )
    groups = ray_tune.placement_groups()
    with table:
        finished = ray_tune.execute(
            next_trial,
            lambda trial: keeper.config(trial, basis, place),
            functools.partial(train, shared),
            keeper,
            resources=place.resources,
            slots=place.slots,
            halving=halving,
            reuse=place.local,
        )
    ray_tune.remove_placement_groups(groups)
    return finished


class TrialListener:
    """Listens to the engine: writes the ledger, feeds the table, and sees to it that no trial's MLflow run stays open."""

    def __init__(
        self,
        ledger: TrialStore,
        table: Table,
        tracking: Any,
        parent: str,
        base: Run,
        constants: Mapping[str, Any],
        tags: Mapping[str, str],
        kind: str,
        local: bool,
    ) -> None:
        (
            self.ledger,
            self.table,
            self.tracking,
            self.parent,
            self.base,
            self.constants,
            self.tags,
            self.kind,
            self.local,
        ) = ledger, table, tracking, parent, base, constants, tags, kind, local
        self.mlflow = ThreadPoolExecutor(1, thread_name_prefix="sweep-mlflow")
        self.ended_here: list[tuple[Trial, str]] = []

    # --- what a trial is called and shown as ---

    def run_of(self, trial: Trial) -> Run:
        """The recipe with the trial's values and seed. The recipe's own trial is the recipe itself, without the space's constants."""
        run = with_values(self.base, trial, self.constants)
        return run if trial.seed is None else replace(run, seed=trial.seed)

    def title(self, trial: Trial) -> str:
        if trial.seed is not None:
            return trial.label
        return (
            f"{trial.name} recipe"
            if trial.origin == "recipe"
            else train_trial.title(trial.name, trial.values)
        )

    def params(self, trial: Trial) -> dict[str, Any]:
        """The searched settings as MLflow parameters, under the names that the tracking package gives to those it always logs."""
        return {param(p): v for p, v in trial.values.items()}

    def config(
        self, trial: Trial, basis: train_trial.SweepInputs, place: TrialResources
    ) -> dict[str, Any]:
        """What goes to the trial's process."""
        run = train_trial.variant(
            self.run_of(trial), self.ledger.trials_root(), basis, place.each, name=trial.name
        )
        tags = {} if trial.seed is None else {"config_id": trial.origin}
        return {
            "number": trial.number,
            "name": trial.label,
            "run": to_dict(run),
            "title": self.title(trial),
            "params": self.params(trial),
            "tags": tags,
        }

    # --- the engine's listener ---

    def started(self, number: int) -> None:
        self.table.started(self.ledger.trials[number])

    def progressed(self, number: int, point: dict[str, float]) -> None:
        trial = self.ledger.trials[number]
        trial.record(point)
        self.ledger.save(trial)
        self.table.progressed(trial)

    def ended(self, number: int, outcome: str, reason: str, result: dict[str, Any]) -> None:
        trial = self.ledger.trials[number]
        self.ended_here.append((trial, outcome))
        if outcome != "interrupted":
            trial.outcome, trial.reason = outcome, reason
            trial.history = result.pop("history", None) or trial.history
            trial.result = result
            self.ledger.save(trial)
        self.table.ended(trial, outcome)
        if outcome == "failed":
            self.mlflow.submit(self._failed, trial)
        elif outcome == "completed" and result.get("found"):
            self.mlflow.submit(self._found, trial)
        elif outcome == "pruned" and not self.local:
            self.mlflow.submit(self.tracking.end_orphan, self.title(trial), "pruned", reason)

    def _reopened(self, trial: Trial) -> Any:
        tags = {"kind": self.kind, "trial": trial.label, **self.tags, "reason": ""}
        return self.tracking.start_run(
            self.title(trial), tags=tags, params=self.params(trial), parent=self.parent
        )

    def _found(self, trial: Trial) -> None:
        """The driver died between the end of its training and that of its MLflow run, which is ended here."""
        run = self._reopened(trial)
        run.writer().metrics(
            {k: v for k, v in trial.result.get("metrics", {}).items() if isinstance(v, float)},
            step=0,
        )
        run.finish("completed")

    def _failed(self, trial: Trial) -> None:
        """Its run in MLflow, made here if it failed before it had one, says why."""
        run = self._reopened(trial)
        if trace := trial.result.get("traceback"):
            run.writer().text(trace, "errors/traceback.txt")
        run.finish("failed", trial.reason)

    def close(self) -> None:
        """End the MLflow runs of trials whose processes were stopped before they could do it."""
        self.mlflow.shutdown(wait=True)
        for trial, outcome in self.ended_here:
            if outcome in ("pruned", "interrupted"):
                self.tracking.end_orphan(
                    self.title(trial),
                    "pruned" if outcome == "pruned" else "killed",
                    trial.reason or "the sweep was stopped",
                )


def param(path: str) -> str:
    """The name of a setting in MLflow, which allows no brackets: augment.crop_scale[0] is crop_scale_0."""
    from ftlib.track.logged_params import short_name

    return short_name(path).replace("[", "_").replace("]", "")


def with_values(recipe: Run, trial: Trial, constants: Mapping[str, Any]) -> Run:
    """The whole recipe with a trial's values."""
    return (
        recipe if trial.origin == "recipe" else spaces.apply(recipe, {**constants, **trial.values})
    )


def connect(run: Run, trials: int, parallel: int) -> TrialResources:
    from ftlib.launch import cluster
    from ftlib.tune import ray_tune

    ray_tune.preload()
    cluster.connect(dashboard=run.cluster.high > 1)
    cluster.refuse_open(run.cluster.allow_open)
    return room(run, cluster.capacity(), trials, parallel)


def words(place: TrialResources) -> str:
    each = " and ".join(f"{v:g} {k}{'s' if v != 1 else ''}" for k, v in place.each.items())
    return f"{place.slots} at once with {each}{'' if place.local else ' per worker'}"


def journal_dir(ledger: TrialStore) -> Path:
    return (
        home() / "runs" / ledger.name if is_remote(ledger.uri) else Path(ledger.uri)
    ) / "journal"


def _open(
    plan: Sweep,
    ledger: TrialStore,
    base: Run,
    basis: train_trial.SweepInputs,
    tracking_for: Callable[..., Any] | None,
) -> tuple[Any, Any]:
    """Tracking and the sweep's parent run, with its saved views."""
    from ftlib.track.lineage import run_tags
    from ftlib.track.logged_params import params_of
    from ftlib.track.tracking import open_tracking
    from ftlib.track.views import sweep_view

    known = ledger.about.get("mlflow_run_id", "")
    tracking = (tracking_for or open_tracking)(
        base.track,
        experiment=basis.data_name,
        journal_dir=journal_dir(ledger),
        resuming=bool(known),
    )
    tags = run_tags(
        base,
        kind="sweep",
        dataset=(basis.data_name, basis.data_digest),
        sweep=plan.name,
        extra={"space": plan.space.name, "recipe": plan.recipe_name, "search": plan.search},
    )
    parent = tracking.start_run(
        f"sweep {plan.name}", tags=tags, params=params_of(base), run_id=known or None
    )
    if known:
        parent.writer().tags({"reason": ""})
    params = [param(p) for p in ledger.about["axes"]]
    for view in (
        sweep_view(plan.name, params, "tuning"),
        sweep_view(plan.name, params, "tuning", finished_only=False),
    ):
        parent.save_view(view)
    if parent.run_id and parent.run_id != known:
        ledger.save_about(mlflow_run_id=parent.run_id)
    return tracking, parent


def _conclude(
    plan: Sweep,
    ledger: TrialStore,
    total: int,
    tracking: Any,
    parent: Any,
    keeper: TrialListener,
    finished: bool,
    seconds: float,
) -> Result:
    """End the trials' runs, write the report and best.json, end the parent run."""
    from ftlib.track.views import sweep_view
    from ftlib.tune.report import best_trial, note, write_report

    if not finished:
        # `ray job stop` gives 3 s: the runs' ends first, the report with the next start.
        keeper.close()
        parent.finish(
            "killed",
            f"stopped after {len(ledger.done())} of {total} trials; the same command goes on",
        )
        return Result(ledger, False, best_trial(ledger), "", parent.url, seconds)
    keeper.close()
    best, folder = best_trial(ledger), ""
    if best is not None:
        local = journal_dir(ledger).parent / "report"
        recipe = replace(with_values(plan.recipe, best, plan.space.constants), name="")
        ledger_url = parent.view_link(
            sweep_view(plan.name, [param(p) for p in ledger.about["axes"]], "tuning")
        )
        files = write_report(ledger, plan.space, local)
        best_file = local / "best.json"
        best_file.write_text(to_json(recipe))
        if is_remote(ledger.uri):
            for file in [*files, best_file]:
                write_file(join(ledger.uri, "report", file.name), file.read_bytes())
        writer = parent.writer()
        for file in files:
            writer.artifact(str(file), "report")
        writer.artifact(str(best_file))
        own = ledger.trials[0].score if 0 in ledger.trials else None
        writer.metrics(
            {
                "best/tuning_top1": best.score,
                **({"recipe/tuning_top1": own} if own is not None else {}),
                **{
                    f"trials/{o}": float(sum(t.outcome == o for t in ledger.trials.values()))
                    for o in ("completed", "pruned", "failed")
                },
            },
            step=0,
        )
        writer.tags({"best_trial": best.name})
        folder = str(local)
        parent.finish(
            "completed",
            note(ledger, plan.space, ledger_url, parent.artifact_link("report/index.html")),
        )
    else:
        parent.finish(
            "failed",
            "no trial finished: "
            + next((t.reason for t in ledger.trials.values() if t.reason), "unknown"),
        )
    return Result(ledger, True, best, folder, parent.url, seconds)


def sentence(plan: Sweep, result: Result, total: int) -> str:
    """What the terminal says at the end."""
    done = result.ledger.done()
    if not result.finished:
        return f"stopped after {len(done)} of {total} trials. The same command goes on"
    failed = [t for t in done if t.outcome == "failed"]
    if result.best is None:
        return (
            f"all {len(done)} trials failed. The first: {failed[0].reason if failed else 'unknown'}"
        )
    own = result.ledger.trials[0]
    against = (
        f" against the recipe's {own.score:.2f} %"
        if own.score is not None and result.best.number
        else ""
    )
    pruned = sum(t.outcome == "pruned" for t in done)
    lines = [
        f"best of {len(done)} trials ({pruned} stopped early, {len(failed)} failed) in {duration(result.seconds)}: {result.best.name} with {result.best.score:.2f} % of the tuning split{against}",
        f"  {suggest.describe(result.best.values, spaces.short_names(plan.space))}",
        f"report: {result.report}/index.html",
        f"one run each is no proof: python jobs/promote.py {plan.name} --top 3 --seeds 5 confirms it over seeds on the validation set",
    ]
    return "\n".join(lines)
