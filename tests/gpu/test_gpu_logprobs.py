"""token_logprobs on CUDA against float64: values, gradients, alignment, padding, extremes, repeatability, graphs."""

from __future__ import annotations

import pytest
import torch
from logprob_reference import DTYPES, ROUNDING, check, random_case, reference

from spear_megatron.kernels import logprobs_cuda, logprobs_eager, token_logprobs
from spear_megatron.kernels.softmax_stats import VocabShard, merge_stats, row_gradients, saved_for_backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 31, 127, 257, 1031, 4099, 16384, 19008, 65537])
def test_values_and_gradients_match_float64(dtype: torch.dtype, vocab: int, device: torch.device) -> None:
    for seed, (rows, temperature) in enumerate([(1, 1.0), (7, 0.6), (33, 1.7)]):
        check(*random_case(seed, rows, vocab, dtype, device), temperature, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [151936, 152064])
def test_full_size_vocabulary(dtype: torch.dtype, vocab: int, device: torch.device) -> None:
    logits, targets = random_case(2, 5, vocab, dtype, device, scale=2.0)
    logits[1] = 0  # uniform: the longest sum
    logits[2, 77] = 40.0  # peaked: small terms beside a large one
    check(logits, targets, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_rows_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    base, targets = random_case(7, 12, 1237, dtype, device)
    for offset in range(9):
        view = base[::3, offset : offset + 1111]
        picked = targets[::3] % 1111
        leaf = base.clone().requires_grad_()
        log_probs, entropy = token_logprobs(leaf[::3, offset : offset + 1111], picked, implementation="compiled")
        dense = view.contiguous().requires_grad_()
        expected_lp, expected_h = token_logprobs(dense, picked, implementation="compiled")
        torch.testing.assert_close(log_probs, expected_lp, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entropy, expected_h, rtol=0, atol=1e-5)
        (log_probs - entropy).sum().backward()
        (expected_lp - expected_h).sum().backward()
        inside = leaf.grad[::3, offset : offset + 1111]
        torch.testing.assert_close(inside, dense.grad, rtol=2 * ROUNDING[dtype], atol=4e-6)
        assert leaf.grad[1::3].eq(0).all() and leaf.grad[::3, :offset].eq(0).all()
        check(view, picked, 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_columns_take_no_part(dtype: torch.dtype, device: torch.device) -> None:
    for valid, vocab in ((1003, 1024), (1, 129), (4096, 4099)):
        logits, targets = random_case(5, 6, vocab, dtype, device)
        targets %= valid
        logits[:, valid:] = 1e4  # would dominate every softmax
        grad = check(logits, targets, 1.0, valid)
        assert grad[:, valid:].eq(0).all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_extreme_logits(temperature: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(6, 3001, generator=generator) * 2 - 1) * 1e4
    logits[1] = 1e4  # uniform at a large offset
    logits[2, 5:] = -torch.inf
    logits[3, :2900] = -torch.inf  # most threads see nothing finite
    logits[4] = -1e4
    logits[4, 17] = 1e4
    targets = torch.tensor([int(logits[0].argmax()), 3000, 4, 2950, 17, 9])
    leaf = logits.to(device).requires_grad_()
    targets = targets.to(device)
    log_probs, entropy = token_logprobs(leaf, targets, temperature=temperature, implementation="compiled")
    x, expected_lp, expected_h = reference(leaf, targets, temperature, 3001)
    assert ((log_probs - expected_lp).abs() <= 2e-6 * expected_lp.abs().clamp(min=1)).all()
    assert ((entropy - expected_h).abs() <= 1e-5).all()
    (log_probs + 0.5 * entropy).sum().backward()
    (expected,) = torch.autograd.grad((expected_lp + 0.5 * expected_h).sum(), x)
    finite = leaf.detach() > -torch.inf
    assert torch.all(leaf.grad[~finite] == 0)
    torch.testing.assert_close(leaf.grad[finite].double(), expected[finite], rtol=1e-5, atol=1e-6 / temperature)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_unusable_rows_give_nan_and_leave_the_others_alone(bad: float | None, device: torch.device) -> None:
    logits, targets = random_case(1, 3, 5000, torch.float32, device)
    expected, expected_h = token_logprobs(logits, targets, implementation="compiled")
    logits[1, 4321 if bad is not None else slice(None)] = -torch.inf if bad is None else bad
    leaf = logits.requires_grad_()
    log_probs, entropy = token_logprobs(leaf, targets, implementation="compiled")
    assert log_probs[1].isnan() and entropy[1].isnan()
    assert torch.equal(log_probs[::2], expected[::2]) and torch.equal(entropy[::2], expected_h[::2])
    log_probs.sum().backward()
    assert leaf.grad[1].isnan().all() and leaf.grad[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_gradient_are_exactly_zero(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = random_case(9, 4, 901, dtype, device)
    logits[2] = torch.nan
    leaf = logits.requires_grad_()
    log_probs, _ = token_logprobs(leaf, targets, implementation="compiled")
    log_probs[:2].sum().backward()
    assert leaf.grad[2:].eq(0).all() and leaf.grad[:2].ne(0).any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1031, 152064])
def test_inplace_backward_gives_the_same_bits_in_the_logits(
    dtype: torch.dtype, vocab: int, device: torch.device
) -> None:
    source, targets = random_case(10, 6, vocab, dtype, device)
    grads = []
    for inplace in (False, True):
        leaf = source.clone().requires_grad_()
        logits = leaf * 1.0
        log_probs, entropy = token_logprobs(
            logits, targets % (vocab - 1), valid_vocab=vocab - 1, implementation="compiled", inplace_backward=inplace
        )
        (log_probs * 0.5 - entropy).sum().backward()
        grads.append(leaf.grad)
        if inplace:
            assert torch.equal(logits.detach(), leaf.grad)
    assert torch.equal(grads[0], grads[1])


def test_same_bits_every_time(device: torch.device) -> None:
    logits, targets = random_case(6, 517, 38016, torch.bfloat16, device)
    results = []
    for _ in range(5):
        leaf = logits.clone().requires_grad_()
        log_probs, entropy = token_logprobs(leaf, targets, temperature=0.9, implementation="compiled")
        (log_probs.square() + entropy).sum().backward()
        results.append((log_probs.detach(), entropy.detach(), leaf.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_shards_of_the_vocabulary_merge_to_the_whole(device: torch.device) -> None:
    logits, targets = random_case(12, 9, 4096, torch.bfloat16, device)
    valid, width = 3000, 1024  # the last shard is padding throughout
    targets %= valid
    shards = [VocabShard(first, min(max(valid - first, 0), width)) for first in range(0, 4096, width)]
    parts = [logits[:, shard.first_column : shard.first_column + width] for shard in shards]
    stats = [logprobs_cuda.row_stats(x, targets, s, 0.7, True) for x, s in zip(parts, shards, strict=True)]
    result = merge_stats(torch.stack(stats), 0.7)
    _, expected_lp, expected_h = reference(logits, targets, 0.7, valid)
    torch.testing.assert_close(result.log_probs, expected_lp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result.entropy, expected_h, rtol=0, atol=1e-5)
    grads = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).to(device)
    row_grads = row_gradients(saved_for_backward(result, True, torch.float32), grads[0], grads[1])
    for x, shard in zip(parts, shards, strict=True):
        out, expected = torch.full_like(x, 7.0), torch.empty(x.shape, dtype=torch.float64, device=device)
        logprobs_cuda.logits_grad(x, targets, shard, 0.7, row_grads, out)
        logprobs_eager.logits_grad(x.double(), targets, shard, 0.7, row_grads, expected)
        torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=2e-6)


def test_targets_that_no_column_holds_give_minus_infinity(device: torch.device) -> None:
    logits, _ = random_case(3, 3, 100, torch.float32, device)
    log_probs, _ = token_logprobs(logits, torch.tensor([-1, 5, 100], device=device), implementation="compiled")
    assert log_probs[0] == log_probs[2] == -torch.inf and log_probs[1].isfinite()


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    rows, vocab = 15000, 152064  # 2.3e9 elements, 4.6 GB
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
    logits[-1, 5] = 3.0
    targets = torch.full((rows,), 5, device=device)
    stats = logprobs_cuda.row_stats(logits, targets, VocabShard(0, vocab), 1.0, True)
    assert stats[-1, 0] == stats[-1, 3] == 3.0 and stats[:-1, 0].eq(0).all()
    result = merge_stats(stats[None], 1.0)
    row_grads = row_gradients(saved_for_backward(result, True, torch.float32), torch.ones(rows, device=device), None)
    logprobs_cuda.logits_grad(logits, targets, VocabShard(0, vocab), 1.0, row_grads, logits)
    expected = 1 - torch.exp(result.log_probs[[0, -1]])
    torch.testing.assert_close(logits[[0, -1], 5].double(), expected, rtol=2.0**-8, atol=0)
