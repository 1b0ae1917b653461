"""Promotion: the best trials of a sweep and the unchanged recipe again, at full length, over the same seeds, judged on the validation set.

The best of many trials is mostly luck. Here nobody is chosen by the scores that are tested: the candidates come from the tuning split, the test is on
validation images that no trial has seen, paired by seed and image, and corrected for the number of candidates (statistics.py).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config import Run
from ftlib.settings import ConfigError, flat, from_dict, nearest, override, to_json
from ftlib.storage import is_remote, join, write_file
from ftlib.tune import figures, page, train_trial
from ftlib.tune.compare import BUDGET, Finished, Group, differing, fair, same_images, settings
from ftlib.tune.live_table import Table
from ftlib.tune.resources import TrialResources
from ftlib.tune.statistics import Difference, holm, paired_difference
from ftlib.tune.stored_predictions import ComparisonError
from ftlib.tune.suggest import describe
from ftlib.tune.sweep import TrialListener, connect, journal_dir, param, with_values, words
from ftlib.tune.trial_store import Trial, TrialStore

ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """One candidate against the recipe."""

    candidate: Trial
    difference: Difference
    adjusted: float
    """One-sided p-value after Holm's correction."""
    top1: float
    """Mean validation top-1 over the seeds, percent."""

    @property
    def promoted(self) -> bool:
        return self.adjusted < ALPHA and self.difference.points > 0


@dataclass(frozen=True)
class Promotion:
    finished: bool
    verdicts: tuple[Verdict, ...]
    """Best first."""
    recipe_top1: float
    winner: Verdict | None
    sentence: str
    recipe_file: str
    report: str
    mlflow_url: str
    ledger: TrialStore


def candidates(ledger: TrialStore, top: int) -> list[Trial]:
    """The `top` best completed trials that differ from the recipe and from each other. Raises ConfigError when there is none."""
    own = ledger.trials[0].values if 0 in ledger.trials else {}
    chosen: list[Trial] = []
    for trial in sorted(
        (t for t in ledger.trials.values() if t.outcome == "completed" and t.number),
        key=lambda t: (-(t.score or 0.0), t.number),
    ):
        if trial.values != own and all(trial.values != c.values for c in chosen):
            chosen.append(trial)
    if not chosen:
        raise ConfigError(
            f"sweep {ledger.name}: no trial but the recipe itself has run to its end. Give it more --trials, or a later --grace"
        )
    return chosen[:top]


def open_sweep(root: str, name: str, known: Sequence[str] = ()) -> TrialStore:
    """The finished or unfinished sweep `name` below `root`. Raises ConfigError with the nearest name."""
    ledger = TrialStore(root, name)
    if not ledger.read() or ledger.about.get("kind") != "sweep":
        raise ConfigError(
            f"there is no sweep {name} below {root}.{nearest(name, list(known))} Known: {', '.join(known) or 'none'}"
        )
    return ledger


def promote(
    sweep: TrialStore,
    *,
    top: int = 3,
    seeds: int = 5,
    name: str = "",
    recipes: Path | None = None,
    parallel: int = 0,
    onto: tuple[str, Run] | None = None,
    check: Callable[[Run], train_trial.SweepInputs] = train_trial.check,
    train: Callable[..., dict[str, Any]] = train_trial.train_run,
    tracking_for: Callable[..., Any] | None = None,
    out: Any = None,
) -> Promotion:
    """Confirm the `top` trials of `sweep` over `seeds` seeds. Goes on after a kill; `top` and `seeds` may be raised later.

    recipes: folder for the winner's recipe `name`.json (default: the sweep's name); None writes it beside the report only.
    onto: (name, recipe) of a later phase to write the winner's values onto as well.
    Raises ConfigError, DataError, LaunchError, ComparisonError.
    """
    if top < 1 or seeds < 2:
        raise ConfigError(
            f"--top {top} --seeds {seeds}: at least one trial and two seeds; with one seed nothing can be said about another"
        )
    recipe = override(from_dict(Run, sweep.about["recipe"]), {"data.tuning_fraction": 0.0})
    constants = sweep.about.get("constants", {})
    chosen = candidates(sweep, top)
    for trial in chosen:
        _same_budget(recipe, trial, constants)
    basis = check(recipe)
    for what, known, now in (
        ("data", sweep.about["data"]["digest"], basis.data_digest),
        ("starting weights", sweep.about["init"]["sha256"], basis.init_sha256),
    ):
        if known != now:
            raise ComparisonError(
                f"sweep {sweep.name} used other {what} ({known[:8] or 'none'}) than its recipe finds now ({now[:8] or 'none'}): a comparison would mix the two. "
                "Restore what it used, or sweep again"
            )
    ledger = TrialStore(sweep.uri, "promotion")
    with ledger.lock():
        ledger.open(
            {
                "sweep": sweep.name,
                "recipe": json.loads(json.dumps(settings(recipe))),
                "seed": recipe.seed,
                "data": basis.data_digest,
                "starting weights": basis.init_sha256,
            },
            {
                "kind": "promotion",
                "axes": sweep.about["axes"],
                "split": "val",
                "base": sweep.about["recipe"],
            },
        )
        wanted = _plan(ledger, sweep.trials[0], chosen, [recipe.seed + i for i in range(seeds)])
        basis = replace(basis, init_uri=sweep.about["init"]["uri"])
        left = sum(not t.outcome for t in wanted)
        place = connect(recipe, left, parallel) if left else TrialResources(1, {}, True)
        names = {p: p.split(".")[-1] for p in sweep.about["axes"]}
        table = Table(
            {t.number: t for t in wanted},
            names,
            len(wanted),
            recipe.train.epochs,
            place.slots,
            "val",
            out,
        )
        tracking, parent = _open(sweep, ledger, recipe, basis, tracking_for)
        with tracking:
            table.say(
                f"promotion of {sweep.name}: {', '.join(t.name for t in chosen)} and the recipe, {recipe.train.epochs} epochs each over {seeds} seeds: {len(wanted)} runs; {words(place) if left else 'all done'}"
            )
            keeper = TrialListener(
                ledger,
                table,
                tracking,
                parent.reference,
                recipe,
                constants,
                {"sweep": sweep.name},
                "confirmation",
                place.local,
            )
            if not _run(wanted, basis, place, tracking, parent, keeper, table, train):
                keeper.close()
                parent.finish("killed", "stopped; the same command goes on")
                table.say("stopped. The same command goes on")
                return Promotion(False, (), 0.0, None, "", "", "", parent.url, ledger)
            keeper.close()
            return _conclude(
                sweep,
                ledger,
                wanted,
                chosen,
                recipe,
                constants,
                name or sweep.name,
                recipes,
                onto,
                tracking,
                parent,
                keeper,
                table,
            )


def _same_budget(recipe: Run, trial: Trial, constants: dict[str, Any]) -> None:
    a, b = flat(with_values(recipe, trial, constants)), flat(recipe)
    for path in (*BUDGET, "model.init_from"):
        if a.get(path) != b.get(path):
            raise ComparisonError(
                f"{trial.name} has another budget or start than the recipe ({path} is {a.get(path)} against {b.get(path)}): what it gains would not be its settings' doing. "
                f"Leave {path} out of the space, or put it into the recipe with --set"
            )


def _plan(ledger: TrialStore, own: Trial, chosen: list[Trial], seeds: list[int]) -> list[Trial]:
    """The runs there must be, old ones found again by configuration and seed, new ones numbered behind them."""
    known = {(t.origin, t.seed): t for t in ledger.trials.values()}
    wanted = []
    for seed in seeds:  # seed by seed, so that a stopped promotion has whole pairs
        for origin, values in [("recipe", own.values), *((t.name, t.values) for t in chosen)]:
            trial = known.get((origin, seed))
            if trial is None:
                trial = Trial(ledger.about["proposed"], dict(values), origin, seed=seed)
                ledger.add(trial)
            elif (
                trial.outcome == "failed"
            ):  # a comparison needs every run: what failed is tried again
                trial.outcome = trial.reason = ""
                ledger.save(trial)
            wanted.append(trial)
    return wanted


def _run(
    wanted: list[Trial],
    basis: train_trial.SweepInputs,
    place: Any,
    tracking: Any,
    parent: Any,
    keeper: TrialListener,
    table: Table,
    train: Callable[..., dict[str, Any]],
) -> bool:
    from ftlib.tune import ray_tune

    waiting = [t for t in wanted if not t.outcome]
    if not waiting:
        return True
    shared = train_trial.TrialContext(
        "val",
        place.local,
        "confirmation",
        keeper.tags,
        parent.reference,
        tracking.handle(),
        predictions=True,
    )
    groups = ray_tune.placement_groups()
    with table:
        finished = ray_tune.execute(
            lambda: waiting.pop(0) if waiting else None,
            lambda t: keeper.config(t, basis, place),
            functools.partial(train, shared),
            keeper,
            resources=place.resources,
            slots=place.slots,
            reuse=place.local,
        )
    ray_tune.remove_placement_groups(groups)
    return finished


def _open(
    sweep: TrialStore,
    ledger: TrialStore,
    recipe: Run,
    basis: train_trial.SweepInputs,
    tracking_for: Callable[..., Any] | None,
) -> tuple[Any, Any]:
    from ftlib.track.lineage import run_tags
    from ftlib.track.logged_params import params_of
    from ftlib.track.tracking import open_tracking

    folder = journal_dir(sweep).parent / "promotion" / "journal"
    known = ledger.about.get("mlflow_run_id", "")
    tracking = (tracking_for or open_tracking)(
        recipe.track, experiment=basis.data_name, journal_dir=folder, resuming=bool(known)
    )
    parent = tracking.start_run(
        f"promotion {sweep.name}",
        tags=run_tags(
            recipe,
            kind="comparison",
            dataset=(basis.data_name, basis.data_digest),
            sweep=sweep.name,
        ),
        params=params_of(recipe),
        run_id=known or None,
    )
    if parent.run_id and parent.run_id != known:
        ledger.save_about(mlflow_run_id=parent.run_id)
    return tracking, parent


def judge(
    wanted: Sequence[Trial], chosen: Sequence[Trial]
) -> tuple[tuple[Verdict, ...], Group, list[Group], list[str]]:
    """(verdicts best first, the recipe's runs, the candidates' runs, what was left out and why). Refuses runs that cannot be compared."""
    groups: dict[str, Group] = {}
    left_out: list[str] = []
    for origin in ("recipe", *(t.name for t in chosen)):
        members = [t for t in wanted if t.origin == origin]
        if failed := [t for t in members if t.outcome != "completed"]:
            if origin == "recipe":
                raise ComparisonError(
                    f"the recipe's own run of seed {failed[0].seed} failed ({failed[0].reason}): there is nothing to compare with"
                )
            left_out.append(
                f"{origin}: its run of seed {failed[0].seed} failed ({failed[0].reason})"
            )
            continue
        groups[origin] = Group(
            origin,
            tuple(
                Finished.read(t.result["run_dir"], t.label)
                for t in sorted(members, key=lambda t: t.seed or 0)
            ),
        )
    runs = [r for g in groups.values() for r in g.runs]
    fair(runs)
    same_images(runs)
    own = groups.pop("recipe")
    compared = [t for t in chosen if t.name in groups]
    found = [
        paired_difference(groups[t.name].correct(own.seeds), own.correct(own.seeds))
        for t in compared
    ]
    verdicts = [
        Verdict(t, d, p, groups[t.name].mean_top1)
        for t, d, p in zip(compared, found, holm([d.p_better for d in found]))
    ]
    return (
        tuple(sorted(verdicts, key=lambda v: -v.difference.points)),
        own,
        list(groups.values()),
        left_out,
    )


def conclusion(verdicts: Sequence[Verdict]) -> tuple[Verdict | None, str]:
    """The winner, if there is one, and the plain sentence."""
    winner = next((v for v in verdicts if v.promoted), None)
    if winner is None:
        if not verdicts:
            return None, "no candidate could be compared; keep the recipe"
        best = verdicts[0]
        d = best.difference
        return None, (
            f"no candidate beats the recipe; keep it. The best, {best.candidate.name}, differs by {d.points:+.2f} points "
            f"(95 % interval {d.low:+.2f} to {d.high:+.2f}, p = {best.adjusted:.2g})"
        )
    d = winner.difference
    return winner, (
        f"{describe(winner.candidate.values)} ({winner.candidate.name}) gains {d.points:.2f} points, 95 % interval {d.low:.2f} to {d.high:.2f}, p = {winner.adjusted:.2g}: promoted"
    )


def _conclude(
    sweep: TrialStore,
    ledger: TrialStore,
    wanted: list[Trial],
    chosen: list[Trial],
    recipe: Run,
    constants: dict[str, Any],
    name: str,
    recipes: Path | None,
    onto: tuple[str, Run] | None,
    tracking: Any,
    parent: Any,
    keeper: TrialListener,
    table: Table,
) -> Promotion:
    try:
        verdicts, own, groups, left_out = judge(wanted, chosen)
    except ComparisonError as error:
        parent.finish("failed", str(error))
        raise
    winner, sentence = conclusion(verdicts)
    folder = journal_dir(sweep).parent / "promotion" / "report"
    files = _write(sweep, folder, verdicts, own, groups, left_out, sentence)
    recipe_file = ""
    if winner is not None:
        promoted = {
            f"{name}.json": with_values(
                from_dict(Run, sweep.about["recipe"]), winner.candidate, constants
            )
        }
        if onto is not None:
            promoted[f"{name}-{onto[0]}.json"] = with_values(onto[1], winner.candidate, constants)
        for file_name, run in promoted.items():
            text = to_json(
                replace(run, name="", promoted_from=f"{sweep.name}/{winner.candidate.name}")
            )
            files.append(folder / file_name)
            files[-1].write_text(text)
            if recipes is not None:
                recipes.mkdir(parents=True, exist_ok=True)
                (recipes / file_name).write_text(text)
        recipe_file = str((recipes or folder) / f"{name}.json")
    if is_remote(sweep.uri):
        for file in files:
            write_file(join(sweep.uri, "promotion", "report", file.name), file.read_bytes())
    _record(
        tracking,
        parent,
        keeper,
        wanted,
        verdicts,
        own,
        winner,
        files,
        sentence,
        recipe_file,
        left_out,
    )
    ledger.save_about(
        sentence=sentence, winner=winner.candidate.name if winner else "", concluded=time.time()
    )
    table.say(
        "\n".join(
            [
                *(line(v) for v in verdicts),
                *left_out,
                sentence,
                f"report: {folder}/index.html",
                *([f"recipe: {recipe_file}"] if recipe_file else []),
            ]
        )
    )
    return Promotion(
        True,
        verdicts,
        own.mean_top1,
        winner,
        sentence,
        recipe_file,
        str(folder),
        parent.url,
        ledger,
    )


def line(verdict: Verdict) -> str:
    d = verdict.difference
    return f"{verdict.candidate.name}  {verdict.top1:.2f} %  {d.points:+.2f} points (95 % interval {d.low:+.2f} to {d.high:+.2f})  p = {verdict.adjusted:.3g}  {describe(verdict.candidate.values)}"


COLUMNS = (
    "configuration",
    "top-1, mean",
    "per seed",
    "points",
    "95 % low",
    "95 % high",
    "p (Holm)",
    "promoted",
    "settings",
)


def _rows(verdicts: Sequence[Verdict], own: Group, groups: Sequence[Group]) -> list[list[Any]]:
    def per_seed(g: Group) -> str:
        return " ".join(f"{r.answers.top1:.2f}" for r in g.runs)

    by_name = {g.name: g for g in groups}
    rows: list[list[Any]] = [
        ["recipe", f"{own.mean_top1:.2f}", per_seed(own), "", "", "", "", "", ""]
    ]
    for v in verdicts:
        d = v.difference
        rows.append(
            [
                v.candidate.name,
                f"{v.top1:.2f}",
                per_seed(by_name[v.candidate.name]),
                f"{d.points:+.2f}",
                f"{d.low:+.2f}",
                f"{d.high:+.2f}",
                f"{v.adjusted:.3g}",
                "yes" if v.promoted else "no",
                describe(v.candidate.values),
            ]
        )
    return rows


def _write(
    sweep: TrialStore,
    folder: Path,
    verdicts: Sequence[Verdict],
    own: Group,
    groups: Sequence[Group],
    left_out: Sequence[str],
    sentence: str,
) -> list[Path]:
    """index.html, differences.png, curves.png and comparison.json (a table that MLflow shows)."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (
        {
            "differences": figures.differences(
                [(f"{v.candidate.name}", v.difference, v.promoted) for v in verdicts], "the recipe"
            )
        }
        if verdicts
        else {}
    )
    drawn["curves"] = figures.curves(
        {r.name: r.history for g in (own, *groups) for r in g.runs[:1]}, ("val/top1", "train/top1")
    )
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(figures.png(figure))
    rows = _rows(verdicts, own, groups)
    files.append(folder / "comparison.json")
    files[-1].write_text(json.dumps({"columns": list(COLUMNS), "data": rows}))
    images = verdicts[0].difference.images if verdicts else 0
    settings_that_differ = differing([own, *groups])
    parts = [
        page.paragraph(sentence + ".", "lead"),
        page.paragraph(
            f"All numbers are top-1 of the validation split ({images:,} images), which the sweep never saw. Each configuration was trained {len(own.runs)} times at full length, "
            f"with seeds {', '.join(map(str, own.seeds))}; runs of the same seed are paired, and so are answers to the same image. p is one-sided, Holm-corrected for {len(verdicts)} candidate{'s' if len(verdicts) != 1 else ''}."
        ),
        *([figures.svg(drawn["differences"], "d")] if verdicts else []),
        page.table(
            COLUMNS[:-1],
            [r[:-1] for r in rows],
            ["", *("best" if v.promoted else "" for v in verdicts)],
        ),
        *[page.paragraph("Left out: " + text, "muted") for text in left_out],
        page.heading("Learning curves of the first seed"),
        figures.svg(drawn["curves"], "c"),
        page.heading("Settings that differ"),
        page.table(
            ["setting", "recipe", *(g.name for g in groups)],
            [[p, *map(page.value, v)] for p, v in settings_that_differ.items()],
            text_columns=(0,),
        ),
    ]
    index = folder / "index.html"
    index.write_text(page.page(f"Promotion of sweep {sweep.name}", parts), encoding="utf-8")
    return [index, *files]


def _record(
    tracking: Any,
    parent: Any,
    keeper: TrialListener,
    wanted: Sequence[Trial],
    verdicts: Sequence[Verdict],
    own: Group,
    winner: Verdict | None,
    files: Sequence[Path],
    sentence: str,
    recipe_file: str,
    left_out: Sequence[str],
) -> None:
    """The comparison run in MLflow: table, figure, scores, the winner's tag on it and on the winner's runs."""
    from ftlib.track.journal import file_of
    from ftlib.track.writer import Writer

    writer = parent.writer()
    for file in files:
        writer.artifact(str(file), "" if file.name == "comparison.json" else "report")
    writer.metrics(
        {
            "recipe/val_top1": own.mean_top1,
            **({"best/val_top1": max(own.mean_top1, winner.top1 if winner else 0.0)}),
            **({"best/gain": winner.difference.points} if winner else {}),
        },
        step=0,
    )
    writer.tags({"winner": winner.candidate.name if winner else "recipe"})
    if winner is not None:
        writer.params({f"winner_{param(p)}": v for p, v in winner.candidate.values.items()})
        place = tracking.place()
        for trial in wanted:
            if trial.origin == winner.candidate.name:
                Writer(place, file_of(Path(place.folder), keeper.title(trial)).name).tags(
                    {"winner": "true"}
                )
    text = [
        f"**{sentence}.**",
        "",
        "- Report: artifact `report/index.html`, table: `comparison.json`",
        *([f"- Recipe: `{recipe_file}`"] if recipe_file else []),
        *(f"- {line(v)}" for v in verdicts),
        *(f"- left out: {t}" for t in left_out),
    ]
    parent.finish("completed", "\n".join(text))
