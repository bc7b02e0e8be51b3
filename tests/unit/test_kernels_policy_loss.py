"""The compiled policy loss against a slow float64 reference, its eager twin, and itself on other instruction sets."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from spear_megatron import _C
from spear_megatron.kernels import cuda_library, extension
from spear_megatron.kernels.policy_loss import PolicySums, policy_loss
from spear_megatron.kernels.policy_loss_compiled import PolicySettings, PolicyTokens, loss_and_gradient
from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES

LOW, HIGH, DUAL, COEF = 0.2, 0.28, 3.0, 0.7
RULE = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": DUAL, "kl_cov_coef": COEF}
SETS = ("generic", "avx2", "avx512")[: ("generic", "avx2", "avx512").index(_C.isa()) + 1]
CHOOSING = ("clip_cov", "kl_cov")


def make_tokens(
    count: int, mode: str, seed: int, *, masked: bool = False, spread: float = 0.6, dtype: torch.dtype = torch.float32
) -> PolicyTokens:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(count, generator=generator)
    log_probs = old + spread * torch.randn(count, generator=generator)
    advantages = torch.randn(count, generator=generator)
    advantages[::7] = 0.0
    log_probs[::5] = old[::5]
    weight = torch.rand(count, generator=generator) / max(count, 1)
    selected = torch.rand(count, generator=generator) < 0.3 if mode in CHOOSING else None
    mask = torch.rand(count, generator=generator) < 0.7 if masked else None
    return PolicyTokens(*(value.to(dtype) for value in (log_probs, old, advantages, weight)), selected, mask)


def run(tokens: PolicyTokens, mode: str, implementation: str) -> tuple[torch.Tensor, torch.Tensor, PolicySums]:
    """(loss, gradient of the log-probs, sums)."""
    live = tokens.log_probs.clone().requires_grad_()
    loss, sums = policy_loss(
        live, *tokens[1:4], mode=mode, selected=tokens.selected, mask=tokens.mask, implementation=implementation, **RULE
    )
    loss.backward()
    return loss.detach(), live.grad, sums


def slow_token(mode: str, logp: float, old: float, advantage: float, chosen: bool) -> tuple[float, float, bool, bool]:
    """(surrogate, its slope, clipped, dual clipped) by cases; log-ratios within the limit."""
    ratio = math.exp(logp - old)
    if mode == "gpg":
        return logp * advantage, advantage, False, False
    if mode == "kl_cov":
        distance, slope = abs(logp - old), float(logp > old) - float(logp < old)
        price = COEF if chosen else 0.0
        return ratio * advantage - price * distance, ratio * advantage - price * slope, False, False
    clipped = (advantage > 0 and ratio > 1 + HIGH) or (advantage < 0 and ratio < 1 - LOW)
    inside = min(max(ratio, 1 - LOW), 1 + HIGH)
    value, slope = (inside * advantage, 0.0) if clipped else (ratio * advantage, ratio * advantage)
    if mode == "clip_cov":
        return (0.0, 0.0, clipped, False) if chosen else (value, slope, clipped, False)
    if advantage < 0 and value < DUAL * advantage:
        return DUAL * advantage, 0.0, clipped, True
    return value, slope, clipped, False


def slow_loss(tokens: PolicyTokens, mode: str) -> tuple[list[float], list[float]]:
    """(the six sums, gradient) in plain python."""
    count = len(tokens.log_probs)
    chosen = [False] * count if tokens.selected is None else tokens.selected.tolist()
    used = [True] * count if tokens.mask is None else tokens.mask.tolist()
    columns = [value.tolist() for value in tokens[:4]]
    losses, ratios, log_ratios, gradient, clips = [0.0], [0.0], [0.0], [], [0, 0]
    for i, (logp, old, advantage, weight) in enumerate(zip(*columns, strict=True)):
        value, slope, clipped, dual = slow_token(mode, logp, old, advantage, chosen[i])
        gradient.append(-weight * slope if used[i] else 0.0)
        if used[i]:
            losses.append(-weight * value)
            log_ratios.append(logp - old)
            ratios.append(math.exp(logp - old))
            clips = [clips[0] + clipped, clips[1] + dual]
    return [math.fsum(losses), *clips, math.fsum(log_ratios), math.fsum(ratios), max(ratios)], gradient


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("count", [0, 1, 3, 15, 16, 17, 100, 4097])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_equals_the_slow_reference(mode: str, count: int, masked: bool, implementation: str) -> None:
    tokens = make_tokens(count, mode, seed=count + 1, masked=masked)
    loss, gradient, sums = run(tokens, mode, implementation)
    expected, slopes = slow_loss(tokens, mode)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.double().tolist() == pytest.approx(slopes, rel=3e-6, abs=1e-7 / max(count, 1))
    assert loss.item() == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    assert sums.clipped.item() == expected[1] and sums.dual_clipped.item() == expected[2]
    assert sums.loss.item() == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    assert sums.log_ratio.item() == pytest.approx(expected[3], rel=1e-6, abs=1e-6 * max(count, 1))
    assert sums.ratio.item() == pytest.approx(expected[4], rel=1e-6)
    assert sums.max_ratio.item() == pytest.approx(expected[5], rel=1e-6)
    assert sums.values.shape == (6,) and sums.values.dtype == torch.float64 and not sums.values.requires_grad


def test_the_cases_meet_every_clip() -> None:
    _, _, sums = run(make_tokens(4097, "vanilla", seed=4098), "vanilla", "compiled")
    assert sums.clipped > 100 and sums.dual_clipped > 10


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_the_eager_twin_by_finite_differences(mode: str) -> None:
    tokens = make_tokens(40, mode, seed=3, masked=True, dtype=torch.float64)
    keep = tokens.log_probs != tokens.old_log_probs  # |log r| has a corner at 0
    logp = tokens.log_probs[keep].requires_grad_()
    others = [value[keep] for value in tokens[1:4]]
    flags = {name: None if value is None else value[keep] for name, value in tokens._asdict().items() if name in FLAGS}

    def loss(values: torch.Tensor) -> torch.Tensor:
        return policy_loss(values, *others, mode=mode, implementation="eager", **flags, **RULE)[0]

    assert torch.autograd.gradcheck(loss, (logp,), eps=1e-7, atol=1e-6)


FLAGS = ("selected", "mask")


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_gives_the_same(mode: str, isa: str) -> None:
    tokens = make_tokens(5003, mode, seed=17, masked=True)
    settings = PolicySettings(mode, **RULE)
    _, sums, gradient = loss_and_gradient(tokens, settings, isa)
    _, expected_sums, expected_gradient = loss_and_gradient(tokens, settings, "generic")
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", SETS)
def test_the_ratio_is_accurate_over_the_whole_range(isa: str) -> None:
    """With unit advantage and weight, the gradient of an unselected token of kl_cov is minus the ratio."""
    x = torch.linspace(-20, 20, 100_003)
    x[50_000] = 0.0
    one, none = torch.ones(len(x)), torch.zeros(len(x), dtype=torch.bool)
    tokens = PolicyTokens(x, torch.zeros(len(x)), one, one, none, None)
    _, _, gradient = loss_and_gradient(tokens, PolicySettings("kl_cov", **RULE), isa)
    exact = x.double().exp()
    assert ((-gradient.double() - exact) / exact).abs().max() < 3e-7
    assert gradient[50_000] == -1.0


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_bitwise_the_same_every_time_and_for_any_number_of_threads(mode: str) -> None:
    tokens = make_tokens(50_000, mode, seed=5, masked=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            loss, gradient, sums = run(tokens, mode, "compiled")
            results.append((loss, gradient, sums.values))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("implementation", ["compiled", "eager"])
def test_extreme_log_ratios_are_limited(mode: str, implementation: str) -> None:
    logp, old = torch.tensor([0.0, -200.0, 0.0, -200.0] * 5), torch.tensor([-200.0, 0.0, -200.0, 0.0] * 5)
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0] * 5)
    selected = torch.tensor([False, True] * 10) if mode in CHOOSING else None
    tokens = PolicyTokens(logp, old, advantages, torch.ones(20), selected, None)
    loss, gradient, sums = run(tokens, mode, implementation)
    assert loss.isfinite() and gradient.isfinite().all() and sums.log_ratio == 0
    assert sums.max_ratio.item() == pytest.approx(math.exp(20), rel=1e-6)
    if mode != "gpg":
        assert not gradient.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("implementation", ["compiled", "eager"])
@pytest.mark.parametrize("position", [3, 20])  # in a whole vector and in the tail
@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_not_finite_stays_visible(
    value: float, mode: str, column: int, implementation: str, position: int, chosen: bool
) -> None:
    tokens = make_tokens(21, mode, seed=6)
    tokens[column][position] = value
    if tokens.selected is not None:
        tokens.selected[position] = chosen
    loss, _, sums = run(tokens, mode, implementation)
    if not (mode == "gpg" and column == 1):  # old log-probs have no part in that loss
        assert not loss.isfinite() and not sums.loss.isfinite()
    if column < 2:
        assert sums.log_ratio.isnan() and sums.ratio.isnan() and sums.max_ratio.isnan()
    mask = torch.ones(21, dtype=torch.bool)
    mask[position] = False
    loss, gradient, sums = run(tokens._replace(mask=mask), mode, implementation)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[position] == 0
    assert sums.values.isfinite().all()


@pytest.mark.parametrize("mode", SURROGATE_MODES)
def test_strided_columns_and_a_scaled_loss(mode: str) -> None:
    tokens = make_tokens(200, mode, seed=8)
    spread = torch.stack([tokens.log_probs, tokens.old_log_probs], dim=1).requires_grad_()
    arguments = {"mode": mode, "selected": tokens.selected, "implementation": "compiled", **RULE}
    loss, _ = policy_loss(spread[:, 0], spread[:, 1], *tokens[2:4], **arguments)
    (3 * loss).backward()
    _, gradient, _ = run(tokens, mode, "compiled")
    torch.testing.assert_close(spread.grad[:, 0], 3 * gradient)
    assert not spread.grad[:, 1].any()


def test_a_second_derivative_is_refused() -> None:
    tokens = make_tokens(5, "vanilla", seed=9)
    live = tokens.log_probs.clone().requires_grad_()
    columns = (live, *tokens[1:4])
    function, _ = policy_loss(*columns, mode="vanilla", implementation="compiled", **RULE)
    operator, _, _ = torch.ops.spear.policy_loss(*columns, None, None, "vanilla", LOW, HIGH, DUAL, COEF)
    for loss in (function, operator):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, live, create_graph=True)


def test_auto_takes_what_fits() -> None:
    extension.warn_slow_path.cache_clear()
    tokens = make_tokens(5, "vanilla", seed=1, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="no compiled policy_loss for torch.float64 on cpu"):
        loss, _, _ = run(tokens, "vanilla", "auto")
    assert loss.dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        run(tokens, "vanilla", "compiled")
    on_cuda = "eager" if cuda_library.missing_reason() else "compiled"
    assert extension.available()["policy_loss"] == {"cpu": "compiled", "cuda": on_cuda}


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens(40, "vanilla", seed=1)
    expected = run(tokens, "vanilla", "eager")[0]
    monkeypatch.setitem(sys.modules, "spear_megatron._C", None)
    extension._load.cache_clear()
    extension.load_autograd.cache_clear()
    extension.warn_slow_path.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="pip install .*slower eager implementation"):
            assert run(tokens, "vanilla", "auto")[0] == expected
        with pytest.raises(RuntimeError, match="pip install"):
            run(tokens, "vanilla", "compiled")
        assert extension.available()["policy_loss"]["cpu"] == extension.available()["cov_select"]["cpu"] == "eager"
    finally:
        monkeypatch.undo()
        extension._load.cache_clear()
        extension.load_autograd.cache_clear()
        extension.warn_slow_path.cache_clear()


def test_wrong_arguments_are_named() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="log_probs must be floating"):
        policy_loss(one[None], one, one, one, mode="vanilla", **RULE)
    for name, arguments in {
        "old_log_probs": (one, two, one, one), "advantages": (one, one, one.double(), one),
        "token_weight": (one, one, one, two),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be torch.float32"):
            policy_loss(*arguments, mode="vanilla", **RULE)
    with pytest.raises(ValueError, match="mask must be torch.bool"):
        policy_loss(one, one, one, one, mode="vanilla", mask=one, **RULE)
    with pytest.raises(ValueError, match="clip_cov needs selected"):
        policy_loss(one, one, one, one, mode="clip_cov", **RULE)
    with pytest.raises(ValueError, match="unknown"):
        policy_loss(one, one, one, one, mode="ppo", **RULE)
    with pytest.raises(ValueError, match="implementation='fast'"):
        policy_loss(one, one, one, one, mode="vanilla", implementation="fast", **RULE)
