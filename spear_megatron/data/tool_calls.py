"""Reading ``<tool_call>{json}</tool_call>`` out of a model turn. Whatever the model wrote gives a typed result."""

from __future__ import annotations

import json
from typing import Any

from spear_megatron.environments.protocol import ToolCall, Turn

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"
MAX_CALL_CHARS = 65_536
MAX_CALLS = 32


def parse_turn(text: str, *, finished: bool) -> Turn:
    """The turn with every tool call found in ``text``; never raises.

    ``finished`` is False when a length limit cut the turn.
    """
    return Turn(text=text, tool_calls=parse_tool_calls(text), finished=finished)


def parse_tool_calls(text: str) -> tuple[ToolCall, ...]:
    """Calls in the order in which they stand; one that cannot be used has ``error`` set.

    A closing tag inside a JSON string does not end the call. Text around calls, and closing tags without an opening
    one, are ignored. At most ``MAX_CALLS`` calls of ``MAX_CALL_CHARS`` characters are read: what follows is one error.
    """
    calls: list[ToolCall] = []
    start = text.find(OPEN_TAG)
    while start >= 0:
        if len(calls) == MAX_CALLS:
            calls.append(_failed(text[start:], f"more than {MAX_CALLS} tool calls in one turn"))
            break
        call, end = _read_call(text, start + len(OPEN_TAG))
        calls.append(call)
        start = text.find(OPEN_TAG, end)
    return tuple(calls)


def _read_call(text: str, start: int) -> tuple[ToolCall, int]:
    """The call whose opening tag ends at ``start``, and where to go on reading."""
    window = text[start : start + MAX_CALL_CHARS]
    body = window.lstrip()
    try:
        value, length = _DECODER.raw_decode(body)
    except (ValueError, RecursionError) as error:
        return _malformed(text, start, f"the tool call is not valid JSON ({_reason(error)})")
    end = start + len(window) - len(body) + length
    stop = _skip_space(text, end)
    if not text.startswith(CLOSE_TAG, stop):
        return _malformed(text, start, f"the JSON object must be followed by {CLOSE_TAG}")
    return _checked(value, text[start:stop].strip()), stop + len(CLOSE_TAG)


def _malformed(text: str, start: int, reason: str) -> tuple[ToolCall, int]:
    close = text.find(CLOSE_TAG, start)
    if close < 0:
        return _failed(text[start:], f"the tool call is not closed with {CLOSE_TAG}"), len(text)
    if close - start > MAX_CALL_CHARS:
        reason = f"the tool call is longer than {MAX_CALL_CHARS} characters"
    return _failed(text[start:close], reason), close + len(CLOSE_TAG)


def _checked(value: Any, raw: str) -> ToolCall:
    """A call from decoded JSON: an object with a ``name`` and ``arguments``, an object or JSON text of one."""
    if not isinstance(value, dict):
        return _failed(raw, "the tool call must be a JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return _failed(raw, "the tool call has no name")
    if "arguments" not in value:
        return _failed(raw, "the tool call has no arguments", name)
    arguments = value["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return _failed(raw, f"the arguments are not valid JSON ({_reason(error)})", name)
    if not isinstance(arguments, dict):
        return _failed(raw, "the arguments must be a JSON object", name)
    try:
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return _failed(raw, "the tool call contains characters that are not valid text")
    return ToolCall(name=name, arguments=arguments, raw=raw)


def _failed(raw: str, error: str, name: str = "") -> ToolCall:
    return ToolCall(name=name, arguments={}, raw=raw.strip()[:MAX_CALL_CHARS], error=error)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else "a value is out of range"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)
