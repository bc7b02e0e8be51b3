"""Feeds packed sequences to the model, and runs the pipeline forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from spear_megatron.device.cpu_shim import megatron_on_cpu

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.module import MegatronModule

Result = TypeVar("Result")


class PackedInput(Protocol):
    """What the model needs of a micro-batch (``types.MicroBatch`` has it): int64 [T], int64 [T], int32 [n + 1]."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def position_ids(self) -> torch.Tensor: ...

    @property
    def cu_seqlens(self) -> torch.Tensor: ...


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int | None = None) -> PackedSeqParams:
    """Megatron's description of packed sequences.

    Args:
        cu_seqlens: int32 [num_sequences + 1], offsets; the last is the number of tokens T.
        max_seqlen: length of the longest sequence; read from ``cu_seqlens`` if not given (waits for its device).
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def forward_chunk(chunk: torch.nn.Module, batch: PackedInput) -> torch.Tensor:
    """One chunk's forward pass on one packed micro-batch; positions restart at 0 in every packed sequence.

    Returns:
        logits [1, T, padded_vocab / tp] in the model's dtype on a last-stage chunk (under sequence parallelism too),
        else hidden states [T, 1, hidden] ([T / tp, 1, hidden] under sequence parallelism) for the next chunk.
        ``T`` must be a multiple of the tensor size under sequence parallelism.
    """
    return chunk(
        input_ids=batch.tokens.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        attention_mask=None,
        packed_seq_params=packed_seq_params(batch.cu_seqlens),
    )


def forward_only(
    model_chunks: Sequence[MegatronModule],
    batches: Sequence[PackedInput],
    collect: Callable[[torch.Tensor, PackedInput], Result],
) -> list[Result]:
    """Run every micro-batch through the pipeline without gradients. Every rank of the model takes part.

    All micro-batches must have the same number of tokens, and there must be the same number on every rank; with
    virtual stages that number must be a multiple of the pipeline size.

    Args:
        collect: turns (logits [1, T, padded_vocab / tp], micro-batch) into what is kept; called on the last stage.

    Returns:
        the results in micro-batch order on last-stage ranks, an empty list on the others.

    Raises:
        ValueError: no micro-batch, or micro-batches of different token counts.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    lengths = {len(batch.tokens) for batch in batches}
    if len(lengths) != 1:
        raise ValueError(f"micro-batches must all have the same number of tokens, got {sorted(lengths)}")

    def step(iterator: Iterator[PackedInput], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        return forward_chunk(chunk, batch), lambda logits, non_loss_data: collect(logits, batch)

    was_training = [chunk.training for chunk in model_chunks]
    try:
        for chunk in model_chunks:
            chunk.eval()
        with megatron_on_cpu(), torch.no_grad():
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(batches) for _ in model_chunks],
                model=list(model_chunks),
                num_microbatches=len(batches),
                seq_length=lengths.pop(),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        for chunk, training in zip(model_chunks, was_training, strict=True):
            chunk.train(training)
