"""Row statistics and logit gradients of token_logprobs by the CUDA kernels (csrc/cuda/token_logprobs.cu).

Nothing here waits for the device, so both operations can be captured into a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spear_megatron.kernels.cuda_library import call
from spear_megatron.kernels.softmax_stats import VocabShard

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and stream, the first arguments of every kernel; the current device is that of the tensor."""
    return tensor.get_device(), torch.cuda.current_stream().cuda_stream


def _logits_arguments(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float
) -> tuple[int | float, ...]:
    """What both kernels take first, see csrc/cuda/token_logprobs.h."""
    return (
        *_place(logits),
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.stride(0),
        shard.columns,
        targets.data_ptr(),
        shard.first_column,
        temperature,
    )


def _values(grad: Tensor | None) -> tuple[int | None, int]:
    """Address and stride of a gradient [T]; null counts as zeros."""
    return (None, 0) if grad is None else (grad.data_ptr(), grad.stride(0))


def row_stats(logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, with_entropy: bool) -> Tensor:
    """Statistics of this shard's columns in one read of the logits; fp32 [T, 4], see `merge_stats`.

    Args:
        logits: fp32, bf16 or fp16 [T, V_local] on a CUDA device, last dimension of stride 1.
        targets: int64 [T], contiguous, global token ids, on the same device.
        shard: which columns these are.
        temperature: divides the logits.
        with_entropy: fill the first moment (0 otherwise).

    Raises:
        RunError: the library is missing or CUDA refuses the launch.
    """
    with torch.cuda.device(logits.device):
        stats = torch.empty((logits.shape[0], 4), dtype=torch.float32, device=logits.device)
        arguments = _logits_arguments(logits, targets, shard, temperature)
        call("spear_token_logprobs_forward", *arguments, int(with_entropy), stats.data_ptr())
    return stats


def merge_rows(parts: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """As the eager `merge_rows`, fp32 parts on a CUDA device in one kernel (csrc/softmax_merge.h).

    Raises:
        RunError: the library is missing or CUDA refuses the launch.
    """
    held, rows = parts.contiguous(), parts.shape[1]
    with torch.cuda.device(parts.device):
        log_probs, saved = parts.new_empty(rows), parts.new_empty((rows, 3))
        entropy = parts.new_empty(rows) if with_entropy else None
        call(
            "spear_merge_rows",
            *_place(held),
            held.data_ptr(),
            len(held),
            rows,
            temperature,
            log_probs.data_ptr(),
            None if entropy is None else entropy.data_ptr(),
            saved.data_ptr(),
        )
    return log_probs, entropy, saved


def row_gradients(saved: Tensor, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """As `softmax_stats.row_gradients`, of fp32 tensors on a CUDA device; the gradients may have any stride.

    Raises:
        RunError: the library is missing or CUDA refuses the launch.
    """
    with torch.cuda.device(saved.device):
        rows = saved.new_empty((len(saved), 5))
        call(
            "spear_join_rows",
            *_place(saved),
            saved.data_ptr(),
            *_values(grad_log_probs),
            *_values(grad_entropy),
            len(saved),
            rows.data_ptr(),
        )
    return rows


def logits_grad(
    logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float, row_grads: Tensor, out: Tensor
) -> None:
    """Write the gradient of the logits into ``out`` (may be the logits); arguments as in the eager `logits_grad`.

    ``row_grads`` is fp32 [T, 5] and contiguous.

    Raises:
        RunError: the library is missing or CUDA refuses the launch.
    """
    with torch.cuda.device(logits.device):
        arguments = _logits_arguments(logits, targets, shard, temperature)
        call(
            "spear_token_logprobs_backward",
            *arguments,
            row_grads.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            out.shape[1],
        )
