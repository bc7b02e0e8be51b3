"""The result of one evaluation: computed from samples, written as JSON, printed as a table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spear_megatron.evaluation.metrics import (
    Estimate,
    ProblemSamples,
    avg_at_k,
    bootstrap_estimate,
    majority_at_k,
    pass_at_k,
    success_estimate,
)
from spear_megatron.observability.files import write_atomically

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        name: what was evaluated, e.g. a model folder or ``step 40``.
        num_problems: problems with at least one valid sample.
        num_samples: valid samples over all problems.
        num_excluded: samples left out because infrastructure failed (they are neither right nor wrong).
        confidence: level of every interval.
        metrics: ``success_rate`` (Wilson interval), then ``avg@k``, ``pass@k``, ``maj@k`` (bootstrap over problems).
        by_source: the same per data source, where there is more than one.
    """

    name: str
    num_problems: int
    num_samples: int
    num_excluded: int
    confidence: float
    metrics: Mapping[str, Estimate]
    by_source: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; each estimate is ``{"value", "low", "high", "num_problems"}``."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def scalars(self, prefix: str = "val/") -> dict[str, float]:
        """Flat values for the step record, such as ``val/success_rate``, ``val/pass@4`` and ``val/<source>/pass@4``."""
        parts = {re.sub(r"[^\w.-]", "_", source) + "/": part for source, part in self.by_source.items()}
        values = {f"{prefix}num_problems": float(self.num_problems), f"{prefix}num_excluded": float(self.num_excluded)}
        for head, part in {"": self.metrics, **parts}.items():
            values |= {f"{prefix}{head}{name}": estimate.value for name, estimate in part.items()}
            success = part["success_rate"]
            values[f"{prefix}{head}success_rate_low"] = success.low
            values[f"{prefix}{head}success_rate_high"] = success.high
        return values

    def write_json(self, path: Path) -> None:
        """Write ``to_json()`` to ``path``; a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def to_table(self) -> str:
        """Plain-text table: one line per metric and data source, in percent."""
        rows = [("all", name, estimate) for name, estimate in self.metrics.items()]
        rows += [(source, name, estimate) for source, part in self.by_source.items() for name, estimate in part.items()]
        level = f"{self.confidence * 100:g} % interval"
        cells = [("data", "metric", "value", level, "problems")]
        for source, name, estimate in rows:
            span = f"{estimate.low * 100:5.1f} - {estimate.high * 100:5.1f} %"
            cells.append((source, name, f"{estimate.value * 100:.1f} %", span, str(estimate.num_problems)))
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title(), *lines])

    def title(self) -> str:
        """What was evaluated, and how much of it, in one line."""
        text = f"{self.name}: {self.num_problems} problems, {self.num_samples} samples"
        return text + (f", {self.num_excluded} excluded after infrastructure failures" if self.num_excluded else "")


def evaluate_samples(
    name: str,
    problems: Sequence[ProblemSamples],
    *,
    ks: Sequence[int],
    seed: int,
    num_excluded: int = 0,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> EvaluationReport:
    """Compute every metric for every ``k``.

    A metric at ``k`` uses the problems that have at least ``k`` valid samples; its ``num_problems`` says how many.

    Args:
        ks: sizes to report, e.g. ``(1, 8)``.
        seed: root of the bootstrap and subset draws; the result is a pure function of the arguments.

    Raises:
        ValueError: there is no problem, ``ks`` is empty, or no problem has as many samples as some ``k``.
    """
    if not problems or not ks:
        raise ValueError(f"evaluation {name!r} needs at least one problem with a valid sample and one k")

    for k in ks:
        if all(len(problem.correct) < k for problem in problems):
            raise ValueError(f"evaluation {name!r}: no problem has {k} valid samples; lower k or sample more")
    sizes = sorted(set(ks))

    def measure(part: Sequence[ProblemSamples]) -> dict[str, Estimate]:
        return _measure(part, sizes, seed, confidence, num_resamples)

    sources = sorted({problem.data_source for problem in problems})
    parts = {source: [problem for problem in problems if problem.data_source == source] for source in sources}
    return EvaluationReport(
        name=name,
        num_problems=len(problems),
        num_samples=sum(len(problem.correct) for problem in problems),
        num_excluded=num_excluded,
        confidence=confidence,
        metrics=measure(problems),
        by_source={source: measure(part) for source, part in parts.items()} if len(sources) > 1 else {},
    )


def _measure(
    part: Sequence[ProblemSamples], ks: Sequence[int], seed: int, confidence: float, num_resamples: int
) -> dict[str, Estimate]:
    metrics = {"success_rate": success_estimate(part, confidence)}
    for k in ks:
        eligible = [(index, problem) for index, problem in enumerate(part) if len(problem.correct) >= k]
        if not eligible:
            continue
        values = {
            f"avg@{k}": [avg_at_k(problem, k) for _, problem in eligible],
            f"pass@{k}": [pass_at_k(problem, k) for _, problem in eligible],
            f"maj@{k}": [majority_at_k(problem, k, seed=seed, problem_index=index) for index, problem in eligible],
        }
        for metric, column in values.items():
            metrics[metric] = bootstrap_estimate(
                column, seed=seed, purpose=metric, num_resamples=num_resamples, confidence=confidence
            )
    return metrics
