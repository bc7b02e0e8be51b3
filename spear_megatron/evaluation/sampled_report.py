"""The report of an evaluation from its samples: two answer modes side by side, problems, disagreements.

``normalised`` is the verdict of the evaluation's reward (``336^\\circ`` is 336), what the project reports and trains
on. ``strict`` is the rule of SPEAR's released code, which misses answers for their form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_megatron.evaluation.metrics import Estimate, ProblemSamples
from spear_megatron.evaluation.official import official_metrics
from spear_megatron.evaluation.report import EvaluationReport, evaluate_samples
from spear_megatron.evaluation.samples import Sample
from spear_megatron.observability.files import write_atomically
from spear_megatron.types import Prompt

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SampledReport:
    """What an evaluation found.

    Attributes:
        normalised: by the evaluation's reward.
        strict: by the rule of the released code; None where a problem has no answer to compare with.
        official: figures of the released code by data source, from the strict verdicts; "all" is over every problem.
        disagreements: samples whose verdicts differ: task_id, sample, truth, answers and verdicts of both modes.
        problems: one entry per problem, in order, with counts of both modes and the answers by frequency.
    """

    normalised: EvaluationReport
    strict: EvaluationReport | None
    official: Mapping[str, Mapping[str, float]]
    disagreements: tuple[Mapping[str, Any], ...]
    problems: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The normalised report's form with the other parts beside it; a pure function of the samples."""
        strict = None if self.strict is None else self.strict.to_json()
        return {
            **self.normalised.to_json(),
            "strict": strict and {key: strict[key] for key in ("metrics", "by_source")},
            "official": {source: dict(figures) for source, figures in self.official.items()},
            "num_disagreements": len(self.disagreements),
            "disagreements": [dict(row) for row in self.disagreements],
            "problems": [dict(row) for row in self.problems],
        }

    def write_json(self, path: Path) -> None:
        """Write ``to_json()`` to ``path``; a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def to_table(self) -> str:
        """Plain-text table in percent: every k over all problems, the largest by data source; some disagreements."""
        if self.strict is None:
            return self.normalised.to_table()
        report = self.normalised
        head = f"{report.confidence * 100:g} % interval"
        cells = [("data", "metric", "normalised", head, "strict", head, "problems")]
        for source, part in _parts(report):
            strict = self.strict.metrics if source == "all" else self.strict.by_source[source]
            for name in _shown_metrics(part, every_k=source == "all"):
                low = strict.get(name)
                cells.append((source, name, *_cell(part[name]), *_cell(low), str(part[name].num_problems)))
            for name, value in self.official.get(source, {}).items():
                if _largest(name, self.official[source]):
                    cells.append((source, name, "", "", f"{value * 100:.1f} %", "", ""))
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([report.title(), *lines, *self._disagreement_lines()])

    def _disagreement_lines(self) -> list[str]:
        """What the two modes disagree on."""
        count = len(self.disagreements)
        if not count:
            return ["normalised and strict verdicts agree on every sample"]
        lines = [f"normalised and strict verdicts differ on {count} samples:"]
        for row in self.disagreements[:_SHOWN]:
            verdict = "right" if row["correct"] else "wrong"
            answer, strict = ("no answer" if row[key] is None else row[key] for key in ("answer", "strict_answer"))
            lines.append(
                f"  {row['task_id']} sample {row['sample']}: truth {row['truth']}, normalised {answer} ({verdict}), "
                f"strict {strict}"
            )
        return lines + ([f"  and {count - _SHOWN} more in report.json"] if count > _SHOWN else [])


def report_samples(
    name: str, prompts: Sequence[Prompt], samples: Iterable[Sample], *, num_samples: int, seed: int
) -> SampledReport:
    """Everything that is reported; a pure function of its arguments, whatever the order of the samples.

    Raises:
        ValueError: no sample is valid.
    """
    ordered = sorted(samples, key=lambda sample: sample.key)
    valid = [sample for sample in ordered if sample.valid]
    if not valid:
        errors = sorted({str(sample.error) for sample in ordered})
        raise ValueError(f"evaluation '{name}': no valid sample of {len(ordered)}; errors: {errors[:3]}")
    most = max(Counter(sample.task for sample in valid).values())
    excluded = len(ordered) - len(valid)
    sizes = [k for k in k_values(num_samples) if k <= most] or [most]
    normalised = _problem_samples(prompts, valid, strict=False)
    report = evaluate_samples(name, normalised, ks=sizes, seed=seed, num_excluded=excluded)
    strict, official = None, {}
    if all(sample.strict_correct is not None for sample in valid):
        judged = _problem_samples(prompts, valid, strict=True)
        strict = evaluate_samples(name, judged, ks=sizes, seed=seed, num_excluded=excluded)
        sources = sorted({problem.data_source for problem in judged})
        parts = {source: [item for item in judged if item.data_source == source] for source in sources}
        official = {"all": official_metrics(judged)}
        official |= {source: official_metrics(part) for source, part in parts.items() if len(sources) > 1}
    return SampledReport(
        normalised=report,
        strict=strict,
        official=official,
        disagreements=tuple(_disagreement(prompts[sample.task], sample) for sample in valid if _differs(sample)),
        problems=tuple(_problem(task, prompt, ordered) for task, prompt in enumerate(prompts)),
    )


def k_values(num_samples: int) -> list[int]:
    """Powers of two below ``num_samples``, and ``num_samples``."""
    return [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [num_samples]


def answer_counts(samples: Iterable[Sample]) -> list[tuple[str | None, int, bool]]:
    """(normalised answer, samples with it, whether any of them is right), the most frequent first."""
    counts: Counter[str | None] = Counter()
    right: set[str | None] = set()
    for sample in samples:
        counts[sample.answer] += 1
        if sample.correct:
            right.add(sample.answer)
    order = sorted(counts, key=lambda answer: (-counts[answer], answer is None, answer or ""))
    return [(answer, counts[answer], answer in right) for answer in order]


def _problem_samples(prompts: Sequence[Prompt], valid: Sequence[Sample], *, strict: bool) -> list[ProblemSamples]:
    by_task: dict[int, list[Sample]] = {}
    for sample in valid:
        by_task.setdefault(sample.task, []).append(sample)
    return [
        ProblemSamples(
            task_id=prompts[task].task_id,
            correct=tuple(bool(item.strict_correct) if strict else item.correct for item in members),
            answers=tuple(item.strict_answer if strict else item.answer for item in members),
            data_source=prompts[task].data_source,
        )
        for task, members in sorted(by_task.items())
    ]


def _problem(task: int, prompt: Prompt, ordered: Sequence[Sample]) -> dict[str, Any]:
    members = [sample for sample in ordered if sample.task == task]
    valid = [sample for sample in members if sample.valid]
    return {
        "task_id": prompt.task_id,
        "data_source": prompt.data_source,
        "truth": prompt.answer,
        "num_samples": len(valid),
        "num_excluded": len(members) - len(valid),
        "num_correct": sum(sample.correct for sample in valid),
        "num_strict_correct": sum(bool(sample.strict_correct) for sample in valid),
        "answers": [[answer, count, right] for answer, count, right in answer_counts(valid)],
    }


def _differs(sample: Sample) -> bool:
    return sample.strict_correct is not None and sample.correct != sample.strict_correct


def _disagreement(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    return {
        "task_id": prompt.task_id,
        "sample": sample.sample,
        "truth": prompt.answer,
        "answer": sample.answer,
        "correct": sample.correct,
        "strict_answer": sample.strict_answer,
        "strict_correct": sample.strict_correct,
    }


def _parts(report: EvaluationReport) -> list[tuple[str, Mapping[str, Estimate]]]:
    return [("all", report.metrics), *report.by_source.items()]


def _shown_metrics(part: Mapping[str, Estimate], *, every_k: bool) -> list[str]:
    """Metrics of the table: of avg@k only the largest k, as all of them estimate the same; then pass@k and maj@k."""
    names = {kind: [name for name in part if name.startswith(f"{kind}@")] for kind in ("avg", "pass", "maj")}
    shown = [name for kind in ("pass", "maj") for name in (names[kind] if every_k else names[kind][-1:])]
    return ["success_rate", *names["avg"][-1:], *shown]


def _largest(name: str, figures: Mapping[str, float]) -> bool:
    """Whether a figure of the released code is that of the largest k of its kind."""
    kind, _, size = name.partition("@")
    return int(size) == max(int(other.partition("@")[2]) for other in figures if other.startswith(f"{kind}@"))


def _cell(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    return f"{estimate.value * 100:.1f} %", f"{estimate.low * 100:5.1f} - {estimate.high * 100:5.1f} %"
