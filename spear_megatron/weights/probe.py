"""Fixed prompts, scored by every server and by the trainer: whether the weights that arrived are the ones sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spear_megatron.parallel.seeds import generator
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.types import Row, TrajectoryId
from spear_megatron.weights.servers import ServerGroup

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest difference of a log-prob between trainer and server by dtype of the weights: two programs round apart."""
PROMPT_LENGTH = 24
Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Probe:
    """``prompts`` of random tokens, the same in every run; ``tolerance`` is the largest difference of a log-prob."""

    prompts: tuple[tuple[int, ...], ...]
    tolerance: float

    @classmethod
    def draw(cls, vocab_size: int, dtype: torch.dtype, *, count: int, tolerance: float | None = None) -> Probe:
        """Prompts from the vocabulary without padding: a token beyond it would kill the server."""
        draws = (torch.randint(vocab_size, (PROMPT_LENGTH,), generator=generator(0, "probe", i)) for i in range(count))
        prompts = tuple(tuple(ids.tolist()) for ids in draws)
        return cls(prompts, TOLERANCES[dtype] if tolerance is None else tolerance)

    def rows(self) -> list[Row]:
        """The prompts as rows whose every token but the first is scored."""
        rows = []
        for index, prompt in enumerate(self.prompts):
            ids = torch.tensor(prompt, dtype=torch.int32)
            mask = torch.arange(len(ids)) > 0
            zeros = torch.zeros(len(ids))
            rows.append(Row(TrajectoryId(0, index, 0), 0, ids, mask, zeros, zeros.clone()))
        return rows

    def score(self, client: ControlClient) -> list[list[float]]:
        """Log-probs that a server gives."""
        return client.prompt_log_probs(self.prompts)


def difference(one: Scores, other: Scores) -> float:
    """Largest difference of two scores of the same prompts; infinite where one of them is not finite."""
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    gaps = [abs(a - b) for a, b in pairs]
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def probe_gaps(group: ServerGroup, urls: Sequence[str], probe: Probe, expected: Scores) -> dict[str, float]:
    """Largest difference to ``expected`` by URL, of the servers that answer; the others have failed."""
    return {url: difference(scores, expected) for url, scores in group.each(urls, probe.score).items()}
