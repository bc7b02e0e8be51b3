"""Brings the hidden states that the LM head needs, and no others, to every rank of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def select_rows(
    hidden: Tensor, rows: Tensor | None, num_rows: int, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """The wanted rows of the head's input, on every rank of ``group``; their gradients are summed over it.

    Args:
        hidden: [T, H]; with ``sequence_parallel`` and a group this rank's [T / TP, H].
        rows: int64 [n] ascending, the wanted ones of all T; None: all.
        num_rows: T.
        group: tensor-parallel group of more than one rank, or None.

    Returns:
        [n, H]; nothing else travels, neither forward nor backward.
    """
    if group is None:
        return hidden if rows is None else hidden.index_select(0, rows)
    if not sequence_parallel:
        chosen = hidden if rows is None else hidden.index_select(0, rows)
        result: Tensor = _SummedGradient.apply(chosen, group)
        return result
    plan = _CutRows.of(rows, num_rows, hidden.device, group)
    result = _GatherRows.apply(hidden, plan, group)
    return result


class _SummedGradient(torch.autograd.Function):
    """Identity; every rank's gradient is only the part of its own vocabulary columns."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # the incoming one may belong to others
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True, slots=True)
class _CutRows:
    """Wanted rows by the rank that holds them.

    Attributes:
        own: int64 [n_r], which of this rank's rows are wanted.
        places: int64 [n], where the wanted rows lie in the gathered [TP * width, H].
        width: largest n_r; every rank sends so many rows.
    """

    own: Tensor
    places: Tensor
    width: int

    @classmethod
    def of(
        cls, rows: Tensor | None, num_rows: int, device: torch.device, group: dist.ProcessGroup
    ) -> _CutRows:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        part = num_rows // world
        wanted = torch.arange(num_rows, device=device) if rows is None else rows
        holder = wanted // part if part else wanted
        counts = torch.bincount(holder, minlength=world)
        firsts = counts.cumsum(0) - counts
        width = int(counts.max())
        places = holder * width + torch.arange(len(wanted), device=device) - firsts[holder]
        return cls(wanted[holder == rank] - rank * part, places, width)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: _CutRows, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.num_own = plan, group, len(hidden)
        sent = hidden.new_zeros((plan.width, hidden.shape[1]))
        sent[: len(plan.own)] = hidden.index_select(0, plan.own)
        gathered = hidden.new_empty((plan.width * dist.get_world_size(group), hidden.shape[1]))
        dist.all_gather_into_tensor(gathered, sent, group=group)
        return gathered.index_select(0, plan.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan: _CutRows = ctx.plan
        spread = grad.new_zeros((plan.width * dist.get_world_size(ctx.group), grad.shape[1]))
        spread.index_copy_(0, plan.places, grad)
        summed = grad.new_empty((plan.width, grad.shape[1]))
        dist.reduce_scatter_tensor(summed, spread, group=ctx.group)
        own = grad.new_zeros((ctx.num_own, grad.shape[1]))
        own.index_copy_(0, plan.own, summed[: len(plan.own)])
        return own, None, None
