"""Policy loss and selection by covariance on CUDA: the CPU's sums and tokens, no waiting, CUDA graphs, streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, select_tokens
from spear_megatron.algorithms.covariance_device import DeviceSelection, select_on_device
from spear_megatron.algorithms.drawn_loss import drawn_policy_loss
from spear_megatron.kernels import available, policy_loss_compiled, policy_loss_cuda
from spear_megatron.kernels.cov_select import token_keys
from spear_megatron.kernels.policy_loss import policy_loss
from spear_megatron.kernels.policy_loss_compiled import PolicySettings, PolicyTokens
from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES

RULE = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "kl_cov_coef": 0.7}
CLIP = ClipCovRule(0.02, 0.05, 1.0, 0.2, 0.28)
QUANTILE = ClipCovRule(0.02, 0.0, 0.0, 0.2, 0.28, quantiles=(0.6, 0.99))
RULES = (CLIP, QUANTILE, KlCovRule(0.002), ClipCovRule(0.5, -math.inf, math.inf, 1.0, math.inf))


def make_tokens(count: int, mode: str, masked: bool) -> PolicyTokens:
    generator = torch.Generator().manual_seed(count)
    old = -3 * torch.rand(count, generator=generator)
    log_probs = old + 0.6 * torch.randn(count, generator=generator)
    advantages = torch.randn(count, generator=generator)
    weight = torch.rand(count, generator=generator) / max(count, 1)
    selected = torch.rand(count, generator=generator) < 0.3 if mode in ("clip_cov", "kl_cov") else None
    mask = torch.rand(count, generator=generator) < 0.7 if masked else None
    return PolicyTokens(log_probs, old, advantages, weight, selected, mask)


def on(device: torch.device, tokens: PolicyTokens) -> PolicyTokens:
    return PolicyTokens(*(None if value is None else value.to(device) for value in tokens))


def num_near_bounds(tokens: PolicyTokens) -> int:
    """Tokens so close to a bound of the ratio that the last bit of an exponential decides on which side they are."""
    ratio = (tokens.log_probs.double() - tokens.old_log_probs.double()).exp()
    bounds = torch.tensor([1 - RULE["clip_ratio_low"], 1 + RULE["clip_ratio_high"], RULE["clip_ratio_c"]])
    return int(((ratio[:, None] / bounds - 1).abs() < 1e-6).any(dim=1).sum())


def make_row(count: int, seed: int) -> TokenSet:
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(count, generator=generator)
    old = log_probs + 0.3 * torch.randn(count, generator=generator)
    return TokenSet(log_probs, old, torch.randn(count, generator=generator), token_keys(seed * 7919, count))


def moved(rows: list[TokenSet], device: torch.device) -> list[TokenSet]:
    return [TokenSet(*(getattr(row, name).to(device) for name in TokenSet.__slots__)) for row in rows]


def check(rows: list[TokenSet], rule: ClipCovRule | KlCovRule, device: torch.device) -> None:
    """The device chooses what the host chooses, and reports the same numbers."""
    expected, found = select_tokens(rows, rule), select_on_device(moved(rows, device), rule)
    for left, right in zip(found.masks, expected.masks, strict=True):
        assert torch.equal(left.cpu(), right)
    for name, value in zip(found.numbers._fields, found.numbers, strict=True):
        assert value.item() == getattr(expected, name), name


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [0, 1, 31, 1024, 1025, 70_001, 1 << 20])
def test_sums_and_gradient_are_those_of_the_cpu(mode: str, masked: bool, count: int, device: torch.device) -> None:
    tokens, settings = make_tokens(count, mode, masked), PolicySettings(mode, **RULE)
    _, sums, gradient = policy_loss_cuda.loss_and_gradient(on(device, tokens), settings)
    _, expected_sums, expected_gradient = policy_loss_compiled.loss_and_gradient(tokens, settings)
    near = num_near_bounds(tokens)
    assert (sums[1:3].cpu() - expected_sums[1:3]).abs().max() <= near
    torch.testing.assert_close(sums[3].cpu(), expected_sums[3], rtol=1e-12, atol=1e-12 * count)
    exact = {"rtol": 1e-12, "atol": 1e-13} if mode == "gpg" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(sums[0].cpu(), expected_sums[0], **exact)
    torch.testing.assert_close(sums[4:].cpu(), expected_sums[4:], rtol=1e-6, atol=0)
    difference = (gradient.cpu() - expected_gradient).abs()
    allowed = 2e-6 * expected_gradient.abs() + 2e-7 / max(count, 1)
    assert int((difference > allowed).sum()) <= near


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_sums_are_those_of_the_kernel_s_own_terms(mode: str, device: torch.device) -> None:
    """The sum over many blocks equals the sum of the same terms one by one, to rounding in double."""
    tokens = on(device, make_tokens(40_000, mode, False))
    settings = PolicySettings(mode, **RULE)
    _, sums, _ = policy_loss_cuda.loss_and_gradient(tokens, settings)
    pieces = [
        policy_loss_cuda.loss_and_gradient(
            PolicyTokens(*(None if value is None else value[i : i + 500] for value in tokens)), settings
        ).sums
        for i in range(0, 40_000, 500)
    ]
    torch.testing.assert_close(sums[:5], torch.stack(pieces).sum(0)[:5], rtol=1e-12, atol=1e-13)


def test_the_same_bits_every_time(device: torch.device) -> None:
    tokens = on(device, make_tokens(300_001, "vanilla", True))
    results = [policy_loss_cuda.loss_and_gradient(tokens, PolicySettings("vanilla", **RULE)) for _ in range(5)]
    assert all(torch.equal(results[0][i], other[i]) for other in results[1:] for i in range(3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [[1], [4097], [100_003], [900, 0, 5000, 1, 70_000]])
def test_the_same_tokens_as_on_the_cpu(rule: ClipCovRule | KlCovRule, lengths: list[int], device: torch.device) -> None:
    check([make_row(length, seed=number + 1) for number, length in enumerate(lengths)], rule, device)


def test_a_million_tokens_and_many_ties(device: torch.device) -> None:
    row = make_row(1 << 20, seed=4)
    for rule in RULES:
        check([row], rule, device)
    coarse = (row.log_probs * 4).round() / 4
    check([replace(row, log_probs=coarse, old_log_probs=coarse, advantages=row.advantages.sign())], RULES[2], device)
    check([replace(row, keys=row.keys & 0xFFF | torch.arange(1 << 20) << 12)], CLIP, device)


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_is_a_shorter_row(rule: ClipCovRule | KlCovRule, device: torch.device) -> None:
    row = make_row(50_001, seed=3)
    mask = torch.rand(50_001, generator=torch.Generator().manual_seed(4)) < 0.4
    expected = select_tokens([TokenSet(*(getattr(row, name)[mask] for name in TokenSet.__slots__))], rule)
    row.advantages[~mask] = torch.nan
    found = select_on_device(moved([row], device), rule, mask.to(device))
    assert torch.equal(found.masks[0].cpu()[mask], expected.masks[0]) and not found.masks[0].cpu()[~mask].any()
    assert found.numbers.num_selected == expected.num_selected


Step = Callable[[Tensor, PolicyTokens, TokenSet, Tensor], tuple[Tensor, Tensor, Tensor]]


def whole_step(leaf: Tensor, tokens: PolicyTokens, row: TokenSet, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selection and loss of a micro-batch: loss, gradient, chosen tokens."""
    selection: DeviceSelection = select_on_device([replace(row, log_probs=leaf.detach())], CLIP, mask)
    loss, _ = policy_loss(
        leaf, *tokens[1:4], mode="clip_cov", selected=selection.masks[0], mask=mask, implementation="compiled", **RULE
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, selection.masks[0]


def drawn_step(leaf: Tensor, tokens: PolicyTokens, row: TokenSet, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one function, on the old log-probs and advantages of the row."""
    rule = {name: value for name, value in RULE.items() if name != "clip_ratio_c"}
    loss, sums, selected = drawn_policy_loss(
        leaf, row.old_log_probs, row.advantages, tokens.token_weight, row.keys, CLIP, mask=mask,
        implementation="compiled", **rule,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, torch.cat([sums.values, selected.double()])


def test_auto_takes_the_kernels(device: torch.device) -> None:
    assert available()["policy_loss"]["cuda"] == available()["cov_select"]["cuda"] == "compiled"


def test_selection_and_loss_never_wait(device: torch.device) -> None:
    tokens = on(device, make_tokens(5000, "clip_cov", True))
    (row,), leaf = moved([make_row(5000, 2)], device), tokens.log_probs.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_step(leaf, tokens, row, tokens.mask)
        drawn_step(leaf, tokens, row, tokens.mask)
        select_on_device([row], QUANTILE)
        select_on_device([row, row], RULES[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("step", [whole_step, drawn_step])
def test_capture_into_a_graph_and_replay_on_other_tokens(step: Step, device: torch.device) -> None:
    tokens = on(device, make_tokens(5000, "clip_cov", True))
    (row,), leaf = moved([make_row(5000, 2)], device), tokens.log_probs.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(leaf, tokens, row, tokens.mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaf, tokens, row, tokens.mask)
    with torch.no_grad():
        leaf.copy_(leaf.flip(0) * 1.1)
        tokens.mask.copy_(tokens.mask.flip(0))  # another number of tokens would do as well
        row.advantages.copy_(row.advantages.flip(0))
    for _ in range(2):  # what a replay leaves behind does not reach the next
        graph.replay()
        replayed = [value.clone() for value in captured]
        for value, reference in zip(replayed, step(leaf, tokens, row, tokens.mask), strict=True):
            assert torch.equal(value, reference)


@pytest.mark.parametrize("rule", RULES)
def test_a_drawn_loss_is_that_of_the_cpu(rule: ClipCovRule | KlCovRule, device: torch.device) -> None:
    row, mask = make_row(50_001, seed=3), torch.rand(50_001, generator=torch.Generator().manual_seed(4)) < 0.4
    constants = {name: value for name, value in RULE.items() if name != "clip_ratio_c"}
    results = []
    for place in (torch.device("cpu"), device):
        (own,) = moved([row], place)
        weight = torch.full((50_001,), 1e-4, device=place)
        results.append(
            drawn_policy_loss(
                own.log_probs, own.old_log_probs, own.advantages, weight, own.keys, rule, mask=mask.to(place),
                implementation="compiled", **constants,
            )
        )  # fmt: skip
    (loss, sums, selected), (other, other_sums, other_selected) = results
    assert torch.equal(selected, other_selected.cpu()) and torch.equal(sums.values[6:], other_sums.values[6:].cpu())
    torch.testing.assert_close(other.cpu(), loss, rtol=1e-5, atol=1e-6)


def test_work_is_ordered_on_the_current_stream(device: torch.device) -> None:
    tokens = on(device, make_tokens(5000, "vanilla", False))
    settings = PolicySettings("vanilla", **RULE)
    _, expected, _ = policy_loss_cuda.loss_and_gradient(tokens, settings)
    late = tokens._replace(advantages=torch.zeros_like(tokens.advantages))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the copy comes late: a kernel on another stream would read zeros
        late.advantages.copy_(tokens.advantages)
        _, found, _ = policy_loss_cuda.loss_and_gradient(late, settings)
    stream.synchronize()
    assert torch.equal(found, expected)
