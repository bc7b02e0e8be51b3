"""The CUDA kernels as they stand in csrc/cuda/, compiled for the host on an emulation of CUDA's threads."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulated_cuda import emulated_library, emulation  # noqa: F401
from logprob_reference import DTYPES, check, random_case, reference

from spear_megatron.kernels import logprobs_compiled, logprobs_cuda, token_logprobs
from spear_megatron.kernels.softmax_stats import VocabShard, merge_stats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 9, 127, 1031, 4099, 19008])
def test_values_and_gradients_match_float64(dtype: torch.dtype, vocab: int) -> None:
    logits, targets = random_case(vocab, 3, vocab, dtype, CPU)
    check(logits, targets, 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_rows_with_padding(dtype: torch.dtype) -> None:
    base, targets = random_case(5, 8, 1237, dtype, CPU)
    for offset in range(0, 9, 2):
        grad = check(base[::3, offset : offset + 1111], targets[::3] % 1003, 0.9, valid=1003)
        assert grad[:, 1003:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_zero_rows_and_nan_rows(dtype: torch.dtype) -> None:
    source, targets = random_case(9, 4, 1031, dtype, CPU)
    source[1:3, 500] = torch.nan
    grads = []
    for inplace in (False, True):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1
        log_probs, _ = token_logprobs(logits, targets, implementation="compiled", inplace_backward=inplace)
        log_probs[:2].sum().backward()
        assert leaf.grad[2:].eq(0).all() and leaf.grad[1].isnan().all() and leaf.grad[0].ne(0).any()
        assert not inplace or torch.equal(logits.detach()[0], leaf.grad[0])
        grads.append(leaf.grad[[0, 2, 3]])
    assert torch.equal(*grads)


def test_shards_merge_and_repeat_the_same_bits() -> None:
    logits, targets = random_case(12, 3, 4096, torch.bfloat16, CPU)
    targets %= 3000
    parts = []
    for first in range(0, 4096, 1024):  # the last shard is padding throughout
        shard = VocabShard(first, min(max(3000 - first, 0), 1024))
        part = logits[:, first : first + 1024]
        stats = [logprobs_cuda.row_stats(part, targets, shard, 0.7, True) for _ in range(3)]
        assert torch.equal(stats[0], stats[1]) and torch.equal(stats[0], stats[2])
        parts.append(stats[0])
    result = merge_stats(torch.stack(parts), 0.7)
    _, expected_lp, expected_h = reference(logits, targets, 0.7, 3000)
    torch.testing.assert_close(result.log_probs, expected_lp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result.entropy, expected_h, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_rows_are_merged_and_joined_as_on_the_cpu(with_entropy: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(3, 400, 4, generator=generator) + 1
    parts[1, 5, 0] = torch.nan
    parts[:, 7, 3] = -torch.inf
    found, expected = (module.merge_rows(parts, 0.7, with_entropy) for module in (logprobs_cuda, logprobs_compiled))
    torch.testing.assert_close(found, expected, rtol=1.2e-7, atol=0, equal_nan=True)
    grads = (torch.tensor(2.0).expand(400), torch.arange(800.0)[::2] if with_entropy else None)
    joined, on_cpu = (module.row_gradients(found[2], *grads) for module in (logprobs_cuda, logprobs_compiled))
    torch.testing.assert_close(joined, on_cpu, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(joined[:, :3], found[2], rtol=0, atol=0, equal_nan=True)
