"""The report of a sweep: what won, against what, how sure one can be, what the settings did, and where the time went."""

from __future__ import annotations

from pathlib import Path

from ftlib.tune import figures, page, spaces
from ftlib.tune.importance import importance
from ftlib.tune.live_table import duration
from ftlib.tune.spaces import Space
from ftlib.tune.suggest import describe
from ftlib.tune.trial_store import Trial, TrialStore


def best_trial(ledger: TrialStore) -> Trial | None:
    """The completed trial with the best score; the earlier one of two equals."""
    completed = [
        t for t in ledger.trials.values() if t.outcome == "completed" and t.score is not None
    ]
    return max(completed, key=lambda t: (t.score or 0.0, -t.number), default=None)


def saved_seconds(ledger: TrialStore) -> float:
    """Training time that stopping early saved: each stopped trial's missing epochs at its own pace."""
    epochs = ledger.about["base"]["train"]["epochs"]
    return sum(
        (epochs - t.epoch) * t.seconds / t.epoch
        for t in ledger.trials.values()
        if t.outcome == "pruned" and t.epoch
    )


def headline(ledger: TrialStore, space: Space) -> str:
    best, own = best_trial(ledger), ledger.trials.get(0)
    split = ledger.about["split"]
    if best is None:
        return "No trial has finished."
    names = spaces.short_names(space)
    if best.number == 0:
        return f"No trial beat the recipe itself: {best.score:.2f} % of the {split} split."
    gain = (
        f", {best.score - own.score:+.2f} points against the recipe's {own.score:.2f} %"
        if own is not None and own.score is not None and best.score is not None
        else ""
    )
    return f"Best: {best.name} with {best.score:.2f} % of the {split} split{gain}: {describe(best.values, names)}."


def warning(ledger: TrialStore) -> str:
    split = ledger.about["split"]
    return (
        f"All scores here are top-1 of the {split} split, cut from the training images; the validation set was not looked at. The best of {len(ledger.done())} single runs is "
        "partly luck, so its score here is too high. Promotion runs the best ones again over several seeds and compares them on the validation set."
    )


def note(ledger: TrialStore, space: Space, view_link: str, report_link: str = "") -> str:
    """Markdown for the sweep's page in MLflow: the result and the links in its first lines."""
    best = best_trial(ledger)
    counts = {
        o: sum(t.outcome == o for t in ledger.trials.values())
        for o in ("completed", "pruned", "failed")
    }
    lines = [f"**{headline(ledger, space)}**", ""]
    if view_link:
        lines.append(f"- [Charts of all trials]({view_link})")
    lines += [
        f"- {f'[Report]({report_link})' if report_link else 'Report: artifact `report/index.html`'}; the winner as a recipe: `best.json`",
        f"- {counts['completed']} trials ran to the end, {counts['pruned']} were stopped early, {counts['failed']} failed; {duration(sum(t.seconds for t in ledger.trials.values()))} of training, "
        f"{duration(saved_seconds(ledger))} saved by stopping early",
        f"- {warning(ledger)}",
        f"- Next: `python jobs/promote.py {ledger.name} --top 3 --seeds 5`",
    ]
    if best is not None and best.result.get("mlflow_run_id"):
        lines.append(f"- Best trial's run: `{best.result['mlflow_run_id']}`")
    return "\n".join(lines)


def write_report(ledger: TrialStore, space: Space, folder: Path) -> list[Path]:
    """index.html and the figures as PNGs. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = [ledger.trials[n] for n in sorted(ledger.trials)]
    best, names, split = best_trial(ledger), spaces.short_names(space), ledger.about["split"]
    found = importance(space, trials, seed=ledger.about.get("seed", 0))
    drawn = {
        "importance": figures.importances(found, names),
        "slices": figures.slices(space, names, trials, best, split),
        "curves": figures.learning_curves(trials, best, split),
        "best_so_far": figures.best_so_far(trials, split),
    }
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(figures.png(figure))
    spent, saved = sum(t.seconds for t in trials), saved_seconds(ledger)
    share = (
        f" ({100 * saved / (saved + spent):.0f} % of what all trials at full length would have taken)"
        if saved + spent
        else ""
    )
    parts = [
        page.paragraph(headline(ledger, space), "lead"),
        page.paragraph(warning(ledger)),
        page.command(f"python jobs/promote.py {ledger.name} --top 3 --seeds 5"),
        page.heading("Learning curves"),
        figures.svg(drawn["curves"], "curves"),
        page.heading("Score against each setting"),
        page.paragraph(
            "Star: best. Diamond: the recipe. Hollow: stopped early. Darker: later in the search.",
            "muted",
        ),
        figures.svg(drawn["slices"], "slices"),
        page.heading("What mattered"),
        *([figures.svg(drawn["importance"], "importance")] if found.shares else []),
        *([page.paragraph(found.remark, "muted")] if found.remark else []),
        page.heading("Course of the search"),
        figures.svg(drawn["best_so_far"], "course"),
        page.heading("Time"),
        page.paragraph(
            f"{duration(spent)} of training in {len(trials)} trials; stopping early saved about {duration(saved)}{share}.{_overhead(trials)}"
        ),
        page.heading("Trials"),
        _trials(trials, best, names, split),
        *_failed(trials),
        page.heading("What was searched"),
        page.table(
            ["setting", "values", "the recipe"],
            [
                [
                    p,
                    v,
                    page.value(ledger.trials[0].values.get(p, "-")) if 0 in ledger.trials else "-",
                ]
                for p, v in space.describe().items()
            ],
            text_columns=(0, 1),
        ),
        page.paragraph(
            f"Recipe {ledger.about['recipe_name']}, data {ledger.about['data']['name']}@{ledger.about['data']['digest'][:8]}, search {ledger.about['search']}, seed {ledger.about['seed']}, "
            f"{ledger.about['base']['train']['epochs']} epochs per trial, starting weights {ledger.about['init']['uri'] or ledger.about['base']['model']['init_from']}.",
            "muted",
        ),
    ]
    index = folder / "index.html"
    index.write_text(page.page(f"Sweep {ledger.name}", parts), encoding="utf-8")
    return [index, *files]


def _trials(trials: list[Trial], best: Trial | None, names: dict[str, str], split: str) -> str:
    ranked = sorted(
        trials, key=lambda t: (t.outcome != "completed", -(t.score if t.score is not None else -1))
    )
    rows = [
        [
            t.name + (" (recipe)" if t.number == 0 else ""),
            *[page.value(t.values.get(p, "-")) for p in names],
            t.epoch,
            f"{t.score:.2f}" if t.score is not None else "-",
            t.outcome or "open",
            duration(t.seconds),
        ]
        for t in ranked
    ]
    kinds = ["best" if t is best else "dim" if t.outcome != "completed" else "" for t in ranked]
    return page.table(
        ["trial", *names.values(), "epochs", f"best top-1 ({split})", "outcome", "time"],
        rows,
        kinds,
    )


def _overhead(trials: list[Trial]) -> str:
    """What a trial took beyond its epochs: opening data and model, checkpoints, figures."""
    beyond = [
        t.result["wall_seconds"] - t.seconds
        for t in trials
        if t.outcome == "completed" and "wall_seconds" in t.result
    ]
    beyond = [
        s for s in beyond if s > 0
    ]  # one that went on after a crash spent some of its epochs in an earlier process
    return (
        f" Beyond its epochs a trial took {sorted(beyond)[len(beyond) // 2]:.1f} s (median)."
        if beyond
        else ""
    )


def _failed(trials: list[Trial]) -> list[str]:
    failed = [t for t in trials if t.outcome == "failed"]
    return (
        [
            page.heading("Failed"),
            page.table(["trial", "why"], [[t.name, t.reason] for t in failed], text_columns=(1,)),
        ]
        if failed
        else []
    )
