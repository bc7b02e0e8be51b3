"""Runs packed micro-batches through the pipeline, for tests of the model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.forward import packed_seq_params

Finish = Callable[[torch.Tensor, Any], Any]


def run_pipeline(chunks: list, batches: Sequence[Any], finish: Finish, *, backward: bool) -> list[Any]:
    """``finish(logits [1, T, padded_vocab / tp], batch)`` of every micro-batch on the last stage, [] elsewhere.

    A batch has tokens, position_ids and cu_seqlens. Forward only, what ``finish`` returns is kept; with ``backward``
    it is the scalar loss, whose gradients are accumulated and reduced.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[Any], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output = chunk(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(batch.cu_seqlens),
        )

        def loss(logits: torch.Tensor, non_loss_data: bool = False) -> Any:
            result = finish(logits, batch)
            return result if non_loss_data else (result, torch.tensor(0, dtype=torch.int), {})

        return output, loss

    with megatron_on_cpu(), torch.set_grad_enabled(backward):
        for chunk in chunks:
            chunk.train(backward)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=len(batches[0].tokens),
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
        )
