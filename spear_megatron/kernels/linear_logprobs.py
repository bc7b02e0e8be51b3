"""Log-probability of given tokens, and the entropy, from hidden states: the LM head and the softmax in one operation.

Rows off the mask are never computed. The logits of the others are kept for the backward pass, where their gradient
overwrites them, as long as they fit into a byte budget; beyond it, slices of the vocabulary are computed twice and
thrown away (Megatron's head keeps all of them, and its cross-entropy two fp32 copies).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spear_megatron.kernels.backends import choose_backend
from spear_megatron.kernels.checks import check_settings, differentiable_once
from spear_megatron.kernels.head_rows import select_rows
from spear_megatron.kernels.softmax_stats import (
    VocabShard,
    check_targets,
    combine_stats,
    gather_stats,
    own_shard,
)

_MIN_SLICE_COLUMNS = 256  # narrower products of matrices waste the machine
_PIECE_COLUMNS = 4096  # of the vocabulary, whose weight gradients are made at a time where their dtype is another


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    with_entropy: bool = True,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    max_logits_bytes: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`token_logprobs` of ``hidden @ weight.T``, without logits of rows that nobody asks for.

    If ``weight`` has Megatron's ``main_grad``, its gradient is added there directly, and ``grad_added_to_main_grad`` is
    set as Megatron's own linear layers do, so that hooks on the weight still fire; a tied weight
    (``zero_out_wgrad``) works too.

    Args:
        hidden: [T, H], the input of the head, equal on all ranks of ``group``; with ``sequence_parallel`` [T / TP, H],
            rank r's rows r * T / TP and following.
        weight: [V_local, H], rows of the vocabulary on this rank, of the dtype of ``hidden``.
        targets: int64 [T], global token ids below ``valid_vocab``.
        mask: bool [T], rows to compute; the others get 0 and give no gradient. None: all. On a device, counting them
            waits for it.
        temperature, valid_vocab, with_entropy, implementation: as in :func:`token_logprobs`.
        group: tensor-parallel process group; None or one of size 1 means that the whole vocabulary is here. Every
            rank must pass the same mask and targets, and must receive the same gradient of the results.
        sequence_parallel: the rows of ``hidden`` are cut over the group.
        max_logits_bytes: the logits of the computed rows are kept for the backward pass if they take at most so many
            bytes on this rank; otherwise they are computed in slices of at most so many (but at least 256 columns),
            and again in the backward pass. None: always kept.

    Returns:
        Log-probs [T] and entropies in nats [T] (or None), fp32 (fp64 for fp64 input), 0 off the mask; the gradients of
        ``hidden`` are summed over ``group``.

    Raises:
        ValueError: shapes, dtypes or values outside of what is described above.
        RunError: ``implementation="compiled"`` and the compiled kernels are missing or do not fit.
    """
    check_settings(temperature, implementation)
    shard, valid = own_shard(weight.shape[0], valid_vocab, group)
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    _check(hidden, weight, targets, mask, group, sequence_parallel, max_logits_bytes)
    check_targets(targets, valid)
    rows = None if mask is None else mask.nonzero().squeeze(1).to(hidden.device)
    inputs = select_rows(hidden, rows, len(targets), group, sequence_parallel)
    wanted = targets if rows is None else targets[rows]
    head = _Head(
        shard=shard,
        temperature=temperature,
        with_entropy=with_entropy,
        group=group,
        backend=choose_backend(hidden.dtype, hidden.device, implementation),
        slice_columns=_slice_columns(len(wanted), weight, max_logits_bytes),
    )
    log_probs, entropy = _LinearTokenLogprobs.apply(inputs, weight, wanted.contiguous(), head)
    return _spread(log_probs, rows, len(targets)), None if entropy is None else _spread(entropy, rows, len(targets))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    max_logits_bytes: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden [T, H] and weight [V, H] must agree, not {hidden.dtype} {list(hidden.shape)} "
            f"and {weight.dtype} {list(weight.shape)}"
        )
    cut = dist.get_world_size(group) if group is not None and sequence_parallel else 1
    num_rows = hidden.shape[0] * cut
    if targets.dtype != torch.int64 or targets.shape != (num_rows,):
        raise ValueError(f"targets must be int64 [{num_rows}], not {targets.dtype} {list(targets.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_rows,)):
        raise ValueError(f"mask must be bool [{num_rows}], not {mask.dtype} {list(mask.shape)}")
    if max_logits_bytes is not None and max_logits_bytes < 1:
        raise ValueError(f"max_logits_bytes={max_logits_bytes} must be at least 1")


def _slice_columns(num_rows: int, weight: Tensor, max_logits_bytes: int | None) -> int:
    """Columns of the vocabulary that are computed at a time."""
    columns = weight.shape[0]
    if max_logits_bytes is None or num_rows == 0:
        return columns
    fitting = max_logits_bytes // (num_rows * weight.element_size())
    return min(columns, max(fitting, _MIN_SLICE_COLUMNS))


def _spread(values: Tensor, rows: Tensor | None, length: int) -> Tensor:
    return values if rows is None else values.new_zeros(length).index_copy(0, rows, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    shard: VocabShard
    temperature: float
    with_entropy: bool
    group: dist.ProcessGroup | None
    backend: ModuleType
    slice_columns: int

    def slices(self, num_columns: int) -> list[slice]:
        starts = range(0, num_columns, self.slice_columns)
        return [slice(start, min(start + self.slice_columns, num_columns)) for start in starts]

    def stats(self, logits: Tensor, targets: Tensor, part: slice) -> Tensor:
        shard = self.shard.part(part.start, part.stop)
        result: Tensor = self.backend.row_stats(logits, targets, shard, self.temperature, self.with_entropy)
        return result

    def differentiate(self, logits: Tensor, targets: Tensor, part: slice, row_grads: Tensor) -> None:
        """Overwrite the logits with their gradient."""
        shard = self.shard.part(part.start, part.stop)
        self.backend.logits_grad(logits, targets, shard, self.temperature, row_grads, logits)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        slices = head.slices(weight.shape[0])
        stats = []
        logits: Tensor | None = None
        for part in slices:
            logits = None  # before the next slice, so that one is held at a time
            logits = inputs @ weight[part].t()
            stats.append(head.stats(logits, targets, part))
        combined = combine_stats(torch.stack(stats), head.temperature)
        parts = gather_stats(combined, head.group, head.with_entropy)
        log_probs, entropy, saved = head.backend.merge_rows(parts, head.temperature, head.with_entropy)
        ctx.save_for_backward(inputs, weight, targets, saved)
        ctx.logits = logits if len(slices) == 1 and any(ctx.needs_input_grad) else None
        ctx.set_materialize_grads(False)
        ctx.head, ctx.main_grad = head, getattr(weight, "main_grad", None)
        return log_probs, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, weight, targets, saved = ctx.saved_tensors
        head: _Head = ctx.head
        slices = head.slices(weight.shape[0])
        kept, ctx.logits = ctx.logits, None
        row_grads = head.backend.row_gradients(saved, grad_log_probs, grad_entropy)
        grad_inputs = _InputGradient(inputs) if ctx.needs_input_grad[0] else None
        sink = _WeightGradient(weight, ctx.main_grad) if ctx.needs_input_grad[1] else None
        logits: Tensor | None = None
        for part in slices:
            logits = None  # as in the forward pass
            # A second backward pass over a retained graph computes the logits again.
            logits = inputs @ weight[part].t() if kept is None else kept
            head.differentiate(logits, targets, part, row_grads)
            if grad_inputs is not None:
                grad_inputs.add(logits, weight[part])
            if sink is not None:
                sink.add(part, logits, inputs)
        return (
            None if grad_inputs is None else grad_inputs.result(),
            None if sink is None else sink.result(),
            None,
            None,
        )


class _InputGradient:
    """Sum of products over slices of the vocabulary, in fp32 at least."""

    def __init__(self, inputs: Tensor) -> None:
        self._dtype = inputs.dtype
        self._sum: Tensor | None = None

    def add(self, grad_logits: Tensor, weight: Tensor) -> None:
        if self._sum is None:
            self._sum = grad_logits @ weight
        elif self._dtype in (torch.float32, torch.float64):
            self._sum.addmm_(grad_logits, weight)
        else:
            self._sum = self._sum.float().add_(grad_logits @ weight)

    def result(self) -> Tensor:
        assert self._sum is not None
        return self._sum.to(self._dtype)


class _WeightGradient:
    """Gradient of the head's rows, each written once per pass: into Megatron's ``main_grad`` where there is one."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None) -> None:
        self._weight = weight
        self._into_main = main_grad is not None and hasattr(weight, "grad_added_to_main_grad")
        self._sum = main_grad if main_grad is not None and self._into_main else torch.zeros_like(weight)

    def add(self, part: slice, grad_logits: Tensor, inputs: Tensor) -> None:
        target = self._sum[part]
        if target.dtype == inputs.dtype:
            target.addmm_(grad_logits.t(), inputs)
            return
        # In pieces, as the product and (on the CPU) its copy in the other dtype are three times the weight in bf16.
        pieces = zip(target.split(_PIECE_COLUMNS), grad_logits.split(_PIECE_COLUMNS, dim=1), strict=True)
        for piece, grads in pieces:
            piece.add_(grads.t() @ inputs)

    def result(self) -> Tensor:
        if not self._into_main:
            return self._sum
        # The hook on the weight must fire, with something in ``grad``; it ignores what it finds there, except on a
        # weight that the embedding shares: there autograd adds the embedding's gradient to it.
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        shared = getattr(self._weight, "zero_out_wgrad", False)
        return torch.zeros_like(self._weight) if shared else torch.empty_like(self._weight)
