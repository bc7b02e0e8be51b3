"""avg@k, pass@k and maj@k over per-problem samples, with confidence intervals. Pure functions of their arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spear_megatron.observability.intervals import check_confidence, wilson_interval
from spear_megatron.parallel.seeds import generator

MAX_EXACT_SUBSETS = 4096


@dataclass(frozen=True, slots=True)
class ProblemSamples:
    """All valid samples of one problem, in sample order.

    Attributes:
        task_id: names the problem.
        correct: one flag per sample.
        answers: canonical final answer of each sample, None where the sample gave none; maj@k votes with them.
        data_source: names the test set, for a breakdown.
    """

    task_id: str
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]
    data_source: str = ""

    def __post_init__(self) -> None:
        if not self.correct or len(self.correct) != len(self.answers):
            raise ValueError(
                f"problem {self.task_id!r} needs at least one sample and one answer per sample, "
                f"got {len(self.correct)} flags and {len(self.answers)} answers"
            )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value in [0, 1] with its confidence interval ``[low, high]`` and the number of problems behind it."""

    value: float
    low: float
    high: float
    num_problems: int


def avg_at_k(problem: ProblemSamples, k: int) -> float:
    """Share of correct ones among the first ``k`` samples.

    Raises:
        ValueError: ``k`` is not in [1, number of samples]; so do the other metrics.
    """
    _check_k(problem, k)
    return sum(problem.correct[:k]) / k


def pass_at_k(problem: ProblemSamples, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), equation 1.
    """
    _check_k(problem, k)
    num_samples, num_correct = len(problem.correct), sum(problem.correct)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(problem: ProblemSamples, k: int, *, seed: int, problem_index: int) -> float:
    """Expected correctness of the majority answer of ``k`` samples, over the subsets of size ``k``.

    Samples without an answer do not vote; no vote at all counts as wrong; tied answers share the vote, so no random
    tie-break is needed. Subsets are enumerated while there are at most ``MAX_EXACT_SUBSETS`` of them, else that many
    are drawn with the generator keyed by (seed, "maj@k", problem_index, k).
    """
    _check_k(problem, k)
    num_samples = len(problem.correct)
    if math.comb(num_samples, k) <= MAX_EXACT_SUBSETS:
        subsets = torch.tensor(list(itertools.combinations(range(num_samples), k)))
    else:
        draw = generator(seed, "maj@k", problem_index, k)
        subsets = torch.rand(MAX_EXACT_SUBSETS, num_samples, generator=draw).argsort(dim=1)[:, :k]
    return _votes(problem, subsets).mean().item()


def bootstrap_estimate(
    values: Sequence[float], *, seed: int, purpose: str, num_resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """Mean of per-problem ``values`` with a percentile bootstrap interval over problems.

    Args:
        values: one value per problem; problems are the unit of resampling, because their samples are not independent.
        seed, purpose: key of the generator.

    Raises:
        ValueError: ``values`` is empty or ``confidence`` is not inside (0, 1).
    """
    check_confidence(confidence)
    if not values:
        raise ValueError(f"{purpose} needs at least one problem, got none")
    data = torch.tensor(list(values), dtype=torch.float64)
    draw = generator(seed, f"bootstrap/{purpose}", len(values))
    picks = torch.randint(len(values), (num_resamples, len(values)), generator=draw)
    tail = (1.0 - confidence) / 2
    low, high = torch.quantile(data[picks].mean(dim=1), torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Estimate(value=data.mean().item(), low=low, high=high, num_problems=len(values))


def success_estimate(problems: Sequence[ProblemSamples], confidence: float = 0.95) -> Estimate:
    """Share of correct samples over all problems with a Wilson interval at the effective sample size.

    Samples of one problem resemble each other, so the number of samples is divided by the design effect (variance of
    the ratio over problem clusters against independent samples), kept between 1 and the mean samples per problem.

    Raises:
        ValueError: there is no problem.
    """
    if not problems:
        raise ValueError("the success rate needs at least one problem, got none")
    sizes = [len(problem.correct) for problem in problems]
    hits = [sum(problem.correct) for problem in problems]
    total = sum(sizes)
    rate = sum(hits) / total
    independent = rate * (1.0 - rate) / total
    effect = 1.0
    if len(problems) > 1 and independent > 0:
        residual = math.fsum((hit - rate * size) ** 2 for hit, size in zip(hits, sizes, strict=True))
        clustered = residual * len(problems) / (len(problems) - 1) / total**2
        effect = min(max(clustered / independent, 1.0), total / len(problems))
    elif len(problems) == 1 or independent == 0:
        effect = total / len(problems)
    low, high = wilson_interval(rate, total / effect, confidence)
    return Estimate(value=rate, low=low, high=high, num_problems=len(problems))


def _votes(problem: ProblemSamples, subsets: torch.Tensor) -> torch.Tensor:
    """Correctness of the majority answer of each subset, float64 [subsets], from int64 [subsets, k] sample indices."""
    names = [answer for answer in dict.fromkeys(problem.answers) if answer is not None]
    voted = torch.zeros(len(problem.answers), len(names) + 1, dtype=torch.float64)  # one column more: never empty
    for sample, answer in enumerate(problem.answers):
        if answer is not None:
            voted[sample, names.index(answer)] = 1.0
    chosen = torch.zeros(len(subsets), len(problem.answers), dtype=torch.float64).scatter_(1, subsets, 1.0)
    votes = chosen @ voted
    right = chosen @ (voted * torch.tensor(problem.correct, dtype=torch.float64)[:, None])
    most = votes.max(dim=1, keepdim=True).values
    wins = (votes == most) & (most > 0)
    share = torch.where(wins, right / votes.clamp(min=1.0), 0.0).sum(dim=1)
    return share / wins.sum(dim=1).clamp(min=1)


def _check_k(problem: ProblemSamples, k: int) -> None:
    if not 1 <= k <= len(problem.correct):
        count = len(problem.correct)
        raise ValueError(f"k={k} must be between 1 and the {count} samples of problem {problem.task_id!r}")
