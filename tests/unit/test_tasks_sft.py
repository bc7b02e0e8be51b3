"""Supervised conversations: the cold start and files of messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripted import tiny_renderer
from spear_megatron.data.generator import LEVELS, GeneratorConfig, generate_problems
from spear_megatron.data.sft import (
    Conversation,
    cold_start_conversations,
    encode_conversations,
    load_conversations,
)
from spear_megatron.environments.code_interpreter import TOOL_SCHEMA

CONFIG = GeneratorConfig(levels=LEVELS, num_train=500)


def wrongs(conversations: list[Conversation]) -> tuple[int, int]:
    """How many demonstrations run a wrong program, and how many copy the output wrongly."""
    problems = {problem.id: problem for problem in generate_problems(CONFIG, "train")}
    programs = copies = 0
    for conversation in conversations:
        problem = problems[conversation.origin]
        _, call, response, answer = conversation.messages
        code = call["tool_calls"][0]["function"]["arguments"]["code"]
        right = code == problem.program
        assert right or code == problem.wrong_program
        assert response["content"] == str(problem.answer if right else problem.wrong_answer)
        programs += not right
        copies += answer["content"] != f"\\boxed{{{response['content']}}}"
    return programs, copies


def test_cold_start_without_errors_is_right() -> None:
    conversations = cold_start_conversations(CONFIG, count=300, error_rate=0.0, seed=0, instruction=" Go.")
    assert wrongs(conversations) == (0, 0)
    assert conversations[0].messages[0]["content"].endswith(" Go.")


def test_cold_start_errors_come_at_the_rate_asked_for() -> None:
    programs, copies = wrongs(cold_start_conversations(CONFIG, count=500, error_rate=0.5, seed=0))
    assert 210 < programs < 290 and copies == 0, "the program misreads the task; its output is copied as it is"
    assert sum(wrongs(cold_start_conversations(CONFIG, count=500, error_rate=1.0, seed=0))) == 500


def made_calls(conversation: Conversation) -> list[str]:
    turns = [message for message in conversation.messages if message.get("tool_calls")]
    return [turn["tool_calls"][0]["function"]["arguments"]["code"] for turn in turns]


def test_tool_rate_is_the_chance_of_each_next_call() -> None:
    config = GeneratorConfig(levels=(7,), num_train=2000)
    problems = generate_problems(config, "train")
    conversations = cold_start_conversations(config, count=2000, error_rate=0.0, seed=0, tool_rate=0.5)
    counts = [0] * 4
    for problem, conversation in zip(problems, conversations, strict=True):
        programs = made_calls(conversation)
        counts[len(programs)] += 1
        assert programs == [call.program for call in problem.calls()][: len(programs)]
        boxed = problem.calls()[len(programs) - 1].printed if programs else problem.first_guess
        assert conversation.messages[-1]["content"] == f"\\boxed{{{boxed}}}"
        assert (boxed == problem.answer) == (len(programs) == 3), "who stops early is wrong"
    expected = [1000, 500, 250, 250]
    assert all(abs(count - mean) < 5 * mean**0.5 for count, mean in zip(counts, expected))


def test_errors_of_chains_misread_one_operation_and_go_on_from_there() -> None:
    config = GeneratorConfig(levels=(7,), num_train=300)
    problems = generate_problems(config, "train")
    positions = set()
    for problem, conversation in zip(problems, cold_start_conversations(config, count=300, error_rate=1.0, seed=0)):
        slips = [[call.program for call in problem.calls(slip)] for slip in range(3)]
        assert made_calls(conversation) in slips
        positions.add(slips.index(made_calls(conversation)))
    assert positions == {0, 1, 2}


def test_errors_do_not_depend_on_the_tool_rate() -> None:
    always = cold_start_conversations(CONFIG, count=200, error_rate=0.5, seed=0)
    often = cold_start_conversations(CONFIG, count=200, error_rate=0.5, seed=0, tool_rate=0.7)
    kept = [(a, b) for a, b in zip(always, often) if made_calls(b)]
    assert 100 < len(kept) < 180 and all(a == b for a, b in kept)
    never = cold_start_conversations(CONFIG, count=50, error_rate=0.5, seed=0, tool_rate=0.0)
    assert not any(made_calls(conversation) for conversation in never)


def test_cold_start_follows_the_seed() -> None:
    def make(seed: int) -> list[Conversation]:
        return cold_start_conversations(CONFIG, count=50, error_rate=0.5, seed=seed)

    assert make(1) == make(1) != make(2)


def test_cold_start_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="data.generator.num_train >= 501"):
        cold_start_conversations(CONFIG, count=501, error_rate=0.0, seed=0)
    with pytest.raises(ValueError, match="error_rate"):
        cold_start_conversations(CONFIG, count=5, error_rate=1.5, seed=0)
    with pytest.raises(ValueError, match="tool_rate"):
        cold_start_conversations(CONFIG, count=5, error_rate=0.0, seed=0, tool_rate=-0.1)


def test_examples_learn_the_call_and_the_answer_only() -> None:
    renderer = tiny_renderer()
    conversations = cold_start_conversations(CONFIG, count=5, error_rate=0.0, seed=0)
    examples = encode_conversations(conversations, renderer, max_length=200)
    for conversation, example in zip(conversations, examples, strict=True):
        assert example.ids.dtype == torch.int32 and example.loss_mask.dtype == torch.bool
        learned = renderer.decode(example.ids[example.loss_mask].tolist())
        code = json.dumps(conversation.messages[1]["tool_calls"][0]["function"]["arguments"]["code"])
        call = f'<tool_call>\n{{"name": "code_interpreter", "arguments": {{"code": {code}}}}}\n</tool_call><|im_end|>'
        assert learned == call + conversation.messages[3]["content"] + "<|im_end|>"


def test_files_of_messages(tmp_path: Path) -> None:
    call = {"name": "code_interpreter", "arguments": '{"code":"print(1)"}'}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "\\boxed{1}", "tool_calls": None},
        ],
        "tools": [TOOL_SCHEMA],
    }
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (conversation,) = load_conversations([str(path)])
    assert conversation.origin == f"{path}:1"
    (example,) = encode_conversations([conversation], tiny_renderer(), max_length=200)
    assert '"arguments": {"code": "print(1)"}' in tiny_renderer().decode(example.ids.tolist())
    with pytest.raises(ValueError, match=f"{path}:1: the conversation has {len(example.ids)} tokens, more than 20"):
        encode_conversations([conversation], tiny_renderer(), max_length=20)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "'messages' must be"),
        ({"messages": []}, "'messages' must be"),
        ({"messages": [USER, "x"]}, "message 1 must be an object with a role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 0 must be"),
        ({"messages": [{"role": "user"}]}, "'content' must be a string"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'content' must be a string"),
        ({"messages": [{**USER, "tool_calls": []}]}, "'tool_calls' must be a list on an assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "needs a function with a name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not valid JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "must be a JSON object"),
        ({"messages": [{**USER, "loss": "no"}]}, "'loss' must be true or false"),
        ({"messages": [{**USER, "reasoning_content": 3}]}, "'reasoning_content' must be a string"),
        ({"messages": [USER], "tools": [3]}, "'tools' must be a list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError) as failure:
        load_conversations([str(path)])
    assert str(failure.value).startswith(f"{path}:1") and message in str(failure.value)


def test_conversation_with_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="here: no assistant turn carries loss"):
        encode_conversations([Conversation((USER,), (), "here")], tiny_renderer(), max_length=50)
