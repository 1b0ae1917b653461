"""Time as MLflow counts it."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Milliseconds since 1970, MLflow's unit of time."""
    return time.time_ns() // 1_000_000
