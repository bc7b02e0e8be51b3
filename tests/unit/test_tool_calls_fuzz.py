"""Reading tool calls out of whatever a model may write."""

from __future__ import annotations

import json
import random
import time

import pytest
from spear_megatron.data.tool_calls import MAX_CALL_CHARS, MAX_CALLS, parse_tool_calls, parse_turn
from spear_megatron.environments.protocol import ToolCall

GOOD = {"name": "code_interpreter", "arguments": {"code": "print(1)"}}


def tagged(value: object, **kwargs: object) -> str:
    return f"<tool_call>\n{json.dumps(value, **kwargs)}\n</tool_call>"


def only(text: str) -> ToolCall:
    calls = parse_tool_calls(text)
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize(
    "text",
    [
        tagged(GOOD),
        "Let me compute.\n" + tagged(GOOD) + "\nDone.",
        tagged(GOOD, separators=(",", ":")).replace("\n", ""),
        tagged(GOOD, indent=4),
        tagged({**GOOD, "arguments": json.dumps(GOOD["arguments"])}),
        tagged({"arguments": GOOD["arguments"], "id": 7, "name": "code_interpreter"}),
        "</tool_call>" + tagged(GOOD),
    ],
)
def test_usable_calls(text: str) -> None:
    call = only(text)
    assert (call.name, call.arguments, call.error) == ("code_interpreter", {"code": "print(1)"}, None)


def test_tags_inside_strings_do_not_end_the_call() -> None:
    code = 'print("</tool_call> <tool_call>")'
    assert only(tagged({"name": "f", "arguments": {"code": code}})).arguments == {"code": code}


def test_raw_line_breaks_in_strings_are_accepted() -> None:
    assert only('<tool_call>{"name": "f", "arguments": {"code": "a\nb"}}</tool_call>').arguments == {"code": "a\nb"}


def test_several_calls_keep_their_order_and_fail_alone() -> None:
    first, last = (tagged({"name": name, "arguments": {}}) for name in "ab")
    calls = parse_tool_calls(first + "<tool_call>{oops}</tool_call>" + last)
    assert [(call.name, call.error is None) for call in calls] == [("a", True), ("", False), ("b", True)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>", "not closed"),
        (tagged(GOOD).removesuffix("</tool_call>"), "not closed"),
        ("<tool_call></tool_call>", "not valid JSON"),
        ("<tool_call>{'name': 'f'}</tool_call>", "not valid JSON"),
        ("<tool_call><tool_call>" + json.dumps(GOOD) + "</tool_call></tool_call>", "not valid JSON"),
        ("<tool_call>" + json.dumps(GOOD) + " trailing</tool_call>", "followed by"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 50_000 + "</tool_call>", "nested too deeply"),
        (tagged([GOOD]), "must be a JSON object"),
        (tagged({"arguments": {}}), "no name"),
        (tagged({"name": 3, "arguments": {}}), "no name"),
        (tagged({"name": "f"}), "no arguments"),
        (tagged({"name": "f", "arguments": [1]}), "must be a JSON object"),
        (tagged({"name": "f", "arguments": "{"}), "arguments are not valid JSON"),
        (tagged({"name": "f", "arguments": "3"}), "must be a JSON object"),
        (tagged({"name": "f", "arguments": {"code": "\ud800"}}), "not valid text"),
        (tagged({"name": "f", "arguments": {"code": "x" * MAX_CALL_CHARS}}), "longer than"),
    ],
)
def test_unusable_calls_are_data(text: str, message: str) -> None:
    call = only(text)
    assert call.error is not None and message in call.error
    assert len(call.raw) <= MAX_CALL_CHARS


def test_text_without_calls() -> None:
    turn = parse_turn("The answer is \\boxed{4}. </tool_call> <tool_calls>", finished=False)
    assert turn.tool_calls == () and not turn.finished


def test_number_of_calls_is_bounded() -> None:
    calls = parse_tool_calls(tagged(GOOD) * (MAX_CALLS + 10))
    assert len(calls) == MAX_CALLS + 1
    assert [call.error is None for call in calls] == [True] * MAX_CALLS + [False]


@pytest.mark.parametrize(
    "piece", ["<tool_call>", '<tool_call>{"a": "', "<tool_call>[[", "</tool_call>", "<tool_call>{}</tool_call>"]
)
def test_huge_inputs_are_read_in_bounded_time(piece: str) -> None:
    start = time.perf_counter()
    calls = parse_tool_calls(piece * (2_000_000 // len(piece)))
    assert len(calls) <= MAX_CALLS + 1
    assert time.perf_counter() - start < 5


def test_ten_thousand_damaged_calls_give_typed_results() -> None:
    """Random cuts, repeats and replacements of a good turn: always calls whose fields have their types."""
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "{", "}", '"', ":", ",", "\\", "\n", "null", "1e999", "\\ud83d", "name",
              "arguments", "[", "]", "\x00", "é", "数", "-", "true", "<|im_end|>"]
    source = "Hm.\n" + tagged(GOOD) + tagged({"name": "f", "arguments": '{"code": "x"}'})
    num_failed = 0
    for _ in range(10_000):
        text = source
        for _ in range(rng.randrange(1, 6)):
            position, length = rng.randrange(len(text) + 1), rng.randrange(4)
            text = text[:position] + rng.choice(pieces) * rng.randrange(3) + text[position + length :]
        for call in parse_tool_calls(text):
            assert isinstance(call, ToolCall) and isinstance(call.name, str) and isinstance(call.arguments, dict)
            assert call.error is None or call.error.strip()
            assert call.error is not None or call.name
            json.dumps(call.arguments, ensure_ascii=False).encode()
            num_failed += call.error is not None
    assert num_failed > 1000
