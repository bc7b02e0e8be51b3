"""The CUDA policy loss on the emulation of CUDA's threads: equal to the CPU kernel, repeatable, masks, NaN."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from emulated_cuda import emulated_library, emulation  # noqa: F401
from torch import Tensor

from spear_megatron.kernels import policy_loss_compiled, policy_loss_cuda
from spear_megatron.kernels.policy_loss import policy_loss
from spear_megatron.kernels.policy_loss_compiled import PolicySettings, PolicyTokens
from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]
RULE = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "kl_cov_coef": 0.7}
CHOOSING = ("clip_cov", "kl_cov")


def make_tokens(count: int, mode: str, masked: bool) -> PolicyTokens:
    generator = torch.Generator().manual_seed(count + 1)
    old = -3 * torch.rand(count, generator=generator)
    log_probs = old + 0.6 * torch.randn(count, generator=generator)
    log_probs[::5] = old[::5]
    advantages = torch.randn(count, generator=generator)
    weight = torch.rand(count, generator=generator) / max(count, 1)
    selected = torch.rand(count, generator=generator) < 0.3 if mode in CHOOSING else None
    mask = torch.rand(count, generator=generator) < 0.7 if masked else None
    if mask is not None:
        log_probs[~mask] = torch.nan  # what stands beside the mask has no effect
    return PolicyTokens(log_probs, old, advantages, weight, selected, mask)


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [0, 1, 257, 3001])
def test_sums_and_gradient_are_those_of_the_cpu(mode: str, masked: bool, count: int) -> None:
    tokens, settings = make_tokens(count, mode, masked), PolicySettings(mode, **RULE)
    _, sums, gradient = policy_loss_cuda.loss_and_gradient(tokens, settings)
    _, expected_sums, expected_gradient = policy_loss_compiled.loss_and_gradient(tokens, settings)
    assert torch.equal(sums[1:3], expected_sums[1:3])
    torch.testing.assert_close(sums[3], expected_sums[3], rtol=1e-12, atol=1e-12)
    # Exponentials differ in the last bit of a float.
    loose = {"rtol": 1e-12, "atol": 1e-14} if mode == "gpg" else {"rtol": 3e-7, "atol": 1e-7}
    torch.testing.assert_close(sums[0], expected_sums[0], **loose)
    torch.testing.assert_close(sums[4:], expected_sums[4:], rtol=3e-7, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7 / max(count, 1))
    again = policy_loss_cuda.loss_and_gradient(tokens, settings)
    assert torch.equal(sums, again.sums) and torch.equal(gradient, again.gradient)


def test_a_large_sum_is_added_in_double() -> None:
    """More blocks than the last kernel has threads, of equal terms: a sum in float would lose some of them."""
    count = 263_001
    one = torch.ones(count)
    tokens = PolicyTokens(one, one, 0.1 * one, one, None, None)
    _, sums, _ = policy_loss_cuda.loss_and_gradient(tokens, PolicySettings("gpg", **RULE))
    assert sums[0].item() == pytest.approx(-count * 0.1, rel=1e-7)
    assert sums[4].item() == count and sums[5].item() == 1.0


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(mode: str, value: float) -> None:
    tokens = make_tokens(600, mode, False)
    tokens.log_probs[300] = value
    if tokens.selected is not None:
        tokens.selected[300] = False
    _, sums, _ = policy_loss_cuda.loss_and_gradient(tokens, PolicySettings(mode, **RULE))
    assert not sums[0].isfinite() and sums[3:].isnan().all()


def test_the_function_takes_the_kernel_and_scales_its_gradient() -> None:
    tokens = make_tokens(200, "vanilla", True)
    spread = torch.stack([tokens.log_probs, tokens.old_log_probs], dim=1).requires_grad_()

    def run(implementation: str) -> tuple[Tensor, Tensor]:
        loss, sums = policy_loss(
            spread[:, 0], spread[:, 1], tokens.advantages, tokens.token_weight, mode="vanilla", mask=tokens.mask,
            implementation=implementation, **RULE,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(3 * loss, spread)
        return torch.cat([loss.detach().double()[None], sums.values]), grad

    for found, expected in zip(run("compiled"), run("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
