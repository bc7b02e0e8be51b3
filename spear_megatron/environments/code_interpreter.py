"""Mathematics with a Python tool: the model calls ``code_interpreter`` and ends with ``\\boxed{answer}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spear_megatron.environments.protocol import Observation, StepResult, ToolCall, Turn
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, Sandbox
from spear_megatron.rewards.answers import last_boxed
from spear_megatron.types import Prompt

TOOL_NAME = "code_interpreter"
TOOL_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Runs a Python program in a fresh interpreter and returns what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program. Print the results you need."}},
            "required": ["code"],
        },
    },
}

_FENCE = re.compile(
    r"(?:\A\s*```(?:python|py)?|^[ \t]*```(?:python|py))[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE
)
_FAILURES = {
    ExecutionStatus.TIMEOUT: "Error: the program ran out of time.",
    ExecutionStatus.MEMORY: "Error: the program ran out of memory.",
    ExecutionStatus.OUTPUT_LIMIT: "Error: the program printed too much.",
    ExecutionStatus.KILLED: "Error: the program was killed.",
}


class CodeInterpreterEnvironment:
    """One episode of a problem with the tool. The sandbox is shared between episodes and stays open.

    Every call of a turn is answered by one tool message: output, or an error text. ``num_tool_calls`` counts calls that
    were run, ``num_tool_failures`` everything answered by an error: malformed calls, failed programs. A turn of which
    no call could be run is an invalid action.
    """

    needs_sandbox = True

    def __init__(self, *, sandbox: Sandbox, max_calls_per_turn: int = 4, num_stderr_lines: int = 2) -> None:
        """At most ``max_calls_per_turn`` programs run per turn; errors show the last ``num_stderr_lines`` lines."""
        for key, value in (("max_calls_per_turn", max_calls_per_turn), ("num_stderr_lines", num_stderr_lines)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"env.kwargs.{key} must be an integer of at least 1, got {value!r}")
        self._sandbox = sandbox
        self._max_calls_per_turn = max_calls_per_turn
        self._num_stderr_lines = num_stderr_lines

    @staticmethod
    def opening(prompt: Prompt) -> Observation:
        """The prompt's own messages, with the tool."""
        return Observation(messages=prompt.messages, tools=(TOOL_SCHEMA,))

    async def reset(self, prompt: Prompt) -> Observation:
        """Begin with :meth:`opening`."""
        return self.opening(prompt)

    async def step(self, turn: Turn) -> StepResult:
        """Run the turn's calls; a turn without calls ends the episode, void if it has no ``\\boxed{}`` either."""
        if not turn.tool_calls:
            return StepResult(done=True, void=last_boxed(turn.text) is None)
        messages: list[dict[str, Any]] = []
        num_calls = num_failures = 0
        for position, call in enumerate(turn.tool_calls):
            code, problem = _program_of(call)
            if problem is None and position >= self._max_calls_per_turn:
                problem = f"at most {self._max_calls_per_turn} calls are run per turn"
            if problem is not None:
                text, failed = f"Error: {problem}.", True
            else:
                result = await self._sandbox.run(code)
                if result.status is ExecutionStatus.INFRASTRUCTURE:
                    return StepResult(
                        done=True,
                        num_tool_calls=num_calls,
                        num_tool_failures=num_failures,
                        error=f"sandbox: {result.detail}",
                    )
                num_calls += 1
                text, failed = format_result(result, self._num_stderr_lines), result.status is not ExecutionStatus.OK
            num_failures += failed
            messages.append({"role": "tool", "name": TOOL_NAME, "content": text})
        return StepResult(
            messages=tuple(messages),
            num_tool_calls=num_calls,
            num_tool_failures=num_failures,
            num_invalid_actions=int(num_calls == 0),
        )

    def snapshot(self) -> Mapping[str, Any]:
        """Nothing: every program runs in a process of its own, and no later one sees what it left."""
        return {}

    async def restore(self, prompt: Prompt, state: Mapping[str, Any]) -> None:
        """Nothing to restore, see :meth:`snapshot`."""

    async def close(self) -> None:
        """Nothing to free: the sandbox belongs to whoever started it."""


def format_result(result: ExecutionResult, num_stderr_lines: int) -> str:
    """What the model reads: the output, or why there is none. Never a time or a path of this machine."""
    if result.status is ExecutionStatus.OK:
        return format_output(result.stdout)
    if result.status is not ExecutionStatus.ERROR:
        return _FAILURES[result.status]
    lines = [line.rstrip() for line in result.stderr.splitlines() if line.strip()]
    return "\n".join(lines[-num_stderr_lines:]) or "Error: the program failed without a message."


def format_output(stdout: str) -> str:
    """Standard output of a successful program as the model reads it."""
    return stdout.strip("\n") or "(The program printed nothing.)"


def unwrap_code(code: str) -> str:
    """The first fenced block of Python in ``code``, or ``code`` itself if it has none."""
    fenced = _FENCE.search(code)
    return fenced[1] if fenced else code


def _program_of(call: ToolCall) -> tuple[str, str | None]:
    """The program to run, or what is wrong with the call."""
    if call.error is not None:
        return "", call.error
    if call.name != TOOL_NAME:
        return "", f"there is no tool named {call.name[:64]!r}, use {TOOL_NAME}"
    code = call.arguments.get("code")
    if not isinstance(code, str):
        return "", "the argument 'code' must be a string"
    return unwrap_code(code), None
