"""token_logprobs as operators of torch (``torch.ops.spear``), which torch.compile keeps in its graph as they are.

Outside of torch.compile :func:`spear_megatron.kernels.token_logprobs` does not go through them: a registered operator
costs more per call than the autograd function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_megatron.kernels.backends import choose_backend
from spear_megatron.kernels.checks import check_inputs, check_settings, refuse_graph
from spear_megatron.kernels.softmax_stats import (
    VocabShard,
    check_targets,
    row_gradients,
)


@torch.library.custom_op(
    "spear::token_logprobs",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, int valid_vocab, float temperature, bool with_entropy, "
    "str implementation, bool inplace_backward) -> (Tensor, Tensor, Tensor)",
)
def token_logprobs_op(
    logits: Tensor,
    targets: Tensor,
    valid_vocab: int,
    temperature: float,
    with_entropy: bool,
    implementation: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logprobs` of a whole vocabulary; arguments as there, ``valid_vocab`` given.

    Returns:
        Log-probs [T], entropies [T] ([0] without them), and [T, 3] for the backward pass (`saved_for_backward`).

    Raises:
        ValueError: shapes, dtypes, strides or values that `token_logprobs` refuses.
        RunError: ``implementation="compiled"`` and the compiled kernels are missing or do not fit.
    """
    check_inputs(logits, targets)
    check_settings(temperature, implementation)
    check_targets(targets, valid_vocab)
    backend = choose_backend(logits.dtype, logits.device, implementation)
    stats = backend.row_stats(logits, targets.contiguous(), VocabShard(0, valid_vocab), temperature, with_entropy)
    log_probs, entropy, saved = backend.merge_rows(stats.unsqueeze(0), temperature, with_entropy)
    return log_probs, stats.new_empty(0) if entropy is None else entropy, saved


@torch.library.register_fake("spear::token_logprobs")
def _token_logprobs_fake(
    logits: Tensor,
    targets: Tensor,
    valid_vocab: int,
    temperature: float,
    with_entropy: bool,
    implementation: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], torch.float64 if logits.dtype == torch.float64 else torch.float32
    entropy = logits.new_empty(rows if with_entropy else 0, dtype=dtype)
    return logits.new_empty(rows, dtype=dtype), entropy, logits.new_empty((rows, 3), dtype=dtype)


@torch.library.custom_op(
    "spear::logits_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, int valid_vocab, float temperature, Tensor row_grads, "
    "str implementation) -> Tensor",
)
def logits_grad_op(
    logits: Tensor, targets: Tensor, valid_vocab: int, temperature: float, row_grads: Tensor, implementation: str
) -> Tensor:
    """Gradient of the logits, [T, V]; ``row_grads`` [T, 5] as `logits_grad` of the implementations takes them."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(logits, targets, valid_vocab, temperature, row_grads, implementation, out)
    return out


@torch.library.register_fake("spear::logits_grad")
def _logits_grad_fake(
    logits: Tensor, targets: Tensor, valid_vocab: int, temperature: float, row_grads: Tensor, implementation: str
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    "spear::logits_grad_",
    mutates_args={"logits"},
    schema="(Tensor(a!) logits, Tensor targets, int valid_vocab, float temperature, Tensor row_grads, "
    "str implementation) -> ()",
)
def logits_grad_inplace_op(
    logits: Tensor, targets: Tensor, valid_vocab: int, temperature: float, row_grads: Tensor, implementation: str
) -> None:
    """`logits_grad_op` that overwrites the logits."""
    _write_gradient(logits, targets, valid_vocab, temperature, row_grads, implementation, logits)


def _write_gradient(
    logits: Tensor,
    targets: Tensor,
    valid_vocab: int,
    temperature: float,
    row_grads: Tensor,
    implementation: str,
    out: Tensor,
) -> None:
    check_inputs(logits, targets)
    backend = choose_backend(logits.dtype, logits.device, implementation)
    shard = VocabShard(0, valid_vocab)
    backend.logits_grad(logits, targets.contiguous(), shard, temperature, row_grads.contiguous(), out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *ctx.settings = inputs
    ctx.save_for_backward(logits, targets, output[2])


def _differentiate(
    ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, grad_saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_graph()
    logits, targets, saved = ctx.saved_tensors
    valid_vocab, temperature, with_entropy, implementation, inplace_backward = ctx.settings
    row_grads = row_gradients(saved, grad_log_probs, grad_entropy if with_entropy else None)
    arguments = (targets, valid_vocab, temperature, row_grads, implementation)
    if inplace_backward:
        grad = logits.detach()
        torch.ops.spear.logits_grad_(grad, *arguments)
    else:
        grad = torch.ops.spear.logits_grad(logits, *arguments)
    return grad, None, None, None, None, None, None


torch.library.register_autograd("spear::token_logprobs", _differentiate, setup_context=_keep)
