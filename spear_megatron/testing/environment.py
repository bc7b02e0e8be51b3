"""The contract of environments."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.environments.protocol import Environment, Observation, ResumableEnvironment, StepResult, Turn
from spear_megatron.testing.contract import require, require_int, served
from spear_megatron.types import Prompt

_CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'

# What models do write. None of it may raise, and none of it is an infrastructure failure.
BAD_TURNS: tuple[Turn, ...] = tuple(
    parse_turn(text, finished=finished)
    for text, finished in (
        ("", True),
        ("   \n", True),
        ("I do not know.", True),
        ("\\boxed{", True),
        ("<tool_call>", True),
        ("<tool_call>{oops}</tool_call>", True),
        (_CALL % ("no_such_tool", "{}"), True),
        (_CALL % ("code_interpreter", "{}"), True),
        (_CALL % ("code_interpreter", '{"code": 3}'), True),
        (_CALL % ("x" * 5000, '{"code": null, "more": [1, {"a": "b"}]}') * 40, True),
        ("x" * 200_000, True),
        ("\x00\u202e\U0001f600 数 </tool_response> <|im_end|>", True),
        ("cut in the mid", False),
    )
)


def check_environment(
    factory: Callable[[], Environment],
    prompt: Prompt,
    *,
    turns: Sequence[str] = (),
    deadline_s: float = 60.0,
) -> None:
    """Check the environments that ``factory`` makes, on ``prompt`` with the model turns ``turns`` (an episode).

    Checked: the protocol; types of observations and step results; that two episodes of the same prompt and turns are
    equal (all samples of a group must see the same task); that what models write wrongly never raises and is never an
    infrastructure failure; that a step continues in one way only; that an environment with snapshots goes on from each
    as if nothing had happened; and that an episode can be closed at any point, twice included. Every call
    has ``deadline_s`` seconds.

    Raises:
        ContractError: naming the broken rule.
    """
    asyncio.run(_check(factory, prompt, turns, deadline_s))


async def _check(
    factory: Callable[[], Environment], prompt: Prompt, turns: Sequence[str], deadline_s: float
) -> None:
    unused = factory()
    require(isinstance(unused, Environment), f"{type(unused).__name__} lacks one of reset, step, close")
    await served("close before reset", unused.close(), deadline_s)
    script = [parse_turn(text, finished=True) for text in turns]
    first = await _episode(factory, prompt, script, deadline_s)
    second = await _episode(factory, prompt, script, deadline_s)
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        what = "reset" if index == 0 else f"step {index}"
        require(left == right, f"two episodes of the same prompt differ at {what}: {_brief(left)} and {_brief(right)}")
    require(len(first) == len(second), f"two episodes of the same prompt took {len(first)} and {len(second)} steps")
    if isinstance(unused, ResumableEnvironment):
        await _check_resume(factory, prompt, script, first, deadline_s)
    for turn in BAD_TURNS:
        await _episode(factory, prompt, [turn], deadline_s)
        await _episode(factory, prompt, [turn, turn, *script[:1]], deadline_s)


async def _episode(
    factory: Callable[[], Environment], prompt: Prompt, turns: Sequence[Turn], deadline_s: float
) -> list[Observation | StepResult]:
    """Play the turns until the environment is done; what it returned, in order."""
    environment = factory()
    observation = await served("reset", environment.reset(prompt), deadline_s)
    _check_observation(observation, "reset")
    seen: list[Observation | StepResult] = [observation]
    for turn in turns:
        what = f"step {len(seen)} on the turn {_brief(turn.text)}"
        result = await served(what, environment.step(turn), deadline_s)
        _check_step(result, what)
        seen.append(result)
        if result.done:
            break
    await served("close", environment.close(), deadline_s)
    await served("a second close", environment.close(), deadline_s)
    return seen


async def _check_resume(
    factory: Callable[[], Environment],
    prompt: Prompt,
    turns: Sequence[Turn],
    whole: Sequence[Observation | StepResult],
    deadline_s: float,
) -> None:
    """After every step of an episode, another instance must go on from a snapshot as the first one did."""
    for cut in range(len(whole)):
        first, second = factory(), factory()
        assert isinstance(first, ResumableEnvironment) and isinstance(second, ResumableEnvironment)
        await served("reset", first.reset(prompt), deadline_s)
        for turn in turns[:cut]:
            await served("step", first.step(turn), deadline_s)
        state = first.snapshot()
        _require_json(state, f"snapshot after {cut} steps")
        await served("close", first.close(), deadline_s)
        await served("restore", second.restore(prompt, json.loads(json.dumps(state))), deadline_s)
        for position, turn in enumerate(turns[cut : len(whole) - 1], cut + 1):
            result = await served(f"step {position}", second.step(turn), deadline_s)
            require(
                result == whole[position],
                f"restored after {cut} steps, step {position} gave {_brief(result)}, not {_brief(whole[position])}",
            )
        await served("close", second.close(), deadline_s)


def _check_observation(observation: Any, what: str) -> None:
    kind = type(observation).__name__
    require(isinstance(observation, Observation), f"{what} must return an Observation, got {kind}")
    require(observation.messages, f"{what}: the observation has no messages")
    roles = ("system", "user", "assistant", "tool")
    _check_messages(observation.messages, roles, what)
    require(isinstance(observation.tools, tuple), f"{what}: tools must be a tuple of JSON schemas")
    for tool in observation.tools:
        _require_json(tool, f"{what}: a tool")
        function = tool.get("function")
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        require(named, f"{what}: a tool must be {{'type': 'function', 'function': {{'name': ...}}}}")
    key = observation.observation_key
    require(key is None or isinstance(key, str), f"{what}: observation_key must be a string or None, got {key!r}")


def _check_step(result: Any, what: str) -> None:
    require(isinstance(result, StepResult), f"{what} must return a StepResult, got {type(result).__name__}")
    require(
        result.error is None,
        f"{what}: error={result.error!r} reports an infrastructure failure; answer the model with a message",
    )
    require_int(result.num_tool_calls, f"{what}: num_tool_calls")
    require_int(result.num_tool_failures, f"{what}: num_tool_failures")
    require_int(result.num_invalid_actions, f"{what}: num_invalid_actions")
    number = isinstance(result.reward, (int, float)) and result.reward == result.reward
    finite = number and abs(result.reward) != float("inf")
    require(finite, f"{what}: reward must be a finite number, got {result.reward!r}")
    ways = [bool(result.done), bool(result.messages), result.observation is not None]
    require(any(ways), f"{what}: the step is not done and has neither messages nor an observation")
    require(not (result.messages and result.observation), f"{what}: messages and an observation exclude each other")
    require(result.done or not result.void, f"{what}: void goes with done")
    require(isinstance(result.success, bool), f"{what}: success must be true or false, got {result.success!r}")
    require(result.done or not result.success, f"{what}: success goes with done")
    require(
        not (result.num_tool_calls and result.num_invalid_actions),
        f"{what}: a turn of which a call was run is not an invalid action",
    )
    require(not (result.success and result.void), f"{what}: success and void exclude each other")
    _check_messages(result.messages, ("tool", "user"), what)
    if result.observation is not None:
        _check_observation(result.observation, what)


def _check_messages(messages: Any, roles: Sequence[str], what: str) -> None:
    require(isinstance(messages, tuple), f"{what}: messages must be a tuple, got {type(messages).__name__}")
    for message in messages:
        _require_json(message, f"{what}: a message")
        role = message.get("role")
        require(role in roles, f"{what}: a message's role must be one of {roles}, got {role!r}")
        require(isinstance(message.get("content"), str), f"{what}: a message's content must be a string")


def _require_json(value: Any, what: str) -> None:
    require(isinstance(value, Mapping), f"{what} must be a dictionary, got {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        require(False, f"{what} must be JSON in valid Unicode: {error}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
