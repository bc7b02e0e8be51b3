"""Partial statistics of a row's softmax, their merge across vocabulary shards, and the results drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min  # the maximum of a shard without any finite logit


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that one tensor-parallel rank holds."""

    first_column: int  # global id of local column 0
    columns: int  # local columns that are real vocabulary; those after them are padding


@dataclass(frozen=True)
class SoftmaxResult:
    """Per row, fp64 [T]: the statistics over the whole vocabulary and what follows from them."""

    maximum: Tensor  # largest logit
    total: Tensor  # sum of exp((x - maximum) / temperature)
    log_probs: Tensor
    entropy: Tensor


def merge_stats(parts: Tensor, temperature: float) -> SoftmaxResult:
    """Exact merge of the row statistics of all shards (online softmax, Milakov and Gimelshein 2018).

    Args:
        parts: [num_shards, T, 4]: per shard the largest logit m, sum of e = exp((x - m) / temperature), sum of
            e * (x - m), and the target's logit (-inf on shards that do not hold it).
        temperature: divides the logits.

    Returns:
        The merged result; NaN in rows without a finite logit or with a NaN or +inf logit.
    """
    largest, sums, weighted, target = parts.double().unbind(-1)
    maximum = largest.amax(0)
    shift = largest - maximum
    scale = (shift / temperature).exp()
    total = (scale * sums).sum(0)
    total = torch.where(total >= 0.5, total, torch.nan)  # the largest logit alone contributes 1
    moment = (scale * (weighted + sums * shift)).sum(0)
    log_total = total.log()
    log_probs = (target.amax(0) - maximum) / temperature - log_total
    return SoftmaxResult(maximum, total, log_probs, log_total - moment / (total * temperature))
