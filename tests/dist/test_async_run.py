"""Rollouts one step ahead: equal to an emulation in one thread, on any number of ranks, and after a break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from async_run import ASYNC, STEPS, arguments, break_off_on_rank, check_close, course, emulate_on_rank, run_command
from harness import run_ranks
from train_loop import SPEAR

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.record import read_record


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), seed=0))


@pytest.fixture(scope="module")
def one_rank(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one")
    run_command(1, arguments(model, run_dir, *ASYNC))
    return run_dir


def test_a_run_ahead_equals_its_emulation_in_turn(model: str, one_rank: Path, tmp_path: Path) -> None:
    run_ranks(emulate_on_rank, 1, arguments(model, tmp_path, *ASYNC, "trainer.async=0"))
    result, weights = course(one_rank, own=False)
    expected, same = course(tmp_path, own=False)
    assert result.metrics == expected.metrics and result.tokens == expected.tokens and weights == same
    assert any(figures["actor/grad_norm"] > 0.01 for figures in result.metrics.values())


def test_dynamic_sampling_fills_up_a_step_that_was_rolled_out_ahead(model: str, tmp_path: Path) -> None:
    more = (*ASYNC, "algorithm.filter_groups.enable=true", "reward.name=async_run:Coarse", "data.max_response_length=5")
    run_command(2, arguments(model, tmp_path / "ahead", *more))
    run_ranks(emulate_on_rank, 1, arguments(model, tmp_path / "in_turn", *more, "trainer.async=0"))
    result, expected = (course(tmp_path / name, own=False)[0] for name in ("ahead", "in_turn"))
    check_close(result, expected)
    batches = [figures["filter/gen_batches"] for figures in course(tmp_path / "ahead")[0].metrics.values()]
    assert max(batches) > 1, batches


def test_tokens_are_one_version_behind_and_say_so(one_rank: Path) -> None:
    figures = course(one_rank)[0].metrics
    ages = [(figures[step]["staleness/mean"], figures[step]["staleness/max"]) for step in range(1, STEPS + 1)]
    assert ages == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert [figures[step]["training/policy_version"] for step in range(1, STEPS + 1)] == [0, 0, 1, 2]
    assert figures[3]["training/rollout_logp_abs_diff/mean"] > 1e-4  # of another policy, not of rounding
    seconds = {line["step"]: line.get("timing_s/gen_ahead", 0.0) for line in read_record(one_rank)}
    assert [seconds[step] > 0 for step in range(1, STEPS + 1)] == [False, True, True, True]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_ahead_is_the_same_on_several_ranks(model: str, one_rank: Path, tmp_path: Path, world_size: int) -> None:
    run_command(world_size, arguments(model, tmp_path, *ASYNC))
    check_close(course(tmp_path, own=False)[0], course(one_rank, own=False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_a_run_ahead_works_with_a_split_model(model: str, one_rank: Path, tmp_path: Path, split: str) -> None:
    key = f"actor_rollout_ref.actor.megatron.{split}_model_parallel_size=2"
    run_command(2, arguments(model, tmp_path, *ASYNC, key))
    check_close(course(tmp_path, own=False)[0], course(one_rank, own=False)[0])


@pytest.mark.parametrize("over_sampling", ["1.0", "1.5"])
def test_a_broken_run_goes_on_as_if_nothing_had_happened(model: str, tmp_path: Path, over_sampling: str) -> None:
    more = (*ASYNC, *SPEAR, f"actor_rollout_ref.rollout.over_sampling={over_sampling}")
    run_command(2, arguments(model, tmp_path / "whole", *more))
    settings = arguments(model, tmp_path / "broken", *more)
    if over_sampling != "1.0":  # decisions depend on time: repeat those of the whole run
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "acceptance.jsonl").write_bytes((tmp_path / "whole" / "acceptance.jsonl").read_bytes())
    assert run_ranks(break_off_on_rank, 2, settings, 3) == ["power cut"] * 2
    run_command(2, settings)
    (result, weights), (expected, same) = course(tmp_path / "broken"), course(tmp_path / "whole")
    assert result.metrics == expected.metrics and result.tokens == expected.tokens and weights == same
    assert any(figures.get("replay/replayed", 0) > 0 for figures in result.metrics.values())
    lines = (tmp_path / "broken" / "acceptance.jsonl").exists() == (over_sampling != "1.0")
    assert lines


def test_without_running_ahead_a_step_that_waits_is_rolled_out_anew(model: str, tmp_path: Path) -> None:
    settings = arguments(model, tmp_path, *ASYNC)
    assert run_ranks(break_off_on_rank, 1, settings, 3) == ["power cut"]
    (state,) = (tmp_path / "checkpoints").glob("step_*2/states/prompt_source.json")
    assert json.loads(state.read_text())["order"]["position"] == 12
    run_command(1, [*settings, "trainer.async=0"])
    result = course(tmp_path)[0]
    assert [result.metrics[step]["staleness/max"] for step in range(1, STEPS + 1)] == [0, 1, 0, 0]
    assert sorted({key.task for key in result.tokens[3]}) == [8, 9, 10, 11]
    assert sorted({key.task for key in result.tokens[4]}) == [12, 13, 14, 15]
