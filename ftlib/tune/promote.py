"""Promotion: the best trials of a sweep and the unchanged recipe, trained again over several seeds.

The best of many trials is mostly luck. So no candidate is judged by the scores that chose it: the
sweep chooses on the tuning split, and the test here is on validation images that no trial has seen,
at the recipe's full length, paired by seed and image, and corrected for the number of candidates
(verdict.py, statistics.py).
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config import Run
from ftlib.launch.errors import RunFailedError
from ftlib.paths import job_command, jobs_folder, local_run_folder
from ftlib.settings import ConfigError, flat, from_dict, nearest, override, to_json
from ftlib.storage import delete_file, is_remote, join, write_file
from ftlib.text import wrapped
from ftlib.track.links import place_lines
from ftlib.tune import promotion_report
from ftlib.tune.compare import BUDGET, settings
from ftlib.tune.live_table import TrialTable
from ftlib.tune.resources import NOTHING_TO_RUN
from ftlib.tune.stored_predictions import ComparisonError
from ftlib.tune.train_trial import SweepInputs
from ftlib.tune.trial_runs import (
    DEFAULT_HOOKS,
    Hooks,
    OpenGroup,
    ParentRun,
    TrialGroup,
    connect,
    open_parent,
    run_trials,
    with_values,
)
from ftlib.tune.trial_store import Trial, TrialStore, leaf_defaults
from ftlib.tune.verdict import Judgement, Verdict, judge


@dataclass(frozen=True)
class Promotion:
    """What a promotion found."""

    finished: bool
    """False when a signal ended it."""
    store: TrialStore
    mlflow_url: str
    judgement: Judgement | None = None
    recipe_file: str = ""
    """The winner's recipe; empty when the recipe is kept."""
    report: str = ""
    """Folder with index.html."""

    @property
    def winner(self) -> Verdict | None:
        return self.judgement.winner if self.judgement else None


@dataclass(frozen=True)
class RecipeFiles:
    """Where a winner is written as a recipe."""

    name: str = ""
    """File name without `.json`; empty: the sweep's."""
    folder: Path | None = None
    """None: beside the report only."""
    onto: tuple[str, Run] | None = None
    """(name, recipe) of a later phase, to write the winner's values onto as well."""


def candidates(sweep: TrialStore, top: int) -> list[Trial]:
    """The `top` best completed trials that differ from the recipe and from each other.

    Raises ConfigError when there is none.
    """
    own = sweep.trials[0].values if 0 in sweep.trials else {}
    chosen: list[Trial] = []
    completed = [t for t in sweep.trials.values() if t.outcome == "completed" and t.number]
    for trial in sorted(completed, key=lambda t: (-(t.score or 0.0), t.number)):
        if trial.values != own and all(trial.values != c.values for c in chosen):
            chosen.append(trial)
    if not chosen:
        raise ConfigError(
            f"sweep {sweep.name}: no trial but the recipe itself has run to its end. "
            "Give it more --trials, or a later --grace"
        )
    return chosen[:top]


def open_sweep(root: str, name: str, known: Sequence[str] = ()) -> TrialStore:
    """The finished or unfinished sweep `name` below `root`. Raises ConfigError with the nearest."""
    store = TrialStore(root, name)
    if not store.read() or store.about.get("kind") != "sweep":
        raise ConfigError(
            f"there is no sweep {name} below {root}.{nearest(name, list(known))} "
            f"Known: {', '.join(known) or 'none'}"
        )
    return store


def promote(
    sweep: TrialStore,
    *,
    top: int = 3,
    seeds: int = 5,
    parallel: int = 0,
    files: RecipeFiles | None = None,
    hooks: Hooks = DEFAULT_HOOKS,
) -> Promotion:
    """Confirm the `top` best trials of `sweep` over `seeds` seeds.

    Goes on after a kill. `top` and `seeds` may be raised later; only what is missing is run.
    Raises ConfigError, DataError, LaunchError or ComparisonError, and RunFailedError where a run of
    the recipe failed.
    """
    if top < 1 or seeds < 2:
        raise ConfigError(
            f"--top {top} --seeds {seeds}: at least one trial and two seeds; with one seed nothing "
            "can be said about another"
        )
    recipe = override(from_dict(Run, sweep.about["recipe"]), {"data.tuning_fraction": 0.0})
    chosen = candidates(sweep, top)
    for trial in chosen:
        _require_same_budget(recipe, trial, sweep.about.get("constants", {}))
    inputs = hooks.check(recipe)
    _require_same_inputs(sweep, inputs)
    _require_unseen_validation(inputs)
    store = TrialStore(sweep.uri, "promotion")
    with store.lock():
        _open_store(store, sweep, recipe, inputs)
        group = TrialGroup(
            store=store,
            base=recipe,
            inputs=replace(inputs, init_uri=sweep.about["init"]["uri"]),
            split="val",
            kind="confirmation",
            tags={"sweep": sweep.name},
            constants=sweep.about.get("constants", {}),
            keep_predictions=True,
        )
        runs = _plan(store, sweep.trials[0], chosen, [recipe.seed + i for i in range(seeds)])
        opened = _open(sweep, group, runs, parallel, hooks)
        with opened.tracking:
            opened.table.say(_first_lines(sweep, opened, runs, chosen))
            return _confirm(sweep, opened, runs, chosen, hooks=hooks, files=files or RecipeFiles())


def _open(
    sweep: TrialStore, group: TrialGroup, runs: Sequence[Trial], parallel: int, hooks: Hooks
) -> OpenGroup:
    """Ray, where runs are missing, the table, and the promotion's run in MLflow."""
    missing = sum(not t.outcome for t in runs)
    resources = connect(group.base, missing, parallel) if missing else NOTHING_TO_RUN
    table = TrialTable(
        {t.number: t for t in runs},
        {path: path.split(".")[-1] for path in sweep.about["axes"]},
        total=len(runs),
        epochs=group.base.train.epochs,
        slots=resources.slots,
        split="val",
        out=hooks.out,
    )
    parent_run = ParentRun(
        title=f"promotion {sweep.name}",
        kind="comparison",
        sweep=sweep.name,
        journal=_folder(sweep) / "journal",
    )
    tracking, parent = open_parent(group, parent_run, hooks.open_tracking)
    return OpenGroup(group, resources, tracking, parent, table)


def _first_lines(
    sweep: TrialStore, opened: OpenGroup, runs: Sequence[Trial], chosen: Sequence[Trial]
) -> str:
    """What is compared, how long it is, and where it can be watched."""
    seeds, parent = len(runs) // (len(chosen) + 1), opened.parent
    title = (
        f"promotion of {sweep.name}: {', '.join(t.name for t in chosen)} and the recipe, "
        f"{opened.group.base.train.epochs} epochs each over {seeds} seeds: {len(runs)} runs; "
        f"{opened.resources if any(not t.outcome for t in runs) else 'all done'}"
    )
    places = {"kept in": str(_folder(sweep)), "MLflow": parent.url}
    return "\n".join([wrapped(title), *place_lines(places, parent.opened_by)])


def _confirm(
    sweep: TrialStore,
    opened: OpenGroup,
    runs: Sequence[Trial],
    chosen: Sequence[Trial],
    *,
    hooks: Hooks,
    files: RecipeFiles,
) -> Promotion:
    """Train what is missing, judge, write the report and end the promotion's run in MLflow."""
    store, parent, table = opened.group.store, opened.parent, opened.table
    waiting = [t for t in runs if not t.outcome]

    def next_trial() -> Trial | None:
        return waiting.pop(0) if waiting else None

    if waiting and not run_trials(opened, next_trial, hooks.train):
        parent.finish("killed", "stopped; the same command goes on")
        table.say("stopped. The same command goes on")
        return Promotion(False, store, parent.url)
    try:
        judgement = judge(runs, chosen)
    except (ComparisonError, RunFailedError) as error:
        parent.finish("failed", str(error))
        raise
    promoted = _recipes(judgement, sweep, files)
    withdrawn = list(_withdraw_recipes(judgement, promoted, sweep, files))
    written, recipes = _write_files(judgement, promoted, sweep, files)
    recipe_file = recipes[0] if recipes else ""
    promotion_report.log(
        judgement,
        group=opened.group,
        runs=runs,
        files=written,
        recipe_file=recipe_file,
        tracking=opened.tracking,
        parent=parent,
    )
    winner = judgement.winner
    store.save_about(
        sentence=judgement.sentence,
        winner=winner.candidate.name if winner else "",
        concluded=time.time(),
    )
    report = str(_folder(sweep) / "report")
    prose = [*map(str, judgement.verdicts), *judgement.left_out, judgement.sentence]
    lines = [*map(wrapped, prose), *withdrawn]
    lines.append(f"report: {report}/index.html")
    if recipe_file:
        lines.append(f"recipe: {recipe_file}")
        lines += _next(recipe_file)
    table.say("\n".join(lines))
    return Promotion(
        finished=True,
        store=store,
        mlflow_url=parent.url,
        judgement=judgement,
        recipe_file=recipe_file,
        report=report,
    )


def _next(recipe_file: str) -> list[str]:
    """What to run next: the job of the recipe's stage, where there is one."""
    stage = json.loads(Path(recipe_file).read_text())["stage"]
    if not (jobs_folder() / f"{stage}.py").is_file():
        return []
    return ["", f"Next: {job_command(stage, f'--recipe {shlex.quote(recipe_file)}')}"]


def _folder(sweep: TrialStore) -> Path:
    return local_run_folder(sweep.uri) / "promotion"


def _require_same_budget(recipe: Run, trial: Trial, constants: Mapping[str, Any]) -> None:
    """Raise ComparisonError for a trial that trains longer, on other images or other weights."""
    a, b = flat(with_values(recipe, trial, constants)), flat(recipe)
    for path in (*BUDGET, "model.init_from"):
        if a.get(path) != b.get(path):
            raise ComparisonError(
                f"{trial.name} has another budget or start than the recipe ({path} is "
                f"{a.get(path)} against {b.get(path)}): what it gains would not come from its "
                f"settings. Leave {path} out of the space, or put it into the recipe with --set"
            )


def _require_same_inputs(sweep: TrialStore, inputs: SweepInputs) -> None:
    """Raise ComparisonError when the data or the starting weights have changed since the sweep."""
    for what, known, now in (
        ("data", sweep.about["data"]["digest"], inputs.data_digest),
        ("starting weights", sweep.about["init"]["sha256"], inputs.init_sha256),
    ):
        if known != now:
            raise ComparisonError(
                f"sweep {sweep.name} used other {what} ({known[:8] or 'none'}) than its recipe "
                f"finds now ({now[:8] or 'none'}): a comparison would mix the two. "
                "Restore what it used, or sweep again"
            )


def _require_unseen_validation(inputs: SweepInputs) -> None:
    """Raise ComparisonError when the starting weights have seen validation images."""
    if inputs.seen_in_val:
        weights = " and before it ".join(inputs.seen_by)
        raise ComparisonError(
            f"of the validation images, the starting weights ({weights}) have seen "
            f"{inputs.seen_in_val:,}, as training images of another data set. Their scores would "
            "be too high. Prepare both sets with the same validation images, or start from other "
            "weights"
        )


def _open_store(store: TrialStore, sweep: TrialStore, recipe: Run, inputs: SweepInputs) -> None:
    identity = {
        "sweep": sweep.name,
        "recipe": json.loads(json.dumps(settings(recipe))),
        "seed": recipe.seed,
        "data": inputs.data_digest,
        "starting weights": inputs.init_sha256,
    }
    about = {
        "kind": "promotion",
        "axes": sweep.about["axes"],
        "split": "val",
        "base": sweep.about["recipe"],
    }
    store.open(identity, about, leaf_defaults(recipe))


def _plan(store: TrialStore, own: Trial, chosen: list[Trial], seeds: list[int]) -> list[Trial]:
    """The confirmation runs that are needed: known ones by origin and seed, new ones after them.

    Seed by seed, so that a stopped promotion has whole pairs. A comparison needs every run, so a
    failed one is tried again.
    """
    known = {(t.origin, t.seed): t for t in store.trials.values()}
    wanted = []
    for seed in seeds:
        for origin, values in [("recipe", own.values), *((t.name, t.values) for t in chosen)]:
            trial = known.get((origin, seed))
            if trial is None:
                trial = Trial(store.about["proposed"], dict(values), origin, seed=seed)
                store.add(trial)
            elif trial.outcome == "failed":
                store.reopen(trial)
            wanted.append(trial)
    return wanted


def _write_files(
    judgement: Judgement, promoted: Mapping[str, str], sweep: TrialStore, files: RecipeFiles
) -> tuple[list[Path], list[str]]:
    """Write the report, and the winner as a recipe: (the report's files, addresses of recipes)."""
    folder = _folder(sweep) / "report"
    written = promotion_report.write(judgement, sweep.name, folder)
    recipes = []
    for file_name, text in promoted.items():
        written.append(folder / file_name)
        write_file(str(written[-1]), text.encode())
        recipes.append(str(written[-1]))
        if files.folder is not None:
            recipes[-1] = str(files.folder / file_name)
            write_file(recipes[-1], text.encode())
    if is_remote(sweep.uri):
        for file in written:
            write_file(join(sweep.uri, "promotion", "report", file.name), file.read_bytes())
    return written, recipes


def _withdraw_recipes(
    judgement: Judgement, promoted: Mapping[str, str], sweep: TrialStore, files: RecipeFiles
) -> Iterator[str]:
    """Delete recipes that an earlier judgement, of fewer seeds, wrote and `promoted` has not.

    Yields a line for each. A copy that was edited since is left and named.
    """
    source = _source(judgement, sweep)
    for old in sorted((_folder(sweep) / "report").glob("*.json")):
        written = old.read_bytes()
        promoted_from = json.loads(written).get("promoted_from", "")
        if promoted_from in ("", source) or old.name in promoted:
            continue
        copy = files.folder / old.name if files.folder is not None else old
        if not copy.is_file():
            what = f"; {copy} is not here: delete the copy where it was written"
        elif copy.read_bytes() != written:
            what = f"; {copy} was edited since and is left"
        else:
            what = f": {copy} is deleted"
            copy.unlink()
        yield f"{promoted_from} is no longer promoted{what}"
        old.unlink(missing_ok=True)
        if is_remote(sweep.uri):
            delete_file(join(sweep.uri, "promotion", "report", old.name))


def _source(judgement: Judgement, sweep: TrialStore) -> str:
    """SWEEP/TRIAL of the winner; empty where the recipe is kept."""
    winner = judgement.winner
    return f"{sweep.name}/{winner.candidate.name}" if winner else ""


def _recipes(judgement: Judgement, sweep: TrialStore, files: RecipeFiles) -> dict[str, str]:
    """File name -> JSON of the winner's recipes; empty where the recipe is kept."""
    if (winner := judgement.winner) is None:
        return {}
    name = files.name or sweep.name
    onto = {f"{name}.json": from_dict(Run, sweep.about["recipe"])}
    if files.onto is not None:
        onto[f"{name}-{files.onto[0]}.json"] = files.onto[1]
    constants = sweep.about.get("constants", {})
    source = _source(judgement, sweep)
    return {
        file_name: to_json(
            replace(with_values(recipe, winner.candidate, constants), name="", promoted_from=source)
        )
        for file_name, recipe in onto.items()
    }
