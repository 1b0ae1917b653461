"""The report of a sweep: the best trial against the recipe, how sure one can be, what each setting
did, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from ftlib.launch.progress import duration
from ftlib.report import html
from ftlib.storage import write_file
from ftlib.tune import figures, spaces
from ftlib.tune.importance import Importance, importance
from ftlib.tune.promotion_plan import plan_promotion
from ftlib.tune.spaces import Space
from ftlib.tune.statistics import standard_error
from ftlib.tune.suggest import describe
from ftlib.tune.trial_store import Trial, TrialStore


def best_trial(store: TrialStore) -> Trial | None:
    """The completed trial with the highest score, of equals the first; or None."""
    trials = store.trials.values()
    completed = [t for t in trials if t.outcome == "completed" and t.score is not None]
    return max(completed, key=lambda t: (t.score or 0.0, -t.number), default=None)


def saved_seconds(store: TrialStore) -> float:
    """Training time that early stopping saved: the missing epochs at each trial's own speed."""
    epochs = store.about["base"]["train"]["epochs"]
    stopped = [t for t in store.trials.values() if t.outcome == "pruned" and t.epoch]
    return sum((epochs - t.epoch) * t.seconds / t.epoch for t in stopped)


def headline(store: TrialStore, space: Space) -> str:
    """The result in one sentence."""
    best, own = best_trial(store), store.trials.get(0)
    split = store.about["split"]
    if best is None:
        return "No trial has finished."
    if best.number == 0:
        return (
            f"No trial beats the recipe, which scores {best.score:.2f} % of the {split} split. "
            "Keep the recipe."
        )
    gain = ""
    if own is not None and own.score is not None and best.score is not None:
        points = best.score - own.score
        gain = f", {points:+.2f} points against the recipe's {own.score:.2f} %"
    values = describe(best.values, spaces.short_names(space))
    return f"Best: {best.name} with {best.score:.2f} % of the {split} split{gain}: {values}."


def scored_on(store: TrialStore) -> str:
    """Such as `145 images, a standard error of 1.2 points`; empty for sweeps of an earlier version,
    which did not record it."""
    images, best = store.about.get("tuning", {}).get("images"), best_trial(store)
    if not images or best is None:
        return ""
    error = standard_error(best.score or 0.0, images)
    return f"{images:,} images, a standard error of {error:.1f} points"


def warning(store: TrialStore) -> str:
    """What the scores of a sweep are not."""
    tuning = store.about.get("tuning", {})
    images = f" ({scored})" if (scored := scored_on(store)) else ""
    split = f"All scores here are top-1 of the {store.about['split']} split{images}"
    if tuning and not tuning["seen"]:
        split += ": training images that neither the trials nor the runs before them have seen"
    return (
        f"{split}. The validation set was not looked at. The best of {len(store.done())} single "
        "runs is partly luck, so its score here is too high. A promotion trains the best ones "
        "again over several seeds and compares them on the validation set."
    )


def named_report(link: str) -> str:
    """Markdown that leads to a page's report; by its name while the run has no page yet."""
    return f"[Report]({link})" if link else "Report: artifact `report/index.html`"


def note(store: TrialStore, space: Space, view_link: str, report_link: str = "") -> str:
    """Markdown for the sweep's page in MLflow: result and links in its first lines."""
    trials = store.trials.values()
    completed, pruned, failed = (
        sum(t.outcome == outcome for t in trials) for outcome in ("completed", "pruned", "failed")
    )
    best, promotion = best_trial(store), plan_promotion(store)
    lines = [f"**{headline(store, space)}**", ""]
    if view_link:
        lines.append(f"- [Charts of all trials]({view_link})")
    lines += [
        f"- {named_report(report_link)}; the winner as a recipe: `best.json`",
        f"- {completed} trials ran to the end, {pruned} were stopped early, {failed} failed; "
        f"{duration(sum(t.seconds for t in trials))} of training, "
        f"{duration(saved_seconds(store))} saved by stopping early",
        f"- {warning(store)}",
        f"- {promotion.reason}",
    ]
    if promotion.worth:
        lines.append(f"- Next ({promotion.cost}): `{promotion.command}`")
    if best is not None and best.result.get("mlflow_run_id"):
        lines.append(f"- Best trial's run: `{best.result['mlflow_run_id']}`")
    return "\n".join(lines)


def write_report(store: TrialStore, space: Space, folder: Path) -> list[Path]:
    """index.html and the figures as PNGs. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = [store.trials[n] for n in sorted(store.trials)]
    best, names, split = best_trial(store), spaces.short_names(space), store.about["split"]
    found = importance(space, trials, seed=store.about.get("seed", 0))
    drawn = {
        "importance": figures.importances(found, names),
        "slices": figures.slices(space, names, trials, best, split),
        "curves": figures.learning_curves(trials, best, split),
        "best_so_far": figures.best_so_far(trials, split),
    }
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        write_file(str(files[-1]), figures.png(figure))
    index = folder / "index.html"
    parts = _page_parts(store, space, found, drawn)
    write_file(str(index), html.page(f"Sweep {store.name}", parts).encode())
    return [index, *files]


def _page_parts(
    store: TrialStore, space: Space, found: Importance, drawn: Mapping[str, Figure]
) -> list[Markup]:
    trials = [store.trials[n] for n in sorted(store.trials)]
    best, names, split = best_trial(store), spaces.short_names(space), store.about["split"]
    promotion = plan_promotion(store)
    own = trials[0].values if trials and trials[0].number == 0 else {}
    searched = html.table(
        ["setting", "values", "the recipe"],
        [[p, v, html.value(own.get(p, "-"))] for p, v in space.describe().items()],
        text_columns=(0, 1),
    )
    return [
        html.paragraph(headline(store, space), "lead"),
        html.paragraph(warning(store)),
        html.paragraph(promotion.reason),
        *([html.command(f"{promotion.command}    # {promotion.cost}")] if promotion.worth else []),
        *_figure_sections(found, drawn),
        html.section("Trials", _trial_table(trials, best, names, split), half=len(names) < 4),
        html.section("Searched settings", searched, half=True),
        html.section("Time", html.paragraph(_time(store)), half=True),
        *_failures(trials),
        html.paragraph(_provenance(store), "soft"),
    ]


def _figure_sections(found: Importance, drawn: Mapping[str, Figure]) -> list[Markup]:
    legend = (
        "Star: best. Diamond: the recipe. Hollow: stopped early, triangles below the axis. "
        "Darker: later in the search."
    )
    shares = [figures.drawing(drawn["importance"], "importance")] if found.shares else []
    remark = [html.paragraph(found.remark, "soft")] if found.remark else []
    return [
        html.section("Learning curves", figures.drawing(drawn["curves"], "curves"), half=True),
        html.section(
            "Course of the search", figures.drawing(drawn["best_so_far"], "course"), half=True
        ),
        html.section(
            "Score against each setting",
            figures.drawing(drawn["slices"], "slices"),
            note=legend,
            half=True,
        ),
        html.section("Which settings matter", *shares, *remark, half=True),
    ]


def _time(store: TrialStore) -> str:
    """Where the time went, in words."""
    trials = list(store.trials.values())
    spent, saved = sum(t.seconds for t in trials), saved_seconds(store)
    share = ""
    if saved + spent:
        percent = 100 * saved / (saved + spent)
        share = f" ({percent:.0f} % of what all trials at full length would have taken)"
    return (
        f"{duration(spent)} of training in {len(trials)} trials; stopping early saved about "
        f"{duration(saved)}{share}.{_overhead(trials)}"
    )


def _overhead(trials: Sequence[Trial]) -> str:
    """What a trial takes beyond its epochs: opening data and model, checkpoints, figures."""
    completed = [t for t in trials if t.outcome == "completed" and "wall_seconds" in t.result]
    beyond = [t.result["wall_seconds"] - t.seconds for t in completed]
    # A trial that went on after a crash trained some of its epochs in an earlier process.
    beyond = sorted(s for s in beyond if s > 0)
    if not beyond:
        return ""
    return f" Beyond its epochs a trial took {beyond[len(beyond) // 2]:.1f} s (median)."


def _provenance(store: TrialStore) -> str:
    """Everything else that decides the scores."""
    about = store.about
    data, base = about["data"], about["base"]
    weights = about["init"]["uri"] or base["model"]["init_from"]
    return (
        f"Recipe {about['recipe_name']}, data {data['name']}@{data['digest'][:8]}, search "
        f"{about['search']}, seed {about['seed']}, {base['train']['epochs']} epochs per trial, "
        f"starting weights {weights}."
    )


def _trial_table(
    trials: Sequence[Trial], best: Trial | None, names: Mapping[str, str], split: str
) -> Markup:
    ranked = sorted(
        trials, key=lambda t: (t.outcome != "completed", -(t.score if t.score is not None else -1))
    )
    rows = [
        [
            t.name + (" (recipe)" if t.number == 0 else ""),
            *[html.value(t.values.get(p, "-")) for p in names],
            t.epoch,
            f"{t.score:.2f}" if t.score is not None else "-",
            t.outcome or "open",
            duration(t.seconds),
        ]
        for t in ranked
    ]

    def kind(trial: Trial) -> str:
        if trial is best:
            return "best"
        return "" if trial.outcome == "completed" else "dim"

    columns = ["trial", *names.values(), "epochs", f"best top-1 ({split})", "outcome", "time"]
    return html.table(columns, rows, kinds=[kind(t) for t in ranked])


def _failures(trials: Sequence[Trial]) -> list[Markup]:
    failed = [[t.name, t.reason] for t in trials if t.outcome == "failed"]
    if not failed:
        return []
    return [html.section("Failed", html.table(["trial", "why"], failed, text_columns=(1,)))]
