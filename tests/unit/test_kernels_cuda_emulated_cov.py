"""Selection by covariance on the emulation of CUDA's threads: token for token that of the CPU."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated_library, emulation  # noqa: F401

from spear_megatron.algorithms import drawn_loss
from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, select_tokens
from spear_megatron.algorithms.covariance_device import select_on_device
from spear_megatron.kernels import cov_select_cuda
from spear_megatron.kernels.cov_select import token_keys
from spear_megatron.trainer.losses import PolicyLoss, SurrogateRule
from spear_megatron.types import MicroBatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]
Rule = ClipCovRule | KlCovRule
CLIP = ClipCovRule(0.1, 0.05, 1.0, 0.2, 0.28)
QUANTILE = ClipCovRule(0.05, 0.0, 0.0, 0.2, 0.28, quantiles=(0.6, 0.99))
KL = KlCovRule(0.02)
ALL = ClipCovRule(0.002, -math.inf, math.inf, 1.0, math.inf)


def make_rows(lengths: list[int], seed: int) -> list[TokenSet]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        log_probs = -3 * torch.rand(length, generator=generator)
        old = log_probs + 0.3 * torch.randn(length, generator=generator)
        advantages = torch.randn(length, generator=generator)
        rows.append(TokenSet(log_probs, old, advantages, token_keys(seed * 1_000_003 + number * 7919, length)))
    return rows


def check(rows: list[TokenSet], rule: Rule) -> int:
    """The device chooses what the host chooses, and reports the same numbers; how many it chose."""
    expected, found = select_tokens(rows, rule), select_on_device(rows, rule)
    for left, right in zip(found.masks, expected.masks, strict=True):
        assert torch.equal(left, right)
    for name, value in zip(found.numbers._fields, found.numbers, strict=True):
        assert value.item() == pytest.approx(getattr(expected, name), rel=0, abs=0, nan_ok=True), name
    return expected.num_selected


@pytest.mark.parametrize("rule", [CLIP, QUANTILE, KL, ALL])
@pytest.mark.parametrize("lengths", [[1], [300], [9000], [40, 0, 4097, 7]])
def test_the_same_tokens_as_on_the_cpu(rule: Rule, lengths: list[int]) -> None:
    chosen = check(make_rows(lengths, seed=len(lengths) + lengths[0]), rule)
    assert chosen > 0 or sum(lengths) == 1


@pytest.mark.parametrize("rule", [CLIP, QUANTILE, KL])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_mask_is_a_shorter_row(rule: Rule, share: float) -> None:
    (row,) = make_rows([5001], seed=3)
    mask = torch.rand(5001, generator=torch.Generator().manual_seed(4)) < share
    expected = select_tokens([TokenSet(*(getattr(row, name)[mask] for name in TokenSet.__slots__))], rule)
    for name in ("log_probs", "advantages"):
        getattr(row, name)[~mask] = torch.nan  # what stands beside the mask has no effect
    found = select_on_device([row], rule, mask)
    assert torch.equal(found.masks[0][mask], expected.masks[0]) and not found.masks[0][~mask].any()
    assert found.numbers.num_tokens == expected.num_tokens == int(mask.sum())
    assert found.numbers.num_candidates == expected.num_candidates
    assert (found.numbers.lb.item(), found.numbers.ub.item()) == (expected.lb, expected.ub)


@pytest.mark.parametrize("rule", [KlCovRule(0.1), ClipCovRule(0.1, -0.1, 0.1, 1.0, math.inf)])
@pytest.mark.parametrize("keys", ["own", "zero", "few", "first"])
def test_equal_words_are_told_apart_as_on_the_cpu(rule: Rule, keys: str) -> None:
    """Covariances of few values, keys that are all equal, differ in their last bits or in the first of a row alone."""
    rows = []
    for number, row in enumerate(make_rows([90, 141, 33], seed=11)):
        log_probs = (row.log_probs * 2).round() / 2
        zeros = torch.zeros_like(row.keys)
        own = {"own": row.keys, "zero": zeros, "few": row.keys & 3, "first": zeros.clone()}[keys]
        if keys == "first":
            own[0] = -number - 1  # the last row comes first
        rows.append(TokenSet(log_probs, log_probs, row.advantages.sign(), own))
    if isinstance(rule, ClipCovRule):
        rows = [replace(row, advantages=torch.zeros_like(row.advantages)) for row in rows]
    if keys == "few":  # equal keys at equal positions of rows with equal first keys: values decide
        steps = [torch.linspace(0, 1e-3 * (1 + number), len(row.keys)) for number, row in enumerate(rows)]
        rows = [replace(row, advantages=row.advantages + step) for row, step in zip(rows, steps, strict=True)]
    if isinstance(rule, KlCovRule) or keys != "zero":
        assert check(rows, rule) == 26


def test_equal_covariances_go_by_key_beyond_the_first_digits() -> None:
    (row,) = make_rows([3000], seed=5)
    flat = replace(row, advantages=torch.ones(3000))
    assert check([flat], KlCovRule(0.1)) == 300
    close = replace(flat, keys=(flat.keys & 0xFFF) + torch.arange(3000) * 4096)
    for ratio in (1 / 3000, 0.3, 2999 / 3000, 1.0):
        check([close], KlCovRule(ratio))
        check([close], replace(ALL, ratio=ratio))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [CLIP, KL])
def test_what_is_not_finite_selects_nothing(value: float, rule: Rule) -> None:
    rows = make_rows([300, 40], seed=9)
    rows[1].advantages[3] = value
    found = select_on_device(rows, rule)
    assert found.numbers.num_selected == 0 and not any(mask.any() for mask in found.masks)
    assert found.numbers.mean_log_prob.isnan() and found.numbers.num_tokens == 340


@pytest.mark.parametrize("rule", [replace(CLIP, ratio=0.0), KlCovRule(0.0)])
def test_a_ratio_of_zero_selects_nothing(rule: Rule) -> None:
    assert check(make_rows([300], seed=2), rule) == 0


def test_shares_are_floored_as_decimals() -> None:
    """0.29 of 100 is 29, though the product of doubles is less."""
    for length, ratio, expected in ((100, 0.29, 29), (50, 0.58, 29), (1000, 0.0019999, 1), (30, 1e-9, 1)):
        assert check(make_rows([length], seed=1), KlCovRule(ratio)) == expected


def test_rows_are_added_exactly() -> None:
    """Sums of very different size that cancel: only their exact sum is the same in any order."""
    rows = make_rows([1] * 60, seed=8)
    generator = torch.Generator().manual_seed(1)
    for number, row in enumerate(rows):
        row.advantages.mul_(10.0 ** float(torch.randint(-30, 30, (1,), generator=generator)))
        if number % 2:
            row.advantages.copy_(-rows[number - 1].advantages * (1 + 2**-20 * (number % 3 == 0)))
    check(rows, ALL)
    check(rows[::-1], ALL)


def test_repeats_and_refusals() -> None:
    rows = make_rows([2500], seed=6)
    first, again = (select_on_device(rows, KL) for _ in range(2))
    assert torch.equal(first.masks[0], again.masks[0])
    assert torch.equal(torch.stack(first.numbers), torch.stack(again.numbers))
    with pytest.raises(ValueError, match="single row"):
        select_on_device(rows * 2, KL, torch.ones(2500, dtype=torch.bool))
    with pytest.raises(ValueError, match="one length"):
        select_on_device([replace(rows[0], keys=rows[0].keys[:3])], KL)


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_the_loss_of_a_micro_batch_draws_on_the_device(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = make_rows([700], seed=4)
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(3, 700, generator=generator)
    batch = MicroBatch(
        *(torch.zeros(0, dtype=torch.int64),) * 4, loss_mask=uniform[0] < 0.7, token_weight=uniform[1] / 700,
        advantages=row.advantages, old_log_probs=row.old_log_probs, rollout_log_probs=row.old_log_probs,
        ref_log_probs=row.old_log_probs, surrogate_weight=uniform[1], replayed=uniform[2] < 0.3,
        selected=torch.zeros(700, dtype=torch.bool), token_keys=row.keys, rows=(),
    )  # fmt: skip
    rule = SurrogateRule(
        mode=mode, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, kl_cov_coef=1.0,
        draw={"clip_cov": CLIP, "kl_cov": KL}[mode],
    )  # fmt: skip
    results = []
    for on_device in (False, True):
        monkeypatch.setattr(cov_select_cuda, "DEVICE_TYPES", {"cpu"} if on_device else set())
        if on_device:
            monkeypatch.setattr(drawn_loss, "_call", lambda *_: None)
        loss, figures = PolicyLoss(rule=rule, replay_rule=rule)(row.log_probs, uniform[1], batch)
        results.append({name: float(value) for name, value in (figures.sums | {"loss": loss}).items()})
    # Counts are equal; exponentials differ in the last bit of a float.
    assert results[1] == pytest.approx(results[0], rel=1e-6) and results[0]["cov_selected"] > 5
    assert results[0]["cov_replay_selected"] > 0


@pytest.mark.parametrize("bound", [1 - 1e-5, 1.0, 1 + 1e-5])
def test_bounds_are_exclusive_and_their_neighbourhood_is_not(bound: float) -> None:
    """Two tokens whose covariance is 1 exactly."""
    values = torch.tensor([-1.0, 1.0])
    row = TokenSet(values, values, values, token_keys(1, 2))
    for lb, ub in ((bound, 3.0), (-3.0, bound)):
        check([row], ClipCovRule(0.5, lb, ub, 0.2, 0.2))
    assert select_on_device([row], ClipCovRule(0.5, bound, 3.0, 0.2, 0.2)).numbers.num_near_bound == 2
