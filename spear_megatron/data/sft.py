"""Conversations for supervised training: the built-in cold start, and JSONL files of ``messages``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from spear_megatron.data.chains import Call
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.generator import GeneratorConfig, Problem, generate_problems
from spear_megatron.data.jsonl import read_jsonl
from spear_megatron.environments.code_interpreter import TOOL_NAME, TOOL_SCHEMA, format_output
from spear_megatron.parallel.seeds import derive_key

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools of one demonstration; ``origin`` names it in errors."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    origin: str


@dataclass(frozen=True, slots=True)
class SftExample:
    """One conversation as tokens: ``ids`` int32 [n], ``loss_mask`` bool [n], True on what is to be learned."""

    ids: torch.Tensor
    loss_mask: torch.Tensor


def cold_start_conversations(
    config: GeneratorConfig,
    *,
    count: int,
    error_rate: float,
    seed: int,
    instruction: str = "",
    tool_rate: float = 1.0,
) -> list[Conversation]:
    """Demonstrations of the tool on the first ``count`` training problems: call, tool response, boxed answer.

    Args:
        error_rate: share that runs a program that misreads the operation, so that the imitator leaves something to
            learn: it uses the tool well, but not always for what was asked.
        tool_rate: probability with which each next call that the problem needs is made; without it the conversation
            ends there with a wrong guess. The imitator of a low rate seldom uses the tool to the end: a problem of k
            calls is solved by tool_rate ** k of the demonstrations.

    Raises:
        ValueError: ``count`` exceeds ``data.generator.num_train``, or a rate is not a share.
    """
    for name, rate in (("error_rate", error_rate), ("tool_rate", tool_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {rate}")
    problems = generate_problems(config, "train")
    if not 1 <= count <= len(problems):
        raise ValueError(f"sft.num_examples={count} needs data.generator.num_train >= {count} (and >= 1)")
    errors = Random(derive_key(seed, "sft/cold_start"))
    stops = Random(derive_key(seed, "sft/cold_start/stops"))  # of its own: the errors do not depend on the tool_rate
    conversations = []
    for problem in problems[:count]:
        slip = None
        if errors.random() < error_rate:
            slip = 0 if problem.chain is None else errors.randrange(len(problem.chain.operations))
        calls = list(itertools.takewhile(lambda _: stops.random() < tool_rate, problem.calls(slip)))
        conversations.append(_demonstration(problem, calls, instruction))
    return conversations


def _demonstration(problem: Problem, calls: Sequence[Call], instruction: str) -> Conversation:
    """The calls, each with its response, then the last number printed as the answer."""
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": problem.text + instruction}]
    answer = problem.first_guess
    for program, answer in calls:
        call = {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": program}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": TOOL_NAME, "content": format_output(f"{answer}\n")})
    messages.append({"role": "assistant", "content": f"\\boxed{{{answer}}}"})
    return Conversation(messages=tuple(messages), tools=(TOOL_SCHEMA,), origin=problem.id)


def load_conversations(files: Sequence[str]) -> list[Conversation]:
    """Conversations of JSONL files, rows of ``messages`` and optionally ``tools``.

    Arguments of tool calls may be objects or JSON text; they are rendered as objects. A message may carry
    ``"loss": false``.

    Raises:
        ValueError: a row is not usable, named by file and line, or there are none.
    """
    found = [_conversation_of_row(row, where) for path in files for where, row in read_jsonl(path)]
    if not found:
        raise ValueError(f"the files hold no conversations: {', '.join(files)}")
    return found


def encode_conversations(
    conversations: Sequence[Conversation], renderer: ChatRenderer, *, max_length: int
) -> list[SftExample]:
    """Tokens and loss masks of all conversations, in order.

    Raises:
        ValueError: one does not render, is longer than ``max_length`` tokens, or has nothing to learn.
    """
    examples = []
    for conversation in conversations:
        try:
            ids, mask = renderer.conversation(conversation.messages, conversation.tools)
        except ValueError as error:
            raise ValueError(f"{conversation.origin}: {error}") from error
        if len(ids) > max_length:
            raise ValueError(
                f"{conversation.origin}: the conversation has {len(ids)} tokens, more than {max_length}: "
                "raise data.max_response_length or remove it"
            )
        if not any(mask):
            raise ValueError(f"{conversation.origin}: no assistant turn carries loss")
        examples.append(SftExample(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)))
    return examples


def _conversation_of_row(row: Mapping[str, Any], where: str) -> Conversation:
    messages, tools = row.get("messages"), row.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a non-empty list")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: 'tools' must be a list of JSON schemas")
    checked = tuple(_checked_message(message, f"{where}: message {i}") for i, message in enumerate(messages))
    return Conversation(messages=checked, tools=tuple(tools), origin=where)


def _checked_message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"{where} must be an object with a role of {', '.join(_ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or message["role"] != "assistant"):
        raise ValueError(f"{where}: 'tool_calls' must be a list on an assistant message")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"{where}: 'content' must be a string")
    if not isinstance(message.get("reasoning_content", ""), (str, type(None))):
        raise ValueError(f"{where}: 'reasoning_content' must be a string")
    if not isinstance(message.get("loss", True), bool):
        raise ValueError(f"{where}: 'loss' must be true or false")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, "tool_calls": [_checked_call(call, where) for call in calls]}


def _checked_call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: the arguments of {function['name']!r} are not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments of {function['name']!r} must be a JSON object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
