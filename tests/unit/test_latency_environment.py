"""The environment that takes its time."""

from __future__ import annotations

import asyncio
import time

import pytest

from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.testing import check_environment
from spear_megatron.testing.latency import LatencyEnvironment
from spear_megatron.types import Prompt

PROMPT = Prompt("t3", ({"role": "user", "content": "hello"},))


def test_it_keeps_the_contract() -> None:
    check_environment(lambda: LatencyEnvironment(latency_s=0.0), PROMPT, turns=["one", "two"])


def test_a_step_takes_its_time_and_slow_tasks_take_more() -> None:
    async def seconds(environment: LatencyEnvironment) -> float:
        await environment.reset(PROMPT)
        start = time.monotonic()
        first = await environment.step(parse_turn("one", finished=True))
        assert first.messages and (await environment.step(parse_turn("two", finished=True))).done
        return time.monotonic() - start

    assert asyncio.run(seconds(LatencyEnvironment(latency_s=0.02))) >= 0.04
    assert asyncio.run(seconds(LatencyEnvironment(latency_s=0.02, spread=10.0))) >= 0.08


@pytest.mark.parametrize("bad", [{"latency_s": -1.0}, {"num_turns": 0}, {"spread": -0.1}])
def test_impossible_settings(bad: dict) -> None:
    with pytest.raises(ValueError, match="env.kwargs"):
        LatencyEnvironment(**bad)
