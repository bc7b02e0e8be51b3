"""Describes packed sequences to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int | None = None) -> PackedSeqParams:
    """Megatron's description of packed sequences: attention and rotary positions restart at every offset.

    A micro-batch is fed to a chunk as ``chunk(input_ids=tokens[None], position_ids=position_ids[None],
    attention_mask=None, packed_seq_params=packed_seq_params(cu_seqlens))``, all on the model's device. A last-stage
    chunk answers with logits [1, T, padded_vocab / tp] (under sequence parallelism too, where T must be a multiple
    of the tensor size), any other with the hidden states of the next chunk.

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
