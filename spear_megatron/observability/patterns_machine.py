"""Failure patterns of the machines: a rank that makes the others wait, a rank that hung, updates out of proportion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from spear_megatron.observability.findings import Finding
from spear_megatron.observability.trends import WINDOW, Record, series, tail

SLOW_RATIO = 1.5
_STRAGGLER, _SLOWEST = "perf/straggler/", "perf/slowest_rank/"


def straggler(record: Record) -> Finding | None:
    """The same rank is the slowest of a phase again and again, by half and more."""
    phases = sorted({name[len(_STRAGGLER) :] for line in record for name in line if name.startswith(_STRAGGLER)})
    worst: tuple[float, str, int, int] | None = None
    for phase in phases:
        ratio = tail(record, _STRAGGLER + phase)
        ranks = Counter(int(rank) for _, rank in series(record, _SLOWEST + phase)[-WINDOW:])
        if ratio is None or not ranks or ratio.value < SLOW_RATIO:
            continue
        rank, times = ranks.most_common(1)[0]
        if times >= WINDOW - 1 and (worst is None or ratio.value > worst[0]):
            worst = (ratio.value, phase, rank, ratio.last)
    if worst is None:
        return None
    value, phase, rank, last = worst
    return Finding(
        "warning",
        "a rank makes the others wait",
        f"rank {rank} takes {value:.3g} times the median of all ranks in phase '{phase}' (last steps up to {last})",
        f"heartbeat/rank_{rank}.json names its host: look for other load, throttling or a slow link there, or leave "
        "the host out; if it is a leader whose episodes are longer, nothing is wrong with the host",
    )


def loss_spikes(record: Record) -> Finding | None:
    """Optimizer steps far above the usual gradient norm or loss."""
    points = series(record, "training/loss_spikes")
    if not points or points[-1][1] < 1:
        return None
    first = next(step for step, value in points if value >= 1)
    keys = ("trainer.loss_spike.action", "actor_rollout_ref.actor.optim.lr")
    return Finding(
        "warning",
        "loss spikes",
        f"training/loss_spikes counts {points[-1][1]:.0f} optimizer steps, the first in step {first}",
        f"leave such updates out with {keys[0]}=skip, or lower {keys[1]}",
        keys,
    )


def hangs(run_dir: str | Path) -> Finding | None:
    """A rank made no progress for so long that the stacks of its threads were written."""
    files = sorted((Path(run_dir) / "hang").glob("rank_*.txt"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    return Finding(
        "error",
        "a rank hung",
        f"{len(files)} reports, the first: {files[0].read_text(errors='replace').splitlines()[0]}",
        f"read the stacks in {files[0]}; if the phase is only slow, raise trainer.hang_timeout_s",
        ("trainer.hang_timeout_s",),
    )
