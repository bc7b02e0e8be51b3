"""Log-probability of given tokens, and the entropy, straight from vocabulary-parallel logits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spear_megatron.kernels.backends import choose_backend
from spear_megatron.kernels.checks import check_inputs, check_settings, differentiable_once
from spear_megatron.kernels.ops import token_logprobs_op
from spear_megatron.kernels.softmax_stats import (
    VocabShard,
    check_targets,
    gather_stats,
    own_shard,
)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    with_entropy: bool = True,
    group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of one target per row of logits and the entropy of the row, both differentiable.

    The forward pass reads the logits once and keeps three numbers per row; the backward pass recomputes the softmax
    from the logits. Nothing of size [T, V] is stored besides the logits and their gradient. Under torch.compile it is
    one operator of the graph (`spear::token_logprobs`); with a group of several ranks it breaks the graph.

    Args:
        logits: [T, V_local], fp32 or bf16 (on CUDA also fp16, eager also fp64); rows of any stride, last dimension of
            stride 1.
            With a group, rank r holds the columns [r * V_local, (r + 1) * V_local) of the vocabulary.
        targets: int64 [T], global token ids below ``valid_vocab``. Out-of-range ids raise on the CPU; elsewhere,
            where a check would have to wait for the device, their log-prob is -inf.
        temperature: the logits are divided by it, as in sampling; from 1e-9 to 1e9.
        valid_vocab: number of real columns of the whole vocabulary; the padding columns after them take no part and
            get a gradient of exactly 0. None: all columns are real.
        with_entropy: False skips the entropy and returns None in its place.
        group: tensor-parallel process group; None or one of size 1 means that every column is here. The forward pass
            makes one all-gather of [T, 4] fp32 ([T, 3] without the entropy), the backward pass none: every rank must
            receive the same gradient of the results, as when all of them compute the same loss.
        implementation: "auto" takes the compiled kernel on the CPU and on CUDA and the eager one on other devices;
            where there is a compiled one that cannot be used (not built, other dtype) it warns once and takes the
            eager one. "compiled" raises instead, "eager" never uses the compiled kernels. `available` tells what
            "auto" takes.
        inplace_backward: the backward pass overwrites the logits with their gradient instead of allocating [T, V].
            Only for logits that nothing else reads afterwards; autograd detects a later backward use of them.

    Returns:
        Log-probs [T] and entropies in nats [T] (or None): fp32, fp64 for fp64 logits. NaN for rows with a NaN or
        +inf logit or without any finite logit.

    Raises:
        ValueError: shapes, dtypes, strides or values outside of what is described above.
        RunError: ``implementation="compiled"`` and the compiled kernels are missing or do not fit.
    """
    check_inputs(logits, targets)
    check_settings(temperature, implementation)
    shard, valid = own_shard(logits.shape[1], valid_vocab, group)
    if inplace_backward and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError("inplace_backward needs logits whose rows do not overlap; pass a contiguous tensor")
    if torch.compiler.is_compiling() and (group is None or dist.get_world_size(group) == 1):
        log_probs, entropy, _ = token_logprobs_op(
            logits, targets, valid, temperature, with_entropy, implementation, inplace_backward
        )
        return log_probs, entropy if with_entropy else None
    check_targets(targets, valid)
    backend = choose_backend(logits.dtype, logits.device, implementation)
    log_probs, entropy = _TokenLogprobs.apply(
        logits, targets.contiguous(), shard, temperature, with_entropy, group, backend, inplace_backward
    )  # fmt: skip
    return log_probs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        shard: VocabShard,
        temperature: float,
        with_entropy: bool,
        group: dist.ProcessGroup | None,
        backend: ModuleType,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stats = backend.row_stats(logits, targets, shard, temperature, with_entropy)
        parts = gather_stats(stats, group, with_entropy)
        log_probs, entropy, saved = backend.merge_rows(parts, temperature, with_entropy)
        ctx.save_for_backward(logits, targets, saved)
        ctx.set_materialize_grads(False)
        ctx.shard, ctx.temperature, ctx.backend, ctx.inplace = shard, temperature, backend, inplace_backward
        return log_probs, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, saved = ctx.saved_tensors
        row_grads = ctx.backend.row_gradients(saved, grad_log_probs, grad_entropy)
        logits = logits.detach()
        out = logits if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        ctx.backend.logits_grad(logits, targets, ctx.shard, ctx.temperature, row_grads, out)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None, None, None
