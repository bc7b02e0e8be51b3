"""Which rank makes the others wait."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

MIN_SHARE = 0.02


def straggler_metrics(busy: Sequence[Mapping[str, float]], step_s: float) -> dict[str, float]:
    """Slowest rank against the median rank, by phase.

    Args:
        busy: of every rank in rank order, own seconds by phase, without waits for other ranks; a phase that a rank
            has no part in is missing.
        step_s: seconds of the step. Phases below 2 % of it, and those of fewer than two ranks, tell nothing.

    Returns:
        ``perf/straggler/<phase>``, largest over median, and ``perf/slowest_rank/<phase>``.
    """
    metrics: dict[str, float] = {}
    for phase in sorted({name for part in busy for name in part}):
        seconds = {rank: part[phase] for rank, part in enumerate(busy) if phase in part}
        slowest = max(seconds, key=lambda rank: (seconds[rank], -rank))
        if len(seconds) < 2 or seconds[slowest] < MIN_SHARE * step_s:
            continue
        median = statistics.median_low(seconds.values())
        metrics[f"perf/straggler/{phase}"] = seconds[slowest] / max(median, 1e-9)
        metrics[f"perf/slowest_rank/{phase}"] = float(slowest)
    return metrics
