"""What the plain layer spec needs beyond megatron-core: a norm for sequence parallelism, and packed attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

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

    Takes the constructor and forward arguments that megatron-core gives to any core attention.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

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

        Returns:
            [T, heads * d], or [S, B, heads * d].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the plain core attention is causal only: attention_mask and attention_bias must be None")
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        offsets = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(offsets, offsets[1:]) if end > start]
        # Cut and joined along the tokens, the leading dimension: both are plain copies, forward and backward.
        parts = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in qkv)).transpose(1, 2)
            for qkv in zip(*(x.split(lengths) for x in (query, key, value)))
        ]  # each [1, n, heads, d]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return joined.squeeze(0).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
