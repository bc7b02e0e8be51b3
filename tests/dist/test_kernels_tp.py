"""Vocabulary-parallel kernels equal the same on one process; every rank gets the same bits."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

from spear_megatron.kernels import linear_token_logprobs, token_logprobs
from spear_megatron.parallel.state import initialize

ROWS = 9


def _case(vocab: int, valid: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, vocab, generator=generator) * 4).to(dtype)
    logits[1] += 5e3
    logits[2, : valid - 400] = -torch.inf  # no finite logit on rank 0 when rank 1 has real columns
    targets = torch.randint(0, valid, (ROWS,), generator=generator)
    targets[0], targets[1], targets[2] = 0, valid - 1, valid - 200
    return logits, targets, torch.randn(2, ROWS, generator=generator)


def _evaluate(
    tp: int, vocab: int, valid: int, dtype: torch.dtype, implementation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group, rank = None, 0
    if tp > 1:
        state = initialize(tp=tp, pp=1, timeout_s=60)
        group, rank = state.tp_group, state.tp_rank
    logits, targets, weights = _case(vocab, valid, dtype)
    columns = vocab // tp
    leaf = logits[:, rank * columns : (rank + 1) * columns].clone().requires_grad_()
    log_probs, entropy = token_logprobs(
        leaf, targets, temperature=0.9, valid_vocab=valid, group=group, implementation=implementation
    )
    (weights[0] * log_probs + weights[1] * entropy).sum().backward()
    settings = {"temperature": 0.9, "valid_vocab": valid, "group": group, "implementation": implementation}
    alone, nothing = token_logprobs(leaf.detach(), targets, with_entropy=False, **settings)  # three numbers travel
    assert nothing is None
    torch.testing.assert_close(alone, log_probs.detach(), rtol=1e-6, atol=1e-6)
    return log_probs.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize(
    ("tp", "vocab", "valid", "dtype"),
    [
        (2, 2048, 1500, torch.float32),
        (2, 2048, 1003, torch.float32),
        (2, 998, 998, torch.bfloat16),
        (4, 152576, 151936, torch.float32),  # Qwen3's vocabulary as Megatron pads it
        (4, 152576, 152064, torch.bfloat16),
    ],
)
def test_several_ranks_equal_one(tp: int, implementation: str, vocab: int, valid: int, dtype: torch.dtype) -> None:
    expected = _evaluate(1, vocab, valid, dtype, implementation)
    ranks = run_ranks(_evaluate, tp, tp, vocab, valid, dtype, implementation)
    for rank in ranks[1:]:
        assert torch.equal(rank[0], ranks[0][0]) and torch.equal(rank[1], ranks[0][1])
    for value, reference in zip(ranks[0][:2], expected[:2], strict=True):
        assert torch.isfinite(reference).all()
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-5)
    grad = torch.cat([result[2] for result in ranks], dim=1)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad, expected[2], rtol=rounding, atol=1e-6)
    assert grad[:, valid:].eq(0).all()


HIDDEN_ROWS = 24


def _evaluate_linear(
    tp: int, density: float, sequence_parallel: bool, max_logits_bytes: int | None
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies, gradient of the hidden rows given, and of this rank's part of the head."""
    group, rank = None, 0
    if tp > 1:
        state = initialize(tp=tp, pp=1, timeout_s=60)
        group, rank = state.tp_group, state.tp_rank
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(HIDDEN_ROWS, 16, generator=generator)
    weight = torch.randn(1216, 16, generator=generator)
    targets = torch.randint(0, 1100, (HIDDEN_ROWS,), generator=generator)
    mask = torch.rand(HIDDEN_ROWS, generator=generator) < density
    mask[: HIDDEN_ROWS // 4] = False  # the first rank of four has none
    weights = torch.randn(2, HIDDEN_ROWS, generator=generator)
    columns, length = len(weight) // tp, HIDDEN_ROWS // tp
    own = slice(rank * length, (rank + 1) * length) if sequence_parallel else slice(None)
    given = hidden[own].clone().requires_grad_()
    part = weight[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    log_probs, entropy = linear_token_logprobs(
        given, part, targets, mask=mask, temperature=0.9, valid_vocab=1100, group=group,
        sequence_parallel=sequence_parallel, max_logits_bytes=max_logits_bytes,
    )  # fmt: skip
    (weights[0] * log_probs + weights[1] * entropy).sum().backward()
    return log_probs.detach(), entropy.detach(), given.grad, part.grad


@pytest.mark.parametrize("max_logits_bytes", [None, 1])
@pytest.mark.parametrize(
    ("tp", "density", "sequence_parallel"),
    [(2, 0.5, False), (2, 0.5, True), (2, 0.0, True), (4, 0.7, False), (4, 0.7, True)],
)
def test_a_cut_head_equals_a_whole_one(
    tp: int, density: float, sequence_parallel: bool, max_logits_bytes: int | None
) -> None:
    expected = _evaluate_linear(1, density, False, None)
    ranks = run_ranks(_evaluate_linear, tp, tp, density, sequence_parallel, max_logits_bytes)
    for rank in ranks:
        assert torch.equal(rank[0], ranks[0][0]) and torch.equal(rank[1], ranks[0][1])
    joined = torch.cat([rank[2] for rank in ranks]) if sequence_parallel else ranks[0][2]
    found = (ranks[0][0], ranks[0][1], joined, torch.cat([rank[3] for rank in ranks]))
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
