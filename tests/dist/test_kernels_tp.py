"""Vocabulary-parallel token_logprobs equals the same on one process; every rank gets the same bits."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

from spear_megatron.kernels import token_logprobs
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
    return log_probs.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize(
    ("vocab", "valid", "dtype"),
    [(2048, 1500, torch.float32), (2048, 1003, torch.float32), (998, 998, torch.bfloat16)],
)
def test_two_ranks_equal_one(implementation: str, vocab: int, valid: int, dtype: torch.dtype) -> None:
    expected = _evaluate(1, vocab, valid, dtype, implementation)
    ranks = run_ranks(_evaluate, 2, 2, vocab, valid, dtype, implementation)
    for one, other in zip(ranks[0][:2], ranks[1][:2], strict=True):
        assert torch.equal(one, other)
    for value, reference in zip(ranks[0][:2], expected[:2], strict=True):
        assert torch.isfinite(reference).all()
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-5)
    grad = torch.cat([result[2] for result in ranks], dim=1)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad, expected[2], rtol=rounding, atol=1e-6)
    assert grad[:, valid:].eq(0).all()
