"""policy_loss as a registered operator: torch's own checks, torch.compile in one graph, equal to the plain call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spear_megatron.kernels.policy_loss import policy_loss
from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES

RULE = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "kl_cov_coef": 0.7}


def example(mode: str, count: int = 40, masked: bool = True) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Log-probs, old log-probs, advantages and weights; the selected tokens; the mask."""
    generator = torch.Generator().manual_seed(count)
    columns = [torch.randn(count, generator=generator) for _ in range(4)]
    flags = [torch.rand(count, generator=generator) < 0.5 for _ in range(2)]
    return columns, flags[0] if mode in ("clip_cov", "kl_cov") else None, flags[1] if masked else None


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_passes_the_checks_of_torch(mode: str, masked: bool) -> None:
    columns, selected, mask = example(mode, masked=masked)
    columns[0].requires_grad_()
    torch.library.opcheck(torch.ops.spear.policy_loss.default, (*columns, selected, mask, mode, *RULE.values()))


def results(function: object, source: Tensor, others: list[Tensor]) -> list[Tensor]:
    leaf = source.detach().clone().requires_grad_()
    loss, sums = function(leaf, others)  # type: ignore[operator]
    loss.backward()
    return [loss.detach(), sums, leaf.grad]


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_one_graph_and_the_same_bits_as_outside_of_it(mode: str) -> None:
    columns, selected, mask = example(mode)

    def function(leaf: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor]:
        loss, sums = policy_loss(leaf * 0.5, *others, mode=mode, selected=selected, mask=mask, **RULE)
        return loss * 3, sums.values

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (results(call, columns[0], columns[1:]) for call in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[2].any()


def test_any_number_of_tokens_without_compiling_again() -> None:
    def function(leaf: Tensor, others: list[Tensor]) -> Tensor:
        return policy_loss(leaf, *others, mode="vanilla", implementation="compiled", **RULE)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (30, 77, 200):
        columns, _, _ = example("vanilla", count)
        with torch.compiler.set_stance("default" if count == 30 else "fail_on_recompile"):
            found = compiled(columns[0], columns[1:])
        assert torch.equal(found, function(columns[0], columns[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_torch_is_compiled_as_it_is(dtype: torch.dtype) -> None:
    columns, _, _ = example("vanilla")

    def function(leaf: Tensor) -> Tensor:
        others = [value.to(dtype) for value in columns[1:]]
        return policy_loss(leaf, *others, mode="vanilla", implementation="eager", **RULE)[0]

    leaf = columns[0].to(dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), function(leaf))
