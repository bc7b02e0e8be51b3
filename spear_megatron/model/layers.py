"""What the plain layer spec needs beyond megatron-core: a norm for sequence parallelism, and packed attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from spear_megatron.parallel.context import context_chunks, gathered_order

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in float32.

    The weight carries Megatron's ``sequence_parallel`` mark: under sequence parallelism every tensor rank sees only
    its part of the tokens, and Megatron sums the gradients of marked weights over the tensor ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] in any float dtype -> same shape and dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # rounded to the activations' dtype before the weight, as the published models do
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class SDPAttention(torch.nn.Module):
    """Causal core attention on ``scaled_dot_product_attention``: grouped queries, packed (THD) sequences.

    Under context parallelism a rank holds the queries of its own tokens and gathers the keys and values of all.
    Takes the constructor and forward arguments that megatron-core gives to any core attention.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self._context_size = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention of every token to itself and the earlier tokens of its sequence.

        Args:
            query: [T, heads, d] packed, or [S, B, heads, d].
            key, value: [T, kv_heads, d] packed, or [S, B, kv_heads, d]; ``heads`` is a multiple of ``kv_heads``.
            attention_mask, attention_bias: must be None, the mask is causal.
            packed_seq_params: its ``cu_seqlens_q`` gives the offsets of the packed sequences; None if not packed.
                Under context parallelism the offsets are those of whole sequences and T is this rank's part.

        Returns:
            [T, heads * d], or [S, B, heads * d].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the plain core attention is causal only: attention_mask and attention_bias must be None")
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        offsets = packed_seq_params.cu_seqlens_q.tolist()
        if self._context_size > 1:
            return self._attend_across(query, key, value, tuple(offsets))
        lengths = [end - start for start, end in zip(offsets, offsets[1:]) if end > start]
        # Cut and joined along the tokens, the leading dimension: both are plain copies, forward and backward.
        parts = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in qkv)).transpose(1, 2)
            for qkv in zip(*(x.split(lengths) for x in (query, key, value)))
        ]  # each [1, n, heads, d]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return joined.squeeze(0).flatten(1)

    def _attend_across(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: tuple[int, ...]
    ) -> torch.Tensor:
        """Attention of this rank's tokens to those of all context-parallel ranks; shapes as in :meth:`forward`."""
        from megatron.core import parallel_state as mpu
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        group = mpu.get_context_parallel_group()
        # Its backward pass sums what the ranks' queries give to a key, on the rank that holds the key.
        joined = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)
        order = gathered_order(offsets, self._context_size).to(joined.device)
        keys, values = joined.index_select(0, order).split(key.shape[-1], dim=-1)
        parts = []
        for chunk in context_chunks(offsets, group.rank(), self._context_size):
            seen = slice(chunk.first_key, chunk.end_key)
            qkv = (x.transpose(0, 1).unsqueeze(0) for x in (query[chunk.queries], keys[seen], values[seen]))
            parts.append(self._attend(*qkv).transpose(1, 2))
        return torch.cat(parts, dim=1).squeeze(0).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The queries are those of the last positions of the keys."""
        grouped, length, earlier = q.shape[1] != k.shape[1], q.shape[2], k.shape[2] - q.shape[2]
        mask = None
        if earlier:
            mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(earlier)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
