"""What a benchmark found, as a table, as JSON and as a figure."""

from __future__ import annotations

import statistics
from typing import Any, TextIO

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ftlib.benchmark.measure import Part, Quantity, sentence
from ftlib.report.misclassified import BLUE, GREY, axes, png


def table(part: Part, out: TextIO) -> None:
    """Costs and ratios: drawn by rich on a terminal, plain aligned text elsewhere."""
    costs, found = rows_of(part)
    for rows in (costs, found) if part.ratios else (costs,):
        _rows(part.title if rows is costs else f"{part.title}: ratios", rows, out)
    for note in part.notes:
        print(f"  {note}", file=out)
    print(file=out, flush=True)


def markdown(parts: list[Part], found: dict[str, Any]) -> str:
    """One page of all tables and notes; `found` is `as_json`'s."""
    lines = ["# Benchmark", "", f"`{found['command']}` on {sentence(found['machine'])}"]
    for part in parts:
        lines += ["", f"## {part.title}"]
        for rows in (rows for rows in rows_of(part) if len(rows) > 1):
            rule = ("---",) * len(rows[0])
            lines += ["", *(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))]
        lines += ["", *(f"- {note}" for note in part.notes)]
    return "\n".join(lines) + "\n"


def rows_of(part: Part) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(costs, ratios), each with a heading."""
    costs: list[tuple[str, ...]] = [("", f"CPU ms/{part.unit}", "", f"wall ms/{part.unit}", "")]
    costs += [
        (name, *_spread([1000 * c.cpu for c in found]), *_spread([1000 * c.wall for c in found]))
        for name, found in part.costs.items()
    ]
    found: list[tuple[str, ...]] = [("ratio", "of", "median", "min..max", "goal")]
    for r in part.ratios:
        goal = "" if r.goal is None else f"<= {r.goal:.2f} {'met' if r.met else 'MISSED'}"
        found.append(
            (
                f"{r.ours} / {r.peer}",
                r.of,
                f"{r.median:.3f}",
                f"{min(r.rounds):.3f}..{max(r.rounds):.3f}",
                goal,
            )
        )
    return costs, found


def _spread(values: list[float]) -> tuple[str, str]:
    middle, low, high = (_number(v) for v in (statistics.median(values), min(values), max(values)))
    return middle, f"{low}..{high}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _rows(title: str, rows: list[tuple[str, ...]], out: TextIO) -> None:
    if out.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(rows[0]):
            drawn.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows[1:]:
            drawn.add_row(
                *(
                    f"[red]{v}[/red]"
                    if "MISSED" in v
                    else f"[green]{v}[/green]"
                    if v.endswith(" met")
                    else v
                    for v in row
                )
            )
        Console(file=out).print(drawn)
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(title, file=out)
    for row in rows:
        print(
            "  "
            + "  ".join(
                v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths))
            ).rstrip(),
            file=out,
        )


def as_json(parts: list[Part], about: dict[str, Any], command: str) -> dict[str, Any]:
    """All of it: machine, command, every round of every case, ratios."""
    return {
        "format": "ftlib-benchmark",
        "machine": about,
        "command": command,
        "parts": [p.to_dict() for p in parts],
    }


def figure(parts: list[Part], about: dict[str, Any]) -> bytes:
    """PNG: a panel per part, of learning curves where it has them, else of bars."""
    longest = max(len(p.costs) for p in parts)
    height = max(1.6 + 0.42 * longest, 4.0 if any(p.curves for p in parts) else 0.0)
    drawn, panels = axes(7.5 * len(parts), height, len(parts))
    for part, ax in zip(parts, panels):
        (_curves if part.curves else _bars)(part, ax)
    drawn.supxlabel(sentence(about), fontsize=7, color=GREY)
    return png(drawn)


def _bars(part: Part, ax: Axes) -> None:
    """The medians, with lines from the least to the largest round."""
    of: Quantity = "cpu" if part.unit == "image" else "wall"
    names = sorted(
        part.costs,
        key=lambda n: statistics.median(getattr(c, of) for c in part.costs[n]),
        reverse=True,
    )
    values = [[1000 * getattr(c, of) for c in part.costs[n]] for n in names]
    middle = [statistics.median(v) for v in values]
    ax.barh(
        range(len(names)),
        middle,
        color=[BLUE if n.startswith("ftlib") else GREY for n in names],
        height=0.6,
    )
    ax.hlines(
        range(len(names)),
        [min(v) for v in values],
        [max(v) for v in values],
        color="black",
        linewidth=1.2,
    )
    for i, (m, v) in enumerate(zip(middle, values)):
        ax.text(max(v), i, f"  {m:.3g}", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlim(0, 1.15 * max(max(v) for v in values))
    ax.set_xlabel(
        f"{'CPU' if of == 'cpu' else 'wall'} milliseconds per {part.unit} "
        "(median; line: min to max)",
        fontsize=8,
    )
    ax.set_title(part.title, fontsize=10)


def _curves(part: Part, ax: Axes) -> None:
    """The mean over the seeds, and each seed as a thin line; ftlib's ways are solid."""
    for way, curves in part.curves.items():
        epochs = range(1, len(curves[0]) + 1)
        style = "-" if way.startswith("ftlib") else "--"
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        (line,) = ax.plot(epochs, mean, style, label=f"{way}: {mean[-1]:.1f}")
        for curve in curves:
            ax.plot(epochs, curve, style, color=line.get_color(), linewidth=0.5, alpha=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("validation top-1, %", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(part.title, fontsize=10)
