"""The plain spec's norm and core attention against slow references."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spear_megatron.model.layers import RMSNorm, SDPAttention


def _config(dtype: torch.dtype = torch.float32, sequence_parallel: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        params_dtype=dtype,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        kv_channels=8,
        context_parallel_size=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(_config(dtype), 24, eps=1e-5), Qwen3RMSNorm(24, eps=1e-5).to(dtype)
    weight = torch.rand(24, generator=generator).to(dtype)
    for module in (ours, theirs):
        module.weight.data.copy_(weight)
    x = (torch.randn(3, 5, 24, generator=generator) * 4).to(dtype)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6 if dtype == torch.float32 else 0, rtol=0)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norm_carries_the_sequence_parallel_mark(sequence_parallel: bool) -> None:
    norm = RMSNorm(_config(sequence_parallel=sequence_parallel), 8)
    assert norm.weight.sequence_parallel is sequence_parallel


def _slow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence, q [n, heads, d], k and v [n, kv_heads, d], in float64 with explicit loops -> [n, heads * d]."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(n, heads, d, dtype=torch.float64)
    for head in range(heads):
        for t in range(n):
            scores = torch.stack([q[t, head].double() @ k[s, head // group].double() for s in range(t + 1)]) / d**0.5
            weights = torch.softmax(scores, 0)
            out[t, head] = sum(weights[s] * v[s, head // group].double() for s in range(t + 1))
    return out.flatten(1)


def _qkv(tokens: int, kv_heads: int, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, h, 8, generator=generator, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("offsets", [[0, 9], [0, 4, 5, 11], [0, 3, 3, 8]])
def test_packed_attention_equals_separate_sequences(kv_heads: int, offsets: list[int]) -> None:
    qkv = _qkv(offsets[-1], kv_heads)
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32))
    attention = SDPAttention(_config())
    out = attention(*qkv, None, packed_seq_params=packed)
    separate = torch.cat(
        [_slow_attention(*(x[a:b] for x in qkv)) for a, b in zip(offsets, offsets[1:]) if b > a]
    )
    torch.testing.assert_close(out.double(), separate, atol=1e-6, rtol=0)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights).sum(), qkv)
    expected = torch.autograd.grad((separate * weights).sum(), qkv)
    for found, wanted in zip(gradients, expected):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_unpacked_attention_is_batched_and_causal() -> None:
    rows = [_qkv(7, 2), _qkv(7, 2)]
    rows[1] = [x * 0.5 for x in rows[1]]
    batch = [torch.stack(parts, dim=1) for parts in zip(*rows)]  # [S, B, heads, d]
    out = SDPAttention(_config())(*batch, None)
    assert out.shape == (7, 2, 32)
    for index, row in enumerate(rows):
        torch.testing.assert_close(out[:, index].double(), _slow_attention(*row), atol=1e-6, rtol=0)


def test_softmax_scale_is_used_and_masks_are_refused() -> None:
    qkv = [x[:, None] for x in _qkv(5, 2)]
    flat, sharp = SDPAttention(_config(), softmax_scale=0.01)(*qkv, None), SDPAttention(_config())(*qkv, None)
    assert not torch.allclose(flat, sharp)
    with pytest.raises(ValueError, match="attention_mask"):
        SDPAttention(_config())(*qkv, torch.ones(5, 5))
