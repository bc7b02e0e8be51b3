"""token_logprobs as a registered operator: torch's own checks, torch.compile in one graph, equal to the eager call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spear_megatron.kernels import token_logprobs


def example(dtype: torch.dtype = torch.float32, rows: int = 6, vocab: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab - 5, (rows,), generator=generator)


@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_operators_pass_the_checks_of_torch(implementation: str, with_entropy: bool) -> None:
    logits, targets = example()
    arguments = (logits, targets, 47, 0.9, with_entropy, implementation, False)
    torch.library.opcheck(torch.ops.spear.token_logprobs.default, arguments)
    row_grads = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
    for name in ("logits_grad", "logits_grad_"):
        operator = getattr(torch.ops.spear, name).default
        torch.library.opcheck(operator, (logits.detach().clone(), targets, 47, 0.9, row_grads, implementation))


def results(function: Any, source: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probs, entropy and the gradient of the leaf."""
    leaf = source.detach().clone().requires_grad_()
    log_probs, entropy = function(leaf, targets)
    (0.5 * log_probs.square() - entropy).sum().backward()
    return [log_probs.detach(), entropy.detach(), leaf.grad]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_and_the_same_bits_as_outside_of_it(dtype: torch.dtype, inplace: bool) -> None:
    def function(leaf: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = leaf * 2
        return token_logprobs(logits, targets, temperature=0.7, valid_vocab=47, inplace_backward=inplace)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    source, targets = example(dtype)
    for found, expected in zip(results(compiled, source, targets), results(function, source, targets), strict=True):
        assert torch.equal(found, expected)


def test_any_number_of_rows_without_compiling_again() -> None:
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 21):
        logits, targets = example(rows=rows)
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            found = compiled(logits, targets)
        expected = token_logprobs(logits, targets)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_without_entropy_in_a_graph() -> None:
    def function(logits: Tensor, targets: Tensor) -> Tensor:
        log_probs, entropy = token_logprobs(logits, targets, with_entropy=False)
        assert entropy is None
        return log_probs * 2

    logits, targets = example()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits, targets).sum(), logits)
    (expected,) = torch.autograd.grad(function(logits, targets).sum(), logits)
    assert torch.equal(found, expected)


def test_the_operator_refuses_what_the_function_refuses() -> None:
    logits, targets = example()
    operator = torch.ops.spear.token_logprobs
    with pytest.raises(ValueError, match="found 47"):
        operator(logits, torch.full_like(targets, 47), 47, 1.0, True, "auto", False)
    with pytest.raises(ValueError, match="stride 1"):
        operator(logits.detach().t().contiguous().t(), targets, 50, 1.0, True, "auto", False)
    with pytest.raises(ValueError, match="temperature=0.0"):
        operator(logits, targets, 50, 0.0, True, "auto", False)


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        log_probs, entropy = token_logprobs(logits, targets)
        return (log_probs.exp() + 0.1 * entropy).sum()

    logits, targets = example()
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits, targets), logits)
    (expected,) = torch.autograd.grad(loss(logits, targets), logits)
    torch.testing.assert_close(found, expected)
