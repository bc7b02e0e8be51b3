"""Row statistics and logit gradients of token_logprobs by the compiled CPU kernels (csrc/token_logprobs.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_megatron.kernels.extension import compiled_module
from spear_megatron.kernels.softmax_stats import VocabShard

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def row_stats(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, with_entropy: bool, isa: str = "auto"
) -> Tensor:
    """Statistics of this shard's columns in one read of the logits; fp32 [T, 4], see `merge_stats`.

    Args:
        logits: fp32 or bf16 [T, V_local] on the CPU, last dimension of stride 1.
        targets: int64 [T], contiguous, global token ids.
        shard: which columns these are.
        temperature: divides the logits.
        with_entropy: fill the first moment (0 otherwise).
        isa: "auto", or a particular instruction set (generic, avx2, avx512).
    """
    stats = torch.empty((logits.shape[0], 4), dtype=torch.float32)
    compiled_module().token_logprobs_forward(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        rows=logits.shape[0],
        row_stride=logits.stride(0),
        columns=shard.columns,
        targets=targets.data_ptr(),
        first_column=shard.first_column,
        temperature=temperature,
        with_entropy=with_entropy,
        stats=stats.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return stats


def merge_rows(parts: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """As the eager `merge_rows`, fp32 parts on the CPU in one pass (csrc/softmax_merge.h)."""
    held, rows = parts.contiguous(), parts.shape[1]
    log_probs, saved = parts.new_empty(rows), parts.new_empty((rows, 3))
    entropy = parts.new_empty(rows) if with_entropy else None
    compiled_module().merge_rows(
        parts=held.data_ptr(),
        shards=len(held),
        rows=rows,
        temperature=temperature,
        log_probs=log_probs.data_ptr(),
        entropy=0 if entropy is None else entropy.data_ptr(),
        saved=saved.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return log_probs, entropy, saved


def row_gradients(saved: Tensor, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """As `softmax_stats.row_gradients`, of fp32 tensors on the CPU; the gradients may have any stride."""
    rows = saved.new_empty((len(saved), 5))
    compiled_module().join_rows(
        saved=saved.data_ptr(),
        log_probs=0 if grad_log_probs is None else grad_log_probs.data_ptr(),
        log_probs_stride=0 if grad_log_probs is None else grad_log_probs.stride(0),
        entropy=0 if grad_entropy is None else grad_entropy.data_ptr(),
        entropy_stride=0 if grad_entropy is None else grad_entropy.stride(0),
        rows=len(saved),
        out=rows.data_ptr(),
    )
    return rows


def logits_grad(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    temperature: float,
    row_grads: Tensor,
    out: Tensor,
    isa: str = "auto",
) -> None:
    """Write the gradient of the logits into ``out`` (may be the logits); arguments as in the eager `logits_grad`.

    ``row_grads`` is fp32 [T, 5] and contiguous; ``isa`` as in `row_stats`.
    """
    compiled_module().token_logprobs_backward(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        rows=logits.shape[0],
        row_stride=logits.stride(0),
        columns=shard.columns,
        targets=targets.data_ptr(),
        first_column=shard.first_column,
        temperature=temperature,
        with_entropy=bool(row_grads[:, 4].any()),
        row_grads=row_grads.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        out_columns=out.shape[1],
        threads=torch.get_num_threads(),
        isa=isa,
    )
