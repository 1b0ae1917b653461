"""The page of a promotion, and its run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ftlib.report import html
from ftlib.storage import write_file
from ftlib.tune import figures
from ftlib.tune.compare import RunGroup, differing_settings
from ftlib.tune.report import named_report
from ftlib.tune.suggest import describe
from ftlib.tune.trial_runs import TrialGroup, param_name
from ftlib.tune.trial_store import Trial
from ftlib.tune.verdict import Judgement

if TYPE_CHECKING:
    from ftlib.track.tracked_run import TrackedRun
    from ftlib.track.tracking import Tracking

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


def table_rows(judgement: Judgement) -> list[list[str]]:
    """The recipe and then each candidate, under COLUMNS."""

    def per_seed(group: RunGroup) -> str:
        return " ".join(f"{run.predictions.top1:.2f}" for run in group.runs)

    own = judgement.recipe
    by_name = {group.name: group for group in judgement.groups}
    rows = [["recipe", f"{own.mean_top1:.2f}", per_seed(own), *[""] * 6]]
    for verdict in judgement.verdicts:
        d = verdict.difference
        rows.append(
            [
                verdict.candidate.name,
                f"{verdict.top1:.2f}",
                per_seed(by_name[verdict.candidate.name]),
                f"{d.points:+.2f}",
                f"{d.low:+.2f}",
                f"{d.high:+.2f}",
                f"{verdict.adjusted:.3g}",
                "yes" if verdict.promoted else "no",
                describe(verdict.candidate.values),
            ]
        )
    return rows


def write(judgement: Judgement, sweep: str, folder: Path) -> list[Path]:
    """index.html, differences.png, curves.png, and comparison.json (a table that MLflow shows)."""
    folder.mkdir(parents=True, exist_ok=True)
    own, verdicts = judgement.recipe, judgement.verdicts
    drawn = {}
    if verdicts:
        rows = [(v.candidate.name, v.difference, v.promoted) for v in verdicts]
        drawn["differences"] = figures.differences(rows, "the recipe")
    histories = {r.name: r.history for g in (own, *judgement.groups) for r in g.runs[:1]}
    drawn["curves"] = figures.curves(histories, ("val/top1", "train/top1"))
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{name}.png")
        write_file(str(files[-1]), figures.png(figure))
    table = {"columns": list(COLUMNS), "data": table_rows(judgement)}
    files.append(folder / "comparison.json")
    write_file(str(files[-1]), json.dumps(table).encode())
    index = folder / "index.html"
    parts = _page_parts(judgement, drawn)
    write_file(str(index), html.page(f"Promotion of sweep {sweep}", parts).encode())
    return [index, *files]


def _page_parts(judgement: Judgement, drawn: dict[str, Any]) -> list[Markup]:
    own, verdicts = judgement.recipe, judgement.verdicts
    images = verdicts[0].difference.images if verdicts else 0
    seeds = ", ".join(map(str, own.seeds))
    plural = "s" if len(verdicts) != 1 else ""
    settings = differing_settings([own, *judgement.groups])
    return [
        html.paragraph(judgement.sentence + ".", "lead"),
        html.paragraph(
            f"All numbers are top-1 of the validation split ({images:,} images), which the sweep "
            f"never saw. Each configuration was trained {len(own.runs)} times at full length, with "
            f"seeds {seeds}. Runs of the same seed are paired, and so are their predictions for "
            "the same image. p is one-sided and Holm-corrected for "
            f"{len(verdicts)} candidate{plural}."
        ),
        *([figures.drawing(drawn["differences"], "d")] if verdicts else []),
        html.table(
            COLUMNS[:-1],
            [row[:-1] for row in table_rows(judgement)],
            kinds=["", *("best" if v.promoted else "" for v in verdicts)],
        ),
        *[html.paragraph("Left out: " + text, "soft") for text in judgement.left_out],
        html.section(
            "Learning curves of the first seed", figures.drawing(drawn["curves"], "c"), half=True
        ),
        html.section(
            "Settings that differ",
            html.table(
                ["setting", "recipe", *(g.name for g in judgement.groups)],
                [[p, *map(html.value, v)] for p, v in settings.items()],
                text_columns=(0,),
            ),
            half=True,
        ),
    ]


def log(
    judgement: Judgement,
    *,
    group: TrialGroup,
    runs: Sequence[Trial],
    files: Sequence[Path],
    recipe_file: str,
    tracking: Tracking,
    parent: TrackedRun,
) -> None:
    """End the comparison's run in MLflow with table, figures, scores, and tags of the winner."""
    writer = parent.writer()
    for file in files:
        writer.artifact(str(file), "" if file.name == "comparison.json" else "report")
    winner, own = judgement.winner, judgement.recipe
    best = max(own.mean_top1, winner.top1 if winner else 0.0)
    metrics = {"recipe/val_top1": own.mean_top1, "best/val_top1": best}
    if winner is not None:
        metrics["best/gain"] = winner.difference.points
    writer.metrics(metrics, step=0)
    writer.tags({"winner": winner.candidate.name if winner else "recipe"})
    if winner is not None:
        values = winner.candidate.values
        writer.params({f"winner_{param_name(p)}": v for p, v in values.items()})
        titles = [group.title(t) for t in runs if t.origin == winner.candidate.name]
        _tag_winners(tracking, titles)
    text = [
        f"**{judgement.sentence}.**",
        "",
        f"- {named_report(parent.artifact_link('report/index.html'))}; table: `comparison.json`",
        *([f"- Recipe: `{recipe_file}`"] if recipe_file else []),
        *(f"- {v}".replace("  ", ", ") for v in judgement.verdicts),
        *(f"- left out: {t}" for t in judgement.left_out),
    ]
    parent.finish("completed", "\n".join(text))


def _tag_winners(tracking: Tracking, titles: Sequence[str]) -> None:
    for title in titles:
        tracking.writer_of(title).tags({"winner": "true"})
