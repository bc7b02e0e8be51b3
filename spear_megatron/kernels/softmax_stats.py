"""Partial statistics of a row's softmax, their merge across vocabulary shards, and the results drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min  # the maximum of a shard without any finite logit


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that one tensor-parallel rank holds."""

    first_column: int  # global id of local column 0
    columns: int  # local columns that are real vocabulary; those after them are padding

    def part(self, start: int, stop: int) -> VocabShard:
        """Local columns ``start`` to ``stop``, padding included."""
        return VocabShard(self.first_column + start, min(max(self.columns - start, 0), stop - start))


@dataclass(frozen=True)
class SoftmaxResult:
    """Per row, fp64 [T]: the statistics over the whole vocabulary and what follows from them."""

    maximum: Tensor  # largest logit
    total: Tensor  # sum of exp((x - maximum) / temperature)
    log_probs: Tensor
    entropy: Tensor


def own_shard(columns: int, valid_vocab: int | None, group: dist.ProcessGroup | None) -> tuple[VocabShard, int]:
    """The columns that this rank holds, and the number of real columns of the whole vocabulary.

    Args:
        columns: local columns, padding included; rank r of ``group`` holds [r * columns, (r + 1) * columns).
        valid_vocab: number of real columns of the whole vocabulary; None: all.
        group: tensor-parallel group, or None.

    Raises:
        ValueError: ``valid_vocab`` does not fit the columns.
    """
    world = 1 if group is None else dist.get_world_size(group)
    first = 0 if world == 1 else dist.get_rank(group) * columns
    valid = columns * world if valid_vocab is None else valid_vocab
    if not 0 < valid <= columns * world:
        raise ValueError(f"valid_vocab={valid} must be between 1 and the {columns * world} columns of the logits")
    return VocabShard(first, min(max(valid - first, 0), columns)), valid


def check_targets(targets: Tensor, valid: int) -> None:
    """ValueError unless all targets are in [0, valid); on the CPU only: elsewhere it would wait for the device."""
    if targets.device.type == "cpu" and targets.numel() > 0:
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= valid:
            raise ValueError(f"targets must be token ids in [0, {valid}), found {low if low < 0 else high}")


def gather_stats(stats: Tensor, group: dist.ProcessGroup | None, with_entropy: bool = True) -> Tensor:
    """Statistics of every rank in rank order, [num_ranks, T, 4]; the same bits on every rank.

    Without the entropy three numbers per row and rank travel, as the first moment is 0. With it all four must: maximum,
    sum and moment are of the rank's own columns, and although only one rank holds the target's logit, nothing smaller
    of one shape on every rank carries it. It fits into none of the other three exactly; a fifth message of [T], or
    parts as long as the number of targets that a rank holds, would cost another collective or a wait for the device.
    """
    if group is None or dist.get_world_size(group) == 1:
        return stats.unsqueeze(0)
    sent = stats if with_entropy else torch.cat((stats[:, :2], stats[:, 3:]), dim=1)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group=group)
    received = torch.stack(parts)
    if with_entropy:
        return received
    return torch.cat((received[..., :2], torch.zeros_like(received[..., :1]), received[..., 2:]), dim=-1)


def combine_stats(parts: Tensor, temperature: float) -> Tensor:
    """Statistics [T, 4] of the union of the columns that ``parts`` describe; arguments as in :func:`merge_stats`."""
    return parts[0] if len(parts) == 1 else torch.stack(_merged(parts, temperature), dim=1).to(parts.dtype)


def merge_stats(parts: Tensor, temperature: float) -> SoftmaxResult:
    """Exact merge of the row statistics of all shards (online softmax, Milakov and Gimelshein 2018).

    Args:
        parts: [num_shards, T, 4]: per shard the largest logit m, sum of e = exp((x - m) / temperature), sum of
            e * (x - m), and the target's logit (-inf on shards that do not hold it).
        temperature: divides the logits.

    Returns:
        The merged result; NaN in rows without a finite logit or with a NaN or +inf logit.
    """
    maximum, total, moment, target = _merged(parts, temperature)
    total = torch.where(total >= 0.5, total, torch.nan)  # the largest logit alone contributes 1
    log_total = total.log()
    log_probs = (target - maximum) / temperature - log_total
    return SoftmaxResult(maximum, total, log_probs, log_total - moment / (total * temperature))


def _merged(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    largest, sums, weighted, target = parts.double().unbind(-1)
    maximum = largest.amax(0)
    shift = largest - maximum
    scale = (shift / temperature).exp()
    return maximum, (scale * sums).sum(0), (scale * (weighted + sums * shift)).sum(0), target.amax(0)


def saved_for_backward(result: SoftmaxResult, with_entropy: bool, dtype: torch.dtype) -> Tensor:
    """What the gradient needs of every row, [T, 3]: maximum, total, entropy (0 without it)."""
    entropy = result.entropy if with_entropy else torch.zeros_like(result.total)
    return torch.stack((result.maximum, result.total, entropy), dim=1).to(dtype)


def row_gradients(saved: Tensor, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """``saved`` and the gradients of both results (None counts as 0), [T, 5], as ``logits_grad`` takes them."""
    rows = saved.new_zeros((saved.shape[0], 5))
    rows[:, :3] = saved
    if grad_log_probs is not None:
        rows[:, 3] = grad_log_probs
    if grad_entropy is not None:
        rows[:, 4] = grad_entropy
    return rows
