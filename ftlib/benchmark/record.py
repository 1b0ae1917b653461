"""A benchmark as a run in MLflow."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ftlib.config import Track
from ftlib.paths import home
from ftlib.track.lineage import lineage_tags
from ftlib.track.tracking import open_tracking


def record(found: dict[str, Any], figure: bytes) -> str:
    """Record the medians of all costs and ratios, the whole as benchmark.json, and the figure.
    Returns the run's address.

    Raises TrackingError when the tracking server cannot be reached.
    """
    name = time.strftime("bench-%y%m%d-%H%M%S")
    with open_tracking(
        Track(),
        experiment="benchmark",
        journal_dir=home() / "runs" / name / "journal",
        leftovers=(),
    ) as tracking:
        about = found["machine"]
        tracked = tracking.start_run(
            name,
            tags={"kind": "benchmark", **lineage_tags()},
            params={k: about[k] for k in ("cpu", "cores", "memory_gb", "python")}
            | {"gpus": ", ".join(about["gpus"])},
        )
        writer = tracked.writer()
        writer.metrics(
            {
                _key(f"{r['of']}/{r['ours']} over {r['peer']}"): r["median"]
                for part in found["parts"]
                for r in part["ratios"]
            },
            step=0,
        )
        writer.metrics(
            {
                _key(f"cpu_ms/{case['name']}"): sorted(case["cpu_ms"])[len(case["cpu_ms"]) // 2]
                for part in found["parts"]
                for case in part["cases"]
            },
            step=0,
        )
        writer.metrics(
            {
                _key(f"top1/{way}"): sum(curve[-1] for curve in curves) / len(curves)
                for part in found["parts"]
                for way, curves in part["curves"].items()
            },
            step=0,
        )
        writer.json(found, "benchmark.json")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "benchmark.png"
            path.write_bytes(figure)
            writer.artifact(path)
        tracked.finish("completed")
        return tracked.url


def _key(text: str) -> str:
    """A metric's name as MLflow allows it."""
    return "".join(c if c.isalnum() or c in "_-./ " else " " for c in text)[:250]
