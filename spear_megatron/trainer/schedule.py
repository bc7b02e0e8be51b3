"""Drives Megatron's pipeline schedules over packed micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.forward import packed_seq_params
from spear_megatron.model.head import HeadInput, ready_head, without_head
from spear_megatron.parallel.context import context_positions
from spear_megatron.parallel.state import ParallelState
from spear_megatron.types import MicroBatch, TrainBatch

HeadLoss = Callable[[HeadInput, MicroBatch], tuple[torch.Tensor, Any]]
"""(input of the LM head, micro-batch) -> (scalar loss, anything to hand back)."""

_TOKENS = (
    "tokens",
    "targets",
    "position_ids",
    "loss_mask",
    "token_weight",
    "advantages",
    "old_log_probs",
    "rollout_log_probs",
    "ref_log_probs",
    "surrogate_weight",
    "replayed",
    "selected",
    "token_keys",
)


@dataclass(frozen=True, slots=True)
class _Item:
    index: int
    batch: MicroBatch
    packed: Any


def run_forward_backward(
    chunks: Sequence[torch.nn.Module],
    batch: TrainBatch,
    loss: HeadLoss,
    parallel: ParallelState,
) -> list[Any]:
    """Forward and backward over all micro-batches, gradients finalized over all ranks.

    The loss of the step is the sum over micro-batches and ranks (data and context parallel): nothing divides by a
    count, because the third value handed to Megatron (the token count) is 0 and ``calculate_per_token_loss`` is set.

    Returns:
        What ``loss`` handed back, by micro-batch, on the last pipeline stage; an empty list elsewhere.
    """

    def loss_function(
        item: _Item, weight: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        value, extra = loss(HeadInput(output.squeeze(1), weight), item.batch)
        return value, torch.zeros((), dtype=torch.int, device=value.device), (item.index, extra)

    for chunk in chunks:
        chunk.train()
    with _reduction_is_a_wait(chunks, parallel):
        return _run(chunks, batch, loss_function, parallel, forward_only=False)


@contextlib.contextmanager
def _reduction_is_a_wait(chunks: Sequence[torch.nn.Module], parallel: ParallelState) -> Iterator[None]:
    """Count the reduction of the gradients as waiting: a rank that comes early spends its time there."""
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    finalize = config.finalize_model_grads_func

    def counted(*args: Any, **options: Any) -> None:
        _synchronize(parallel)
        with parallel.waits.waiting():
            finalize(*args, **options)
            _synchronize(parallel)

    config.finalize_model_grads_func = counted
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _synchronize(parallel: ParallelState) -> None:
    if parallel.platform.is_cuda:
        torch.cuda.synchronize()


def run_forward(
    chunks: Sequence[torch.nn.Module],
    batch: TrainBatch,
    read: Callable[[HeadInput, MicroBatch], Any],
    parallel: ParallelState,
) -> list[Any]:
    """Forward only, no gradients: what ``read(input of the LM head, micro-batch)`` returns, by micro-batch.

    Returns:
        One value per micro-batch on the last pipeline stage; an empty list elsewhere.
    """

    def collect(item: _Item, weight: torch.Tensor, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return item.index, read(HeadInput(output.squeeze(1), weight), item.batch)

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        return _run(chunks, batch, collect, parallel, forward_only=True, collect_non_loss_data=True)


def _run(
    chunks: Sequence[torch.nn.Module],
    batch: TrainBatch,
    loss_function: Callable[..., Any],
    parallel: ParallelState,
    **options: bool,
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Iterator[_Item], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        item = next(iterator)
        with without_head(model):
            output = model(
                input_ids=item.batch.tokens.unsqueeze(0),
                position_ids=item.batch.position_ids.unsqueeze(0),
                attention_mask=None,
                packed_seq_params=item.packed,
            )
        # Every stage names one, the last uses it.
        is_last = parallel.is_last_stage and model is chunks[-1]
        return output, partial(loss_function, item, ready_head(model) if is_last else torch.empty(0))

    items = _items(batch, parallel)
    with megatron_on_cpu():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(items) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(items),
            seq_length=len(batch.micro_batches[0].tokens),
            micro_batch_size=1,
            **options,
        )
    return [value for _, value in sorted(results, key=lambda pair: pair[0])]


def _items(batch: TrainBatch, parallel: ParallelState) -> list[_Item]:
    """Micro-batches on the device, with the tokens of this context-parallel rank; offsets stay those of all tokens."""
    device, items = parallel.platform.device, []
    for index, micro_batch in enumerate(batch.micro_batches):
        tokens = {name: getattr(micro_batch, name) for name in _TOKENS}
        if parallel.cp_size > 1:
            own = context_positions(micro_batch.cu_seqlens.tolist(), parallel.cp_rank, parallel.cp_size)
            tokens = {name: values[own] for name, values in tokens.items()}
        offsets = micro_batch.cu_seqlens.to(device)
        moved = replace(micro_batch, cu_seqlens=offsets, **{name: value.to(device) for name, value in tokens.items()})
        items.append(_Item(index, moved, packed_seq_params(offsets, batch.max_seqlen)))
    return items
