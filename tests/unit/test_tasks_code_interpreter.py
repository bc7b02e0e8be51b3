"""The code interpreter environment: what the model reads back, and what counts as a failure."""

from __future__ import annotations

import asyncio
import json

import pytest
from spear_megatron.data.tool_calls import parse_turn
from spear_megatron.environments.code_interpreter import TOOL_SCHEMA, CodeInterpreterEnvironment, unwrap_code
from spear_megatron.environments.protocol import StepResult
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, infrastructure
from spear_megatron.types import Prompt


class FakeSandbox:
    def __init__(self, *results: ExecutionResult) -> None:
        self.results = list(results)
        self.codes: list[str] = []

    async def run(self, code: str) -> ExecutionResult:
        self.codes.append(code)
        return self.results[min(len(self.codes), len(self.results)) - 1]

    async def close(self) -> None: ...


def ok(stdout: str) -> ExecutionResult:
    return ExecutionResult(status=ExecutionStatus.OK, stdout=stdout)


def tagged(value: object) -> str:
    return f"<tool_call>{json.dumps(value)}</tool_call>"


def call(code: object) -> str:
    return tagged({"name": "code_interpreter", "arguments": {"code": code}})


def step(text: str, *results: ExecutionResult, **kwargs: int) -> tuple[StepResult, FakeSandbox]:
    sandbox = FakeSandbox(*(results or (ok("1\n"),)))
    environment = CodeInterpreterEnvironment(sandbox=sandbox, **kwargs)
    return asyncio.run(environment.step(parse_turn(text, finished=True))), sandbox


def test_reset_gives_the_prompt_and_the_tool() -> None:
    prompt = Prompt("p", ({"role": "user", "content": "q"},))
    observation = asyncio.run(CodeInterpreterEnvironment(sandbox=FakeSandbox()).reset(prompt))
    assert observation.messages == prompt.messages and observation.tools == (TOOL_SCHEMA,)


@pytest.mark.parametrize(
    ("result", "text", "failed"),
    [
        (ok("91\n"), "91", False),
        (ok("\n 1\n2\n\n"), " 1\n2", False),
        (ok(""), "(The program printed nothing.)", False),
        (ExecutionResult(status=ExecutionStatus.OK, stdout="1\n", stderr="warning"), "1", False),
        (
            ExecutionResult(status=ExecutionStatus.ERROR, stdout="1", stderr="Trace:\n  x\n\nNameError: y\n"),
            "  x\nNameError: y",
            True,
        ),
        (ExecutionResult(status=ExecutionStatus.ERROR), "Error: the program failed without a message.", True),
        (ExecutionResult(status=ExecutionStatus.TIMEOUT, stdout="1"), "Error: the program ran out of time.", True),
        (ExecutionResult(status=ExecutionStatus.MEMORY), "Error: the program ran out of memory.", True),
        (ExecutionResult(status=ExecutionStatus.OUTPUT_LIMIT), "Error: the program printed too much.", True),
        (ExecutionResult(status=ExecutionStatus.KILLED), "Error: the program was killed.", True),
    ],
)
def test_what_the_model_reads(result: ExecutionResult, text: str, failed: bool) -> None:
    answer, sandbox = step(call("print(1)"), result)
    assert answer.messages == ({"role": "tool", "name": "code_interpreter", "content": text},)
    assert (answer.num_tool_calls, answer.num_tool_failures, answer.done) == (1, int(failed), False)
    assert sandbox.codes == ["print(1)"]


def test_every_status_of_the_sandbox_is_handled() -> None:
    for status in ExecutionStatus:
        answer, _ = step(call("1"), ExecutionResult(status=status, detail="gone"))
        assert (answer.error == "sandbox: gone") == (status is ExecutionStatus.INFRASTRUCTURE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>{</tool_call>", "not valid JSON"),
        (tagged({"name": "calc", "arguments": {"code": "1"}}), "there is no tool named 'calc', use code_interpreter"),
        (tagged({"name": "code_interpreter", "arguments": {}}), "'code' must be a string"),
        (call(3), "'code' must be a string"),
    ],
)
def test_bad_calls_are_answered_and_counted(text: str, message: str) -> None:
    answer, sandbox = step(text)
    assert message in answer.messages[0]["content"] and answer.messages[0]["content"].startswith("Error: ")
    assert (answer.num_tool_calls, answer.num_tool_failures) == (0, 1)
    assert not sandbox.codes and not answer.done and answer.error is None


def test_several_calls_are_answered_in_order_up_to_the_limit() -> None:
    answer, sandbox = step(call("a") + tagged(3) + call("b") + call("c"), ok("A"), ok("B"), max_calls_per_turn=3)
    contents = [message["content"] for message in answer.messages]
    assert [contents[0], contents[2]] == ["A", "B"] and "JSON object" in contents[1]
    assert contents[3] == "Error: at most 3 calls are run per turn."
    assert sandbox.codes == ["a", "b"] and (answer.num_tool_calls, answer.num_tool_failures) == (2, 2)


def test_infrastructure_stops_the_turn() -> None:
    answer, sandbox = step(call("a") + call("b") + call("c"), ok("A"), infrastructure("server gone"))
    assert answer.error == "sandbox: server gone" and sandbox.codes == ["a", "b"]


@pytest.mark.parametrize(("text", "void"), [(r"\boxed{1}", False), (r"\boxed{", True), ("", True), ("hm", True)])
def test_turn_without_calls_ends_the_episode(text: str, void: bool) -> None:
    answer, _ = step(text)
    assert (answer.done, answer.void, answer.num_tool_calls) == (True, void, 0)


@pytest.mark.parametrize(
    ("code", "program"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("Here:\n```python\nprint(1)\n```\nDone.\n```python\n2\n```", "print(1)\n"),
        ("```python\nprint(1)", "print(1)"),
        ('print("""\n```\nx\n```\n""")', 'print("""\n```\nx\n```\n""")'),
    ],
)
def test_fences_are_unwrapped(code: str, program: str) -> None:
    assert unwrap_code(code) == program
    _, sandbox = step(call(code))
    assert sandbox.codes == [program]
