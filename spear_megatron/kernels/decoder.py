"""Python face of the compiled CPU decoder: a Qwen2 / Qwen3 forward pass with paged cache and sampling, in float32.

Batch invariant by construction: what it computes for a row depends on the weights and on that sequence's tokens up to
the row, bit for bit, whatever else is in the call, however a prompt is cut into chunks and however many threads run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from spear_megatron.kernels.extension import compiled_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_TOKENS = 16


class Decoder:
    """Owns packed weights (all zero until loaded) and the paged key/value cache of one dense decoder.

    Args:
        hidden_size, num_layers, num_attention_heads, num_key_value_heads, head_dim, intermediate_size, vocab_size,
            qkv_bias, qk_norm, rms_norm_eps, rope_theta: the model, as in ``ModelShape``.
        max_model_len: largest number of tokens of one sequence.
        num_pages: pages of ``PAGE_TOKENS`` tokens in the cache; memory is committed when a page is first written.
        max_rows, max_outputs: most rows of one forward pass, and most sampled ones among them.
        num_threads: OpenMP threads of a forward pass; results do not depend on it.
        isa: ``auto``, ``generic``, ``avx2`` or ``avx512``.

    Raises:
        ValueError: sizes that are not positive, or an instruction set that this processor lacks.
        RunError: the compiled kernels are not built; says how to build them.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_size: int,
        vocab_size: int,
        qkv_bias: bool,
        qk_norm: bool,
        rms_norm_eps: float,
        rope_theta: float,
        max_model_len: int,
        num_pages: int,
        max_rows: int,
        max_outputs: int,
        num_threads: int = 1,
        isa: str = "auto",
    ) -> None:
        cos, sin = rope_tables(max_model_len, head_dim, rope_theta)
        self._decoder = compiled_module().Decoder(
            hidden=hidden_size,
            layers=num_layers,
            heads=num_attention_heads,
            kv_heads=num_key_value_heads,
            head_dim=head_dim,
            intermediate=intermediate_size,
            vocab=vocab_size,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            norm_eps=rms_norm_eps,
            rope_cos=cos.numpy(),
            rope_sin=sin.numpy(),
            num_pages=num_pages,
            max_rows=max_rows,
            max_outputs=max_outputs,
            num_threads=num_threads,
            isa=isa,
        )

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return str(self._decoder.isa)

    def load(self, kind: str, layer: int, tensor: torch.Tensor) -> None:
        """Copy one weight into its place in the fused layout.

        Args:
            kind: distinguishing part of the Hugging Face name: ``embed_tokens``, ``norm``, ``lm_head``,
                ``input_layernorm``, ``post_attention_layernorm``, ``q_norm``, ``k_norm``, ``{q,k,v}_proj.bias``,
                ``{q,k,v,o,gate,up,down}_proj``.
            layer: index of the layer; ignored for the first three.
            tensor: full tensor, any floating dtype and device.

        Raises:
            ValueError: unknown kind, layer or size.
        """
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        self._decoder.load(kind, layer, values.numpy())

    def forward(
        self,
        ids: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        block_table: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int32],
        top_p: NDArray[np.float32],
        noise_key: NDArray[np.uint64],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Run ``n`` rows through the model, write their keys and values, sample after ``m`` of them.

        Row ``r`` is token ``ids[r]`` of sequence ``slots[r]`` at ``positions[r]``; everything before that position must
        have been written by an earlier call or be among the rows of this one.

        Args:
            ids, slots, positions: int32 [n].
            block_table: int32 [slots, pages], the pages of every sequence in order.
            output_rows: int32 [m], rows after which a token is sampled.
            temperature: float32 [m], 0 is greedy; top_k: int32 [m], -1 is off; top_p: float32 [m], 1 is off.
            noise_key: uint64 [m]; with the position of the new token it decides the draw.

        Returns:
            tokens int32 [m] (-1 where the logits are not finite) and float32 [m] log-probs under
            log_softmax(logits / temperature), not restricted; greedy ones under log_softmax(logits).

        Raises:
            ValueError: an index is out of range.
        """
        return self._decoder.forward(
            ids, slots, positions, block_table, output_rows, temperature, top_k, top_p, noise_key
        )


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, float32 [length, head_dim / 2], computed as transformers does."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inverse_frequency = 1.0 / (theta**exponent)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequency[None, :]
    return angles.cos().contiguous(), angles.sin().contiguous()


def keyed_uniform(key: int, position: int) -> float:
    """The uniform in [0, 1) that decides the token at ``position``: Philox4x32-10 of (key, position), 53 bits."""
    return float(compiled_module().keyed_uniform(key, position))
