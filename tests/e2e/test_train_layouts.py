"""The whole training loop gives the same tokens and figures in every parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_loop import LOOP_BASELINE, LOOP_LAYOUTS, SPEAR, STEPS, LoopResult, compare, make_agent, run_loop
from train_step import Layout


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def expected(agent: str, tmp_path_factory: pytest.TempPathFactory) -> LoopResult:
    return run_loop(agent, tmp_path_factory.mktemp("one_rank"), LOOP_BASELINE)


def test_the_run_on_one_rank_is_worth_comparing(expected: LoopResult) -> None:
    assert sorted(expected.metrics) == sorted(expected.tokens) == list(range(1, STEPS + 1))
    for figures in expected.metrics.values():
        assert figures["actor/grad_norm"] > 0.01 and figures["actor/pg_clipfrac"] > 0
        assert figures["tools/calls_mean"] > 0.5 and figures["groups/zero_variance"] < 0.5
        assert figures["training/num_optimizer_steps"] == 2


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[] if layout.name == "DP2" else pytest.mark.slow) for layout in LOOP_LAYOUTS],
    ids=lambda layout: layout.name,
)
def test_a_layout_changes_nothing(agent: str, expected: LoopResult, layout: Layout, tmp_path: Path) -> None:
    difference = compare(run_loop(agent, tmp_path, layout), expected)
    assert difference.first_step_tokens_equal
    assert difference.error <= 1.0, difference.worst


@pytest.fixture(scope="module")
def expected_with_replay(agent: str, tmp_path_factory: pytest.TempPathFactory) -> LoopResult:
    return run_loop(agent, tmp_path_factory.mktemp("one_rank"), LOOP_BASELINE, *SPEAR)


def test_the_run_with_replay_is_worth_comparing(expected_with_replay: LoopResult) -> None:
    figures = expected_with_replay.metrics
    replayed = [figures[step]["replay/replayed"] for step in range(1, STEPS + 1)]
    assert replayed[0] == 0 and min(replayed[1:]) >= 3, replayed
    assert all(figures[step]["replay/pushed"] > 0 and figures[step]["cov/selected"] > 0 for step in figures)
    assert figures[STEPS]["cov/replay_selected"] > 0 and figures[STEPS]["spear/gamma"] == 1.0


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[] if layout.name == "DP2" else pytest.mark.slow) for layout in LOOP_LAYOUTS],
    ids=lambda layout: layout.name,
)
def test_a_layout_changes_nothing_with_replay_either(
    agent: str, expected_with_replay: LoopResult, layout: Layout, tmp_path: Path
) -> None:
    result = run_loop(agent, tmp_path, layout, *SPEAR)
    difference = compare(result, expected_with_replay)
    names = ("cov/near_bound", "cov/replay_near_bound")
    near = sum(line.get(name, 0.0) for line in result.metrics.values() for name in names)
    assert difference.first_step_tokens_equal
    assert difference.error <= 1.0 or near > 0, difference.worst


def test_plain_torch_trains_alike(agent: str, expected_with_replay: LoopResult, tmp_path: Path) -> None:
    eager = run_loop(agent, tmp_path, LOOP_BASELINE, *SPEAR, "actor_rollout_ref.actor.kernels=eager")
    difference = compare(eager, expected_with_replay)
    assert difference.first_step_tokens_equal
    assert difference.error <= 1.0, difference.worst
