"""Draw and loss by one kernel: the tokens of the selection and the gradient of the loss, as if they were two calls."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from spear_megatron import _C
from spear_megatron.algorithms import drawn_loss
from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, Selection, TokenSet, judge_of, select_tokens
from spear_megatron.algorithms.drawn_loss import DrawnSums, drawn_policy_loss
from spear_megatron.kernels import extension
from spear_megatron.kernels import policy_loss as kernels_policy_loss
from spear_megatron.kernels.cov_select import token_keys
from spear_megatron.kernels.drawn_loss_compiled import draw_and_differentiate
from spear_megatron.kernels.policy_loss import PolicySums, policy_loss
from spear_megatron.kernels.policy_loss_compiled import PolicySettings
from spear_megatron.parallel.errors import RunError

CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "kl_cov_coef": 0.7}
CLIP = ClipCovRule(ratio=0.05, lb=0.05, ub=1.0, clip_ratio_low=0.2, clip_ratio_high=0.28)
RULES = {
    "clip_cov": CLIP,
    "kl_cov": KlCovRule(ratio=0.05),
    "all candidates": ClipCovRule(1.0, -math.inf, math.inf, 0.2, 0.28),
    "all of kl_cov": KlCovRule(ratio=1.0),
    "none": ClipCovRule(0.0, 0.05, 1.0, 0.2, 0.28),
    "none of kl_cov": KlCovRule(ratio=0.0),
    "quantiles": ClipCovRule(0.05, 0.0, 0.0, 0.2, 0.28, quantiles=(0.6, 0.99)),
}
SETS = ("generic", "avx2", "avx512")[: ("generic", "avx2", "avx512").index(_C.isa()) + 1]


class Tokens(dict[str, Any]):
    """Columns and mask by their names in ``drawn_policy_loss``."""

    def __init__(self, count: int, seed: int, masked: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        old = -3 * torch.rand(count, generator=generator)
        log_probs = old + 0.3 * torch.randn(count, generator=generator)
        advantages = torch.randn(count, generator=generator)
        weight = torch.rand(count, generator=generator) / max(count, 1)
        mask = torch.rand(count, generator=generator) < 0.7 if masked else None
        beside = 0.0 if mask is None else torch.where(mask, 0.0, torch.nan)
        super().__init__(
            log_probs=log_probs + beside, old_log_probs=old + beside, advantages=advantages + beside,
            token_weight=weight + beside, token_keys=token_keys(seed, count, "eager"), mask=mask,
        )  # fmt: skip

    @property
    def used(self) -> torch.Tensor:
        return torch.ones(len(self["log_probs"]), dtype=torch.bool) if self["mask"] is None else self["mask"]

    def columns(self) -> tuple[torch.Tensor, ...]:
        return tuple(value for name, value in self.items() if name != "mask")


def run(
    tokens: Tokens, rule: Any, implementation: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, DrawnSums, torch.Tensor]:
    """(loss, gradient, sums, selected)."""
    live = tokens["log_probs"].clone().requires_grad_()
    loss, sums, selected = drawn_policy_loss(
        **(tokens | {"log_probs": live}), rule=rule, **CLIPS, implementation=implementation
    )
    loss.backward()
    return loss.detach(), live.grad, sums, selected


def counts(sums: DrawnSums) -> tuple[float, float, float]:
    assert sums.values.shape == (9,) and sums.values.dtype == torch.float64 and not sums.values.requires_grad
    return sums.num_candidates.item(), sums.num_near_bound.item(), sums.num_selected.item()


def in_two_steps(
    tokens: Tokens, rule: Any, implementation: str
) -> tuple[torch.Tensor, torch.Tensor, PolicySums, Selection, torch.Tensor]:
    """(loss, gradient, sums, selection, selected) of the tokens of the mask."""
    used = tokens.used
    columns = {name: tokens[name][used] for name in ("log_probs", "old_log_probs", "advantages")}
    selection = select_tokens([TokenSet(**columns, keys=tokens["token_keys"][used])], rule, implementation="eager")
    selected = torch.zeros_like(used)
    selected[used] = selection.masks[0]
    live = tokens["log_probs"].clone().requires_grad_()
    loss, sums = policy_loss(
        live, *tokens.columns()[1:4], selected=selected, mask=tokens["mask"], implementation=implementation,
        mode="kl_cov" if isinstance(rule, KlCovRule) else "clip_cov", clip_ratio_c=math.inf, **CLIPS,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), live.grad, sums, selection, selected


@pytest.fixture(params=["compiled autograd", "autograd in python"], autouse=True)
def _autograd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with and without spear_megatron._autograd."""
    drawn_loss._call.cache_clear()
    request.addfinalizer(drawn_loss._call.cache_clear)
    if request.param == "compiled autograd":
        if extension.load_autograd()[0] is None:
            pytest.skip(extension.load_autograd()[1])
        return
    for module in (drawn_loss, kernels_policy_loss):
        monkeypatch.setattr(module, "load_autograd", lambda: (None, "not built"))


@pytest.fixture
def _one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the draw is a step of its own")

    monkeypatch.setattr(drawn_loss, "select_tokens", refuse)


@pytest.mark.parametrize("name", [name for name in RULES if name != "quantiles"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 2047, 2049, 20_000])
@pytest.mark.usefixtures("_one_call")
def test_one_call_does_what_two_do(name: str, masked: bool, count: int) -> None:
    tokens, rule = Tokens(count, count + 3, masked), RULES[name]
    loss, gradient, sums, selected = run(tokens, rule, "compiled")
    expected, expected_gradient, expected_sums, selection, chosen = in_two_steps(tokens, rule, "compiled")
    assert torch.equal(selected, chosen)
    assert torch.equal(gradient, expected_gradient)  # bit for bit
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert torch.equal(sums.values[:6], expected_sums.values)
    assert counts(sums) == (selection.num_candidates, selection.num_near_bound, selection.num_selected)
    if count == 20_000:
        share = int(rule.ratio * int(tokens.used.sum()))
        assert selection.num_selected == (selection.num_candidates if rule.ratio == 1 else share)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [False, True])
def test_plain_torch_gives_the_same(name: str, masked: bool) -> None:
    tokens, rule = Tokens(5000, 11, masked), RULES[name]
    loss, gradient, sums, selected = run(tokens, rule, "eager")
    other, other_gradient, other_sums, other_selected = run(tokens, rule)
    assert torch.equal(selected, other_selected) and counts(sums) == counts(other_sums)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other_gradient, gradient, rtol=2e-6, atol=1e-10)
    torch.testing.assert_close(other_sums.values, sums.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("masked", [False, True])
def test_threads_and_instruction_sets_choose_alike(name: str, masked: bool) -> None:
    tokens, rule = Tokens(30_001, 5, masked), RULES[name]
    settings = PolicySettings(name, CLIPS["clip_ratio_low"], CLIPS["clip_ratio_high"], math.inf, 0.7)
    before, results = torch.get_num_threads(), {}
    try:
        for threads, isa in [(1, SETS[-1]), (2, SETS[-1]), (5, SETS[-1]), *((2, isa) for isa in SETS)]:
            torch.set_num_threads(threads)
            found = draw_and_differentiate(tokens.columns(), tokens["mask"], settings, 0.05, judge_of(rule), isa)
            assert found is not None
            results[threads, isa] = found
    finally:
        torch.set_num_threads(before)
    (known, selected), *others = results.values()
    for (threads, isa), (other, other_selected) in list(results.items())[1:]:
        assert torch.equal(selected, other_selected)
        if isa == SETS[-1]:
            assert torch.equal(known.gradient, other.gradient) and torch.equal(known.sums, other.sums), threads
        torch.testing.assert_close(other.gradient, known.gradient, rtol=1e-6, atol=0)
        torch.testing.assert_close(other.sums, known.sums, rtol=1e-6, atol=1e-6)
    assert len(others) >= 2


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_what_stands_between_the_tokens_has_no_effect(name: str) -> None:
    """The choice is that of the tokens back to back, bit for bit, although a sum over gaps would round otherwise."""
    tokens, rule = Tokens(6000, 23, True), RULES[name]
    used = tokens.used
    packed = Tokens(0, 1, False)
    packed |= {key: value[used] for key, value in tokens.items() if key != "mask"}
    _, gradient, _, selected = run(tokens, rule)
    _, packed_gradient, _, packed_selected = run(packed, rule)
    assert torch.equal(selected[used], packed_selected) and not selected[~used].any()
    assert torch.equal(gradient[used], packed_gradient) and not gradient[~used].any()


@pytest.mark.parametrize("rule", [ClipCovRule(0.3, -9.0, 9.0, 0.2, 0.28), KlCovRule(0.3)])
def test_equal_tokens_at_the_border_are_decided_as_in_a_selection(rule: Any) -> None:
    tokens = Tokens(40, 2, False)
    for name in ("log_probs", "old_log_probs", "advantages"):
        tokens[name] = tokens[name][:2].repeat(20)
    tokens["token_keys"] = torch.arange(40) if isinstance(rule, KlCovRule) else torch.arange(40) // 20
    _, gradient, _, selected = run(tokens, rule)
    _, expected, _, _, chosen = in_two_steps(tokens, rule, "compiled")
    assert torch.equal(selected, chosen) and int(chosen.sum()) == 12 and torch.equal(gradient, expected)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_log_prob_is_in_the_loss(name: str, value: float) -> None:
    tokens = Tokens(3000, 4, False)
    tokens["log_probs"][1234] = value
    loss, _, sums, selected = run(tokens, RULES[name])
    assert loss.isnan() and not selected.any() and sums.num_selected == 0


@pytest.mark.usefixtures("_one_call")
def test_the_loss_is_differentiated_once_and_scaled() -> None:
    tokens = Tokens(100, 8, True)
    _, gradient, _, _ = run(tokens, CLIP)
    live = tokens["log_probs"].clone().requires_grad_()
    loss, _, _ = drawn_policy_loss(**(tokens | {"log_probs": live}), rule=CLIP, **CLIPS)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, live, create_graph=True)
    loss, _, _ = drawn_policy_loss(**(tokens | {"log_probs": live}), rule=CLIP, **CLIPS)
    (scaled,) = torch.autograd.grad(3 * loss, live)
    assert torch.equal(scaled, 3 * gradient)
    with torch.no_grad():
        assert not drawn_policy_loss(**tokens, rule=CLIP, **CLIPS)[0].requires_grad


def test_columns_of_any_stride_and_dtype() -> None:
    tokens, wide = Tokens(500, 6, True), Tokens(500, 6, True)
    for name, value in tokens.items():
        wide[name] = torch.stack([value, value], dim=1)[:, 0]
        assert not wide[name].is_contiguous()
    loss, gradient, _, selected = run(tokens, CLIP)
    other, other_gradient, _, other_selected = run(wide, CLIP)
    assert torch.equal(loss, other) and torch.equal(gradient, other_gradient)
    assert torch.equal(selected, other_selected)
    double = Tokens(500, 6, True)
    for name in ("log_probs", "old_log_probs", "advantages", "token_weight"):
        double[name] = double[name].double()
    extension.warn_slow_path.cache_clear()
    with pytest.warns(RuntimeWarning, match="policy_loss for torch.float64"):
        exact = run(double, CLIP)[0]
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)
    with pytest.raises(RunError, match="no compiled policy_loss for torch.float64"):
        run(double, CLIP, "compiled")


def test_bad_input_is_named() -> None:
    tokens = Tokens(20, 1, True)
    with pytest.raises(ValueError, match="token_weight must be torch.float32 .20."):
        run_with(tokens, token_weight=torch.ones(19))
    with pytest.raises(ValueError, match="mask must be torch.bool"):
        run_with(tokens, mask=torch.ones(20, dtype=torch.int64))
    with pytest.raises(ValueError, match="implementation='fast'"):
        drawn_policy_loss(**tokens, rule=CLIP, **CLIPS, implementation="fast")


def run_with(tokens: Tokens, **changed: torch.Tensor) -> None:
    drawn_policy_loss(**(tokens | changed), rule=CLIP, **CLIPS)


CACHES = (extension._load, extension.load_autograd, extension.warn_slow_path, drawn_loss._call)


def test_without_the_compiled_module_the_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(300, 3, True)
    expected = run(tokens, CLIP, "eager")
    monkeypatch.setitem(sys.modules, "spear_megatron._C", None)
    try:
        for function in CACHES:
            function.cache_clear()
        with pytest.warns(RuntimeWarning, match="pip install .*slower eager implementation"):
            found = run(tokens, CLIP, "auto")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[3], expected[3])
        with pytest.raises(RunError, match="pip install"):
            run(tokens, CLIP, "compiled")
    finally:
        monkeypatch.undo()
        for function in CACHES:
            function.cache_clear()


def test_a_mask_of_any_bytes() -> None:
    """What is not 0 is true, also where bytes are looked at as booleans."""
    tokens = Tokens(5000, 9, True)
    expected = run(tokens, CLIP, "compiled")
    tokens["mask"] = (tokens["mask"].to(torch.uint8) * 7).view(torch.bool)
    found = run(tokens, CLIP, "compiled")
    assert torch.equal(found[3], expected[3]) and torch.equal(found[1], expected[1])


def test_a_gradient_without_memory_is_zero() -> None:
    tokens = Tokens(50, 3, False)
    live = tokens["log_probs"].clone().requires_grad_()
    loss, _, _ = drawn_policy_loss(**(tokens | {"log_probs": live}), rule=CLIP, **CLIPS)
    (gradient,) = torch.autograd.grad(loss, live, torch._efficientzerotensor(()))
    assert not gradient.any()
