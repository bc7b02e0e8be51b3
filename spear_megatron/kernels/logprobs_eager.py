"""Row statistics and logit gradients of token_logprobs in plain torch operations, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spear_megatron.kernels.softmax_stats import LOWEST, VocabShard, merge_stats, row_gradients, saved_for_backward

__all__ = ["logits_grad", "merge_rows", "row_gradients", "row_stats"]

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # bounds each fp32 temporary: to the cache, or to 256 MiB
_FLOOR = -125 * math.log(2)  # exponents below it count as 0, as in the compiled kernels


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    step = max(1, _CHUNK_ELEMENTS.get(logits.device.type, 1 << 26) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _local_targets(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Local column of each target (0 where another shard holds it) and whether this shard holds it, both [T, 1]."""
    local = (targets - shard.first_column).unsqueeze(1)
    owned = (local >= 0) & (local < shard.columns)
    return torch.where(owned, local, 0), owned


def row_stats(logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, with_entropy: bool) -> Tensor:
    """Statistics of this shard's columns, see `merge_stats`.

    Args:
        logits: floating [T, V_local].
        targets: int64 [T], global token ids.
        shard: which columns these are.
        temperature: divides the logits.
        with_entropy: fill the first moment (0 otherwise).

    Returns:
        [T, 4], fp64 for fp64 logits and fp32 otherwise.
    """
    dtype = _compute_dtype(logits)
    stats = logits.new_zeros((logits.shape[0], 4), dtype=dtype)
    stats[:, 0], stats[:, 3] = LOWEST, -torch.inf
    if shard.columns == 0:
        return stats
    for rows in _row_chunks(logits):
        x = logits[rows, : shard.columns].to(dtype)
        maximum = x.amax(1, keepdim=True).clamp(min=LOWEST)
        local, owned = _local_targets(targets[rows], shard)
        stats[rows, 0:1] = maximum
        stats[rows, 3:4] = torch.where(owned, x.gather(1, local), -torch.inf)
        d = (x - maximum).clamp_(min=_FLOOR * temperature)
        e = (d / temperature).exp_()
        stats[rows, 1] = e.sum(1)
        if with_entropy:
            stats[rows, 2] = e.mul_(d).sum(1)
    return stats


def merge_rows(parts: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Results of every row from the statistics of all shards, of the dtype of ``parts``; see `merge_stats`.

    Args:
        parts: [num_shards, T, 4].
        temperature: divides the logits.
        with_entropy: the moments are filled; False: no entropy.

    Returns:
        Log-probs [T], entropies [T] (or None) and what `saved_for_backward` keeps, [T, 3].
    """
    result, dtype = merge_stats(parts, temperature), parts.dtype
    saved = saved_for_backward(result, with_entropy, dtype)
    return result.log_probs.to(dtype), result.entropy.to(dtype) if with_entropy else None, saved


def logits_grad(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, row_grads: Tensor, out: Tensor
) -> None:
    """Write the gradient of the logits into ``out``; the softmax is recomputed from the logits.

    With p the softmax and H its entropy, d log p_t / dx_j = (1[j = t] - p_j) / temperature and
    dH / dx_j = -p_j (log p_j + H) / temperature. Rows whose two gradients are 0 give exactly 0, as padding columns do.

    Args:
        logits: floating [T, V_local], as in the forward pass.
        targets: int64 [T], global token ids.
        shard: which columns these are.
        temperature: divides the logits.
        row_grads: [T, 5]: maximum and total over the whole vocabulary, entropy, gradient of the log-prob, gradient
            of the entropy.
        out: [T, V_local] of the dtype of the logits; may be the logits themselves.
    """
    dtype = _compute_dtype(logits)
    out[:, shard.columns :] = 0
    if shard.columns == 0:
        return
    maximum, total, entropy, grad_logprob, grad_entropy = row_grads.to(dtype).unsqueeze(1).unbind(-1)
    factor = -(grad_logprob + grad_entropy * (entropy - total.log())) / (total * temperature)
    slope = -grad_entropy / (total * temperature**2)
    unused = (grad_logprob == 0) & (grad_entropy == 0)
    floor = _FLOOR * temperature
    for rows in _row_chunks(logits):
        d = (logits[rows, : shard.columns].to(dtype) - maximum[rows]).clamp_(min=floor)
        grad = (d / temperature).exp_().masked_fill_(d <= floor, 0)
        grad *= d.mul_(slope[rows]).add_(factor[rows])
        local, owned = _local_targets(targets[rows], shard)
        grad.scatter_add_(1, local, torch.where(owned, grad_logprob[rows] / temperature, 0))
        out[rows, : shard.columns] = grad.masked_fill_(unused[rows], 0)
