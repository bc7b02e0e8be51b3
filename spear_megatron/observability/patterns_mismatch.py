"""Failure patterns of the gate between rollouts and update: engine and trainer disagree on log-probs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spear_megatron.observability.findings import Finding
from spear_megatron.observability.trends import WINDOW, Record, series, tail

_GATE = "actor_rollout_ref.rollout.mismatch"
_DTYPE = "actor_rollout_ref.model.dtype"
_MEAN = "mismatch/abs_diff_mean"


def mismatch_warned(record: Record) -> Finding | None:
    """The gate warned in steps of this run; names the worst of them and where in the responses it was worst."""
    lines = {line["step"]: line for line in record if line.get("mismatch/warned") and line.get(_MEAN) is not None}
    if not lines:
        return None
    steps, worst = sorted(lines), max(lines, key=lambda step: (lines[step][_MEAN], -step))
    places = [place for kind in ("turn", "position") if (place := _worst_place(lines[worst], kind))]
    recent = [step for step, _ in series(record, _MEAN)[-WINDOW:]]
    remedy = (
        f"compare the batch in the run directory's mismatch folder with 'replay-dump'; if every turn is off, engine "
        f"and trainer hold other weights, precision or temperatures (try {_DTYPE}=fp32); if a later turn alone is, "
        f"look at the chat template. Set {_GATE}.stop to end such runs, {_GATE}.warn to what is usual here"
    )
    return Finding(
        "error" if recent and all(step in lines for step in recent) and len(recent) == WINDOW else "warning",
        "engine and trainer disagree",
        f"{_MEAN} was above {_GATE}.warn in {len(steps)} steps, first at step {steps[0]}, last at {steps[-1]}; the "
        f"largest is {lines[worst][_MEAN]:.3g} nats at step {worst}{', worst in ' if places else ''}"
        f"{' and '.join(places)}",
        remedy,
        (_DTYPE, f"{_GATE}.stop", f"{_GATE}.warn"),
    )


def mismatch_blind(record: Record) -> Finding | None:
    """The gate has nothing to compare: every token comes from older weights than the trainer's."""
    last = tail(record, "mismatch/tokens")
    if last is None or last.value > 0:
        return None
    key = "algorithm.rollout_correction.mode"
    return Finding(
        "info",
        "engine and trainer cannot be compared",
        f"mismatch/tokens is {last}: no token was sampled by the trainer's own weights, so the gate bounds nothing",
        f"watch mismatch/lag_1 and older, which hold drift and learning together, and keep {key} on",
        (key,),
    )


def mismatch_masked(record: Record) -> Finding | None:
    """The gate takes much of the batch out of the loss."""
    last = tail(record, "filter/mismatch")
    if last is None or last.value < 0.2:
        return None
    key = f"{_GATE}.mask"
    return Finding(
        "warning",
        "many trajectories are masked for mismatch",
        f"filter/mismatch is {last}: so much of what is sampled is not trained on",
        f"find out why engine and trainer disagree ({_MEAN} and the turns below mismatch/), or raise {key}",
        (key,),
    )


def _worst_place(line: Mapping[str, Any], kind: str) -> str:
    prefix = f"mismatch/{kind}_"
    values = {name: value for name, value in line.items() if name.startswith(prefix) and value is not None}
    if not values:
        return ""
    name = max(values, key=lambda key: values[key])
    return f"{kind} {name.removeprefix(prefix)} ({values[name]:.3g})"
