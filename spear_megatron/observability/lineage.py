"""What became of every trajectory: pushed, rejected or filtered, each use in the loss, and how it left the buffer.

``<run directory>/lineage.jsonl`` holds one JSON object per training step, with trajectory ids as ``[step, task,
sample]``. Only rank 0 writes it, before the step's checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spear_megatron.observability.step_lines import StepLines, read_step_lines
from spear_megatron.types import TrajectoryId

LINEAGE_NAME = "lineage.jsonl"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Pushed:
    """A trajectory that entered the buffer.

    Attributes:
        advantage: in its group, at push. reward: shaped, ``base + mu * bonus``. base: outcome and penalties.
        bonus: of its tool calls, before the coefficient. tokens: sampled tokens.
    """

    id: TrajectoryId
    advantage: float
    reward: float
    base: float
    bonus: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Used:
    """A replayed trajectory in one optimizer step.

    Attributes:
        age: training steps since it was sampled. reward: at the coefficient that the step replays with.
        advantage: recalibrated. tokens: sampled tokens, of which covariance regularisation acts on ``selected``
            (0 where that is decided inside the loss).
        update: 0-based number of the optimizer step within the training step.
        weight: what one of its tokens weighs in the loss, gamma over the normaliser.
    """

    id: TrajectoryId
    age: int
    reward: float
    advantage: float
    tokens: int
    selected: int
    update: int
    weight: float


@dataclass(frozen=True, slots=True)
class StepLineage:
    """What one training step did to trajectories.

    Attributes:
        mu, gamma: coefficients of the tool bonus and of self-imitation. p50: baseline of the recalibration; None where
            there was none.
        rejected: by rule of the push. filtered: by reason, trajectories that carry no loss.
        expired: left the buffer for their age. evicted: for its capacity, or because it was cleared after use.
    """

    step: int
    mu: float = 0.0
    gamma: float = 0.0
    p50: float | None = None
    pushed: tuple[Pushed, ...] = ()
    rejected: Mapping[str, tuple[TrajectoryId, ...]] = field(default_factory=dict)
    filtered: Mapping[str, tuple[TrajectoryId, ...]] = field(default_factory=dict)
    expired: tuple[TrajectoryId, ...] = ()
    evicted: tuple[TrajectoryId, ...] = ()
    used: tuple[Used, ...] = ()

    def encode(self) -> dict[str, Any]:
        """As a JSON object; a number that is not finite becomes null."""
        line = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return {name: _plain(value) for name, value in line.items()}

    @classmethod
    def decode(cls, line: Mapping[str, Any]) -> StepLineage:
        """The inverse of :meth:`encode`, with nan for null. Raises KeyError or TypeError on a damaged object."""
        return cls(
            step=line["step"],
            mu=_number(line["mu"]),
            gamma=_number(line["gamma"]),
            p50=None if line["p50"] is None else float(line["p50"]),
            pushed=tuple(Pushed(**_item(item)) for item in line["pushed"]),
            rejected={rule: _ids(ids) for rule, ids in line["rejected"].items()},
            filtered={reason: _ids(ids) for reason, ids in line["filtered"].items()},
            expired=_ids(line["expired"]),
            evicted=_ids(line["evicted"]),
            used=tuple(Used(**_item(item)) for item in line["used"]),
        )


class LineageStore:
    """Writes the lineage of one run, from one process. See :class:`StepLines` for ``resume_step``."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        self._lines = StepLines(Path(run_dir) / LINEAGE_NAME, SCHEMA_VERSION, resume_step)

    def write(self, step: int, event: StepLineage) -> None:
        """Append the line of ``step``; on return it survives a crash.

        Raises:
            ValueError: ``event`` is of another step, or ``step`` does not come after the last one written.
        """
        if event.step != step:
            raise ValueError(f"the lineage of step {event.step} cannot be written as that of step {step}")
        self._lines.append(step, event.encode())

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._lines.close()


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a trajectory, and the step's figures that it stood under."""

    step: int
    mu: float
    gamma: float
    p50: float | None
    used: Used


@dataclass(frozen=True, slots=True)
class Lineage:
    """The way of one trajectory through a run.

    Attributes:
        last_step: up to which the lineage of the run is known.
        step: the training step at which it was pushed, rejected or filtered, and mu the coefficient of the tool bonus
            then; None where none of that is told. Its id carries the step that began its group, which may be earlier.
        pushed: None unless it entered the buffer.
        rejected: rule of the push that kept it out. filtered: reason why it carried no loss.
        left: step at which, and way in which it left the buffer; None while it is there or if it never was.
    """

    id: TrajectoryId
    last_step: int
    step: int | None = None
    mu: float | None = None
    pushed: Pushed | None = None
    rejected: str | None = None
    filtered: str | None = None
    uses: tuple[Use, ...] = ()
    left: tuple[int, Literal["expired", "evicted"]] | None = None

    @property
    def known(self) -> bool:
        """Whether the lineage mentions the trajectory at all."""
        return bool(self.pushed or self.rejected or self.filtered or self.uses or self.left)


def read_lineage(run_dir: str | Path) -> list[StepLineage]:
    """The lineage of ``run_dir`` in step order; a last line cut by a crash is left out.

    Raises:
        FileNotFoundError: the run has no lineage.
        ValueError: another line is damaged, or the file has a newer schema version.
    """
    path = Path(run_dir) / LINEAGE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {run_dir} is not the directory of a run that kept its lineage")
    events = []
    for line in read_step_lines(path, SCHEMA_VERSION):
        try:
            events.append(StepLineage.decode(line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: step {line['step']} is damaged: {type(error).__name__} {error}") from error
    return events


def trace(run_dir: str | Path, id: TrajectoryId) -> Lineage:
    """The way of trajectory ``id`` through the run; check :attr:`Lineage.known`. Raises as :func:`read_lineage`."""
    return trace_in(read_lineage(run_dir), [id])[id]


def trace_in(events: Iterable[StepLineage], ids: Collection[TrajectoryId]) -> dict[TrajectoryId, Lineage]:
    """The ways of several trajectories through ``events``, which are in step order, in one pass."""
    found: dict[TrajectoryId, dict[str, Any]] = {id: {"uses": ()} for id in ids}
    last_step = 0
    for event in events:
        last_step = event.step
        judged = {"step": event.step, "mu": event.mu}
        for item in event.pushed:
            if item.id in found:
                found[item.id] |= {"pushed": item, **judged}
        for name, lists in (("rejected", event.rejected), ("filtered", event.filtered)):
            for reason, members in lists.items():
                for id in found.keys() & set(members):
                    found[id] |= {name: reason, **judged}
        for used in event.used:
            if used.id in found:
                found[used.id]["uses"] += (Use(event.step, event.mu, event.gamma, event.p50, used),)
        for way, members in (("expired", event.expired), ("evicted", event.evicted)):
            for id in found.keys() & set(members):
                found[id]["left"] = (event.step, way)
    return {id: Lineage(id=id, last_step=last_step, **values) for id, values in found.items()}


def most_replayed(events: Sequence[StepLineage], limit: int) -> list[Lineage]:
    """At most ``limit`` replayed trajectories, those with the most uses first; of equals the oldest."""
    counts = Counter(item.id for event in events for item in event.used)
    ids = sorted(counts, key=lambda id: (-counts[id], id))[:limit]
    lineages = trace_in(events, ids)
    return [lineages[id] for id in ids]


def _plain(value: Any) -> Any:
    """``value`` with ids as lists and null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: TrajectoryId(*value) if name == "id" else _number_or_count(value) for name, value in item.items()}


def _number_or_count(value: float | int | None) -> float | int:
    return math.nan if value is None else value


def _ids(ids: Iterable[Iterable[int]]) -> tuple[TrajectoryId, ...]:
    return tuple(TrajectoryId(*id) for id in ids)
