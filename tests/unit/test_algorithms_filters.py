"""Sample and group filters against slow references."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.algorithms.filters import (
    group_spread,
    informative_groups,
    is_repetitive,
    is_unreadable,
    kept_groups,
    masked_reason,
    sampled_runs,
)
from spear_megatron.types import StopReason, TrajectoryId


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_runs_are_the_masked_stretches(mask: list[bool]) -> None:
    ids = torch.arange(len(mask), dtype=torch.int32)
    expected = [[i for i, _ in run] for key, run in itertools.groupby(enumerate(mask), key=lambda pair: pair[1]) if key]
    assert [run.tolist() for run in sampled_runs(ids, torch.tensor(mask, dtype=torch.bool))] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=4), st.integers(1, 4), st.integers(1, 5))
def test_repetition_equals_the_slow_reference(runs: list[list[int]], n: int, times: int) -> None:
    grams = Counter(tuple(run[i : i + n]) for run in runs for i in range(len(run) - n + 1))
    expected = max(grams.values(), default=0) >= times
    assert is_repetitive([torch.tensor(run, dtype=torch.int32) for run in runs], n=n, times=times) == expected


def test_repetition_at_its_default_border() -> None:
    """29 equal tokens hold a 20-gram 10 times; cut into two runs, or one fewer, they do not."""
    same = torch.full((29,), 7, dtype=torch.int32)
    assert is_repetitive([same])
    assert not is_repetitive([same[:28]])
    assert not is_repetitive([same[:15], same[15:]])
    assert is_repetitive([same[:24], same[:24]])


def test_tool_output_does_not_count_as_repetition() -> None:
    ids = torch.cat([torch.arange(20), torch.full((200,), 3), torch.arange(20)]).int()
    mask = torch.tensor([True] * 20 + [False] * 200 + [True] * 20)
    assert is_repetitive([ids]) and not is_repetitive(sampled_runs(ids, mask))


def test_repetition_is_fast_on_long_texts() -> None:
    run = torch.randint(0, 150_000, (16_384,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    started = time.perf_counter()
    assert not is_repetitive([run])
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    "text",
    ["a\ufffdb", "\u00ef\u00bf\u00bd", "\u00ef\u00bf\u00bd" * 4, "\u0120\u00ef\u00bf\u00bd", "\u00ef\u00bc\ufffd"]
    + ["x \u00ef\u00bc\u0178"],
)
def test_unreadable_texts(text: str) -> None:
    assert is_unreadable([text]) and is_unreadable(["fine", f"before {text} after"])


def test_the_marks_are_what_wrong_decoding_makes() -> None:
    assert is_unreadable(["\ufffd".encode().decode("latin-1")])
    assert is_unreadable(["\uff1f".encode().decode("cp1252")])
    assert is_unreadable([b"\xe4\xbd".decode(errors="replace")])


@pytest.mark.parametrize(
    "text", ["", "plain", "na\u00efve \u00bfqu\u00e9? \u00bd", "\u4f60\u597d\uff1f \U0001f600 \\boxed{3}"]
)
def test_readable_texts(text: str) -> None:
    assert not is_unreadable([text]) and not is_unreadable([])


ALL_ON = {"overlong": True, "incomplete": True, "repetitive": True, "unreadable": True}


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (StopReason.ANSWER, None),
        (StopReason.LENGTH, "overlong"),
        (StopReason.TOOL_OVERFLOW, "overlong"),
        (StopReason.TURN_LIMIT, "overlong"),
        (StopReason.VOID_TURN, "incomplete"),
        (StopReason.INFRASTRUCTURE, None),
    ],
)
def test_stop_reasons(stop: StopReason, expected: str | None) -> None:
    assert masked_reason(stop, (), **ALL_ON) == expected
    if expected:
        assert masked_reason(stop, (), **{**ALL_ON, expected: False}) is None
        assert masked_reason(stop, {"repetitive", "unreadable"}, **ALL_ON) == expected


def test_flags_come_after_the_stop_reason_in_order() -> None:
    both = {"repetitive", "unreadable"}
    assert masked_reason(StopReason.ANSWER, both, **ALL_ON) == "repetitive"
    assert masked_reason(StopReason.ANSWER, both, **{**ALL_ON, "repetitive": False}) == "unreadable"
    assert masked_reason(StopReason.ANSWER, {"unreadable"}, **{**ALL_ON, "unreadable": False}) is None
    assert masked_reason(StopReason.LENGTH, both, **{**ALL_ON, "overlong": False}) == "repetitive"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.3, 0.7, 1.0])), max_size=25))
def test_spread_equals_the_slow_reference(rows: list[tuple[int, float]]) -> None:
    rewards = {TrajectoryId(2, task, sample): reward for sample, (task, reward) in enumerate(rows)}
    expected = {}
    for task in {task for task, _ in rows}:
        values = [reward for other, reward in rows if other == task]
        expected[(2, task)] = statistics.stdev(values) if len(values) > 1 else 0.0
    spread = group_spread(rewards)
    assert spread == pytest.approx(expected, abs=1e-12)
    assert group_spread(dict(reversed(rewards.items()))) == spread
    different = {(2, task) for task, _ in rows if len({reward for other, reward in rows if other == task}) > 1}
    assert informative_groups(spread) == different


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.tuples(st.integers(1, 2), st.integers(0, 9)), st.sampled_from([0.0, 0.1, 0.5]), max_size=15),
    st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from(["std", "std_rev"]),
)
def test_kept_groups_by_rank(spread: dict[tuple[int, int], float], ratio: float, kind: str) -> None:
    kept = kept_groups(spread, ratio, kind)
    assert len(kept) == (max(int(ratio * len(spread)), 1) if spread else 0)
    for chosen, other in itertools.product(kept, set(spread) - kept):
        better = spread[chosen] - spread[other] if kind == "std" else spread[other] - spread[chosen]
        assert better > 0 or (better == 0 and chosen < other)
    assert kept_groups(dict(reversed(spread.items())), ratio, kind) == kept


def test_unknown_kind_names_the_key() -> None:
    with pytest.raises(ValueError, match="rollout_filter_type"):
        kept_groups({(1, 0): 0.0}, 0.5, "variance")
