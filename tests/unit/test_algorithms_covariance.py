"""Selection by covariance against a slow reference; the same bit for bit for any split over ranks and any order."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, Selection, TokenSet, select_tokens, token_keys

CLIP = ClipCovRule(ratio=0.1, lb=0.05, ub=1.0, clip_ratio_low=0.2, clip_ratio_high=0.28)
QUANTILE = ClipCovRule(0.05, 0.0, 0.0, clip_ratio_low=0.2, clip_ratio_high=0.28, quantiles=(0.6, 0.99))
RULES = (CLIP, QUANTILE, KlCovRule(ratio=0.1))


def make_rows(lengths: list[int], seed: int, *, spread: float = 0.2) -> list[TokenSet]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        log_probs = -3 * torch.rand(length, generator=generator)
        rows.append(
            TokenSet(
                log_probs=log_probs,
                old_log_probs=log_probs + spread * torch.randn(length, generator=generator),
                advantages=torch.randn(1, generator=generator).expand(length),
                keys=token_keys(seed * 1000003 + number * 7919, length),
            )
        )
    return rows


def on_ranks(parts: list[list[TokenSet]], rule: ClipCovRule | KlCovRule) -> list[Selection]:
    """Run the selection on one thread per rank, with a gather that waits for all of them."""
    barrier = threading.Barrier(len(parts), timeout=60)
    slots: list[Any] = [None] * len(parts)
    results: list[Any] = [None] * len(parts)

    def run(rank: int) -> None:
        def gather(own: Any) -> list[Any]:
            slots[rank] = copy.deepcopy(own)
            barrier.wait()
            everything = list(slots)
            barrier.wait()
            return everything

        try:
            results[rank] = select_tokens(parts[rank], rule, gather)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results)
    return results


def slow_selection(rows: list[TokenSet], rule: ClipCovRule | KlCovRule) -> tuple[list[list[bool]], int]:
    """(masks, candidates) by the definition, in plain python."""
    tokens = []
    for i, row in enumerate(rows):
        columns = (row.log_probs.tolist(), row.old_log_probs.tolist(), row.advantages.tolist(), row.keys.tolist())
        tokens += [(i, u, *values) for u, values in enumerate(zip(*columns, strict=True))]
    masks = [[False] * len(row.keys) for row in rows]
    if not tokens or rule.ratio == 0:
        return masks, 0
    mean_logp = math.fsum(t[2] for t in tokens) / len(tokens)
    mean_a = math.fsum(t[4] for t in tokens) / len(tokens)
    cov = [(t[4] - mean_a) * (t[2] - mean_logp) for t in tokens]
    k = max(int(rule.ratio * len(tokens)), 1)
    if isinstance(rule, KlCovRule):
        order = sorted(range(len(tokens)), key=lambda j: (-cov[j], tokens[j][5]))[:k]
        candidates = len(tokens)
    else:
        lb, ub = (rule.lb, rule.ub) if rule.quantiles is None else np.quantile(cov, rule.quantiles, method="linear")
        found = []
        for j, (_, _, logp, old, advantage, _) in enumerate(tokens):
            ratio = math.exp(logp - old)
            bounded = min(max(ratio, 1 - rule.clip_ratio_low), 1 + rule.clip_ratio_high)
            if not bounded * advantage < ratio * advantage and lb < cov[j] < ub:
                found.append(j)
        order = sorted(found, key=lambda j: tokens[j][5])[:k]
        candidates = len(found)
    for j in order:
        masks[tokens[j][0]][tokens[j][1]] = True
    return masks, candidates


lengths_of_rows = st.lists(st.integers(0, 30), min_size=1, max_size=12)
seeds = st.integers(0, 10**6)


@settings(max_examples=120, deadline=None)
@given(lengths_of_rows, seeds, st.sampled_from(RULES))
def test_equals_the_slow_reference(lengths: list[int], seed: int, rule: ClipCovRule | KlCovRule) -> None:
    rows = make_rows(lengths, seed)
    masks, candidates = slow_selection(rows, rule)
    result = select_tokens(rows, rule)
    assert [mask.tolist() for mask in result.masks] == masks
    assert all(mask.dtype == torch.bool for mask in result.masks)
    assert result.num_tokens == sum(lengths)
    assert result.num_candidates == candidates
    assert result.num_selected == sum(map(sum, masks))
    if sum(lengths):
        assert result.num_selected == min(max(int(rule.ratio * sum(lengths)), 1), candidates)


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows, seeds, st.sampled_from(RULES), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_split_over_ranks_and_any_order_is_bitwise_the_same(
    lengths: list[int], seed: int, rule: ClipCovRule | KlCovRule, num_ranks: int, random: Any
) -> None:
    rows = make_rows(lengths, seed)
    expected = select_tokens(rows, rule)
    order = list(range(len(rows)))
    random.shuffle(order)
    owner = [random.randrange(num_ranks) for _ in order]
    held = [[i for i, rank in zip(order, owner, strict=True) if rank == r] for r in range(num_ranks)]
    results = on_ranks([[rows[i] for i in mine] for mine in held], rule)
    for mine, result in zip(held, results, strict=True):
        assert len(result.masks) == len(mine)
        for i, mask in zip(mine, result.masks, strict=True):
            assert torch.equal(mask, expected.masks[i])
        assert figures(result) == figures(expected)


def figures(result: Selection) -> tuple[float, ...]:
    counts = (result.num_tokens, result.num_candidates, result.num_selected, result.num_near_bound)
    return (*counts, result.lb, result.ub, result.mean_advantage, result.mean_log_prob)


def test_long_rows_sum_the_same_wherever_they_lie() -> None:
    rows = make_rows([5, 4097, 3, 1025, 0, 777], seed=5)
    expected = select_tokens(rows, CLIP)
    for parts in ([rows[::-1]], [rows[3:], rows[:3]], [[], rows[1:4], rows[:1] + rows[4:]]):
        assert {figures(result) for result in on_ranks(parts, CLIP)} == {figures(expected)}
    assert expected.num_selected == int(0.1 * sum(len(row.keys) for row in rows))


def test_means_are_exact_sums_of_the_rows() -> None:
    """Plain float64 addition of these rows gives another mean in another order."""
    values = [1e17, 0.3, -1e17, 0.7]
    rows = [TokenSet(*(torch.tensor([value]),) * 3, token_keys(number, 1)) for number, value in enumerate(values)]
    means = {figures(select_tokens([rows[i] for i in order], CLIP))[-2:] for order in ((0, 1, 2, 3), (0, 2, 1, 3))}
    assert len(means) == 1
    assert means.pop() == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("rule", [CLIP, KlCovRule(ratio=0.1)])
def test_equal_keys_are_told_apart_by_row_position_and_value(rule: ClipCovRule | KlCovRule) -> None:
    rows = [
        TokenSet(row.log_probs, row.log_probs, row.advantages, torch.zeros(len(row.keys), dtype=torch.int64))
        for row in make_rows([9, 14, 20, 6], seed=11)
    ]
    expected = select_tokens(rows, rule)
    assert expected.num_selected == 4
    for left, right in (([2, 0], [3, 1]), ([1], [3, 2, 0])):
        results = on_ranks([[rows[i] for i in left], [rows[i] for i in right]], rule)
        for held, result in zip((left, right), results, strict=True):
            assert all(torch.equal(mask, expected.masks[i]) for i, mask in zip(held, result.masks, strict=True))


def test_the_same_row_twice_is_refused() -> None:
    row = make_rows([30], seed=1)[0]
    with pytest.raises(ValueError, match="keys of its own"):
        select_tokens([row, row], KlCovRule(ratio=1 / 60))


def test_kl_cov_breaks_ties_by_key() -> None:
    rows = make_rows([40, 40], seed=2)
    flat = [TokenSet(row.log_probs, row.log_probs, torch.ones(40), row.keys) for row in rows]
    result = select_tokens(flat, KlCovRule(ratio=0.1))
    threshold = torch.cat([row.keys for row in flat]).sort().values[7]
    for mask, row in zip(result.masks, flat, strict=True):
        assert torch.equal(mask, row.keys <= threshold)


def statistic(counts: np.ndarray, expected: float) -> float:
    """Pearson's chi-square in standard deviations from its mean (large degrees of freedom)."""
    value, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    return (value - freedom) / math.sqrt(2 * freedom)


def test_the_draw_is_uniform_over_the_candidates() -> None:
    """Over many bases every candidate is drawn equally often, and so are the pairs of neighbours in a row."""
    num_bases, picks = 4000, 4
    log_probs = torch.tensor([-1.0, 0.0] * 40)
    advantages = torch.tensor([-1.0, 1.0] * 40)
    rule = ClipCovRule(ratio=picks / 80, lb=0.4, ub=0.6, clip_ratio_low=0.2, clip_ratio_high=0.2)
    counts, neighbours = np.zeros(80), 0
    for base in range(num_bases):
        rows = [
            TokenSet(log_probs[part], log_probs[part], advantages[part], token_keys(base * 2 + half, 40))
            for half, part in enumerate((slice(0, 40), slice(40, 80)))
        ]
        mask = torch.cat(select_tokens(rows, rule).masks)
        counts += mask.numpy()
        neighbours += int((mask[1:] & mask[:-1]).sum())
    assert counts.sum() == num_bases * picks
    assert abs(statistic(counts, num_bases * picks / 80)) < 5
    expected = num_bases * 79 * (picks * (picks - 1)) / (80 * 79)
    assert abs(neighbours - expected) < 5 * math.sqrt(expected)


def test_keys_are_splitmix64() -> None:
    """First outputs of the published generator for seeds 1234567 and 0; its later ones step the seed by a constant."""
    golden, word = 0x9E3779B97F4A7C15, 1 << 64
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    for number, expected in enumerate(published):
        assert int(token_keys((1234567 + number * golden) % word, 1)[0]) % word == expected
    assert int(token_keys(0, 1)[0]) % word == 0xE220A8397B1DCDAF
    assert torch.equal(token_keys(5, 10)[3:], token_keys(8, 7))
    assert torch.equal(token_keys(word - 2, 4)[2:], token_keys(0, 2))
    assert len(token_keys(3, 100_000).unique()) == 100_000 and token_keys(1, 0).dtype == torch.int64


@pytest.mark.parametrize("rule", [CLIP, QUANTILE])
def test_one_advantage_selects_nothing(rule: ClipCovRule) -> None:
    rows = [
        TokenSet(row.log_probs, row.old_log_probs, torch.full((len(row.keys),), 0.3), row.keys)
        for row in make_rows([30, 41, 7], seed=3)
    ]
    result = select_tokens(rows, rule)
    assert (result.num_candidates, result.num_selected) == (0, 0)
    assert not any(mask.any() for mask in result.masks)


@pytest.mark.parametrize("rule", [ClipCovRule(0.0, -9.0, 9.0, 0.2, 0.2), KlCovRule(ratio=0.0)])
def test_ratio_zero_selects_nothing(rule: ClipCovRule | KlCovRule) -> None:
    result = select_tokens(make_rows([30, 10], seed=3), rule)
    assert result.num_candidates > 0 and result.num_selected == 0
    assert not any(mask.any() for mask in result.masks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_token_selects_nothing(rule: ClipCovRule | KlCovRule, lengths: list[int]) -> None:
    result = select_tokens(make_rows(lengths, seed=1), rule)
    assert (result.num_tokens, result.num_selected, result.mean_advantage) == (0, 0, 0.0)
    assert [len(mask) for mask in result.masks] == lengths


def test_small_ratios_still_take_one_and_bounds_are_exclusive() -> None:
    log_probs, advantages = torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])
    row = TokenSet(log_probs, log_probs, advantages, token_keys(1, 2))
    for lb, ub, expected in ((0.5, 1.5, 1), (1.0, 1.5, 0), (0.5, 1.0, 0)):
        result = select_tokens([row], ClipCovRule(1e-9, lb, ub, 0.2, 0.2))
        assert result.num_selected == expected
        assert result.num_near_bound == (0 if expected else 2)


def test_bounds_are_the_linear_quantiles_of_all_ranks() -> None:
    rows = make_rows([50, 31, 17], seed=8)
    logp = np.concatenate([row.log_probs.double().numpy() for row in rows])
    advantage = np.concatenate([row.advantages.double().numpy() for row in rows])
    cov = (advantage - advantage.mean()) * (logp - logp.mean())
    for result in on_ranks([rows[:1], rows[1:]], QUANTILE):
        assert [result.lb, result.ub] == pytest.approx(np.quantile(cov, [0.6, 0.99], method="linear").tolist())


def test_a_micro_batch_decides_for_itself() -> None:
    rows = make_rows([40, 40], seed=9)
    alone = [select_tokens([row], CLIP) for row in rows]
    assert [len(result.masks) for result in alone] == [1, 1]
    assert [result.num_tokens for result in alone] == [40, 40]
    assert all(result.num_selected == 0 for result in alone)  # one advantage each
    assert select_tokens(rows, CLIP).num_selected > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [CLIP, QUANTILE, KlCovRule(ratio=0.1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_that_is_not_finite_selects_nothing(value: float, rule: ClipCovRule | KlCovRule) -> None:
    rows = make_rows([20, 20], seed=9)
    rows[0].log_probs[3] = value
    assert select_tokens(rows, rule).num_selected == 0


def test_lengths_must_agree() -> None:
    row = make_rows([4], seed=1)[0]
    with pytest.raises(ValueError, match="one length"):
        select_tokens([TokenSet(row.log_probs, row.old_log_probs, row.advantages, row.keys[:3])], CLIP)


def test_gradients_stay_out() -> None:
    row = make_rows([20], seed=1)[0]
    live = row.log_probs.clone().requires_grad_()
    result = select_tokens([TokenSet(live, row.old_log_probs, row.advantages, row.keys)], CLIP)
    assert not result.masks[0].requires_grad
