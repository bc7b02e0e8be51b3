"""Rows of published data sets in this repository's form: problems with an answer, conversations with tool calls.

Two kinds of trouble are told apart. A row of another structure (a missing key, a number for a text) means that the file
is not the data set: an error that names file, row and key. A row of the right structure whose content is of no use is
left out, with a reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spear_megatron.environments.code_interpreter import TOOL_NAME, TOOL_SCHEMA, format_output, unwrap_code
from spear_megatron.rewards.answers import canonical_integer, last_boxed

_QUESTION = "*user question:*"
_BLOCK = re.compile(r"<(code|interpreter|answer)>(.*?)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:code|interpreter|answer)>")
_LARGEST_AIME = 999


class Unusable(Exception):
    """The row is left out; the text is the reason, a short name to count by."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One row: ``key`` is equal for copies of it, ``content`` what copies must agree in, ``row`` what is written."""

    key: str
    content: str
    row: Mapping[str, Any]


Convert = Callable[[Mapping[str, Any], str], Converted]
"""(row, where it stands) -> converted. Raises ValueError for another structure, Unusable for a row of no use."""


def problem_converter(dataset: str, *, aime: bool) -> Convert:
    """Rows of ``problem`` and ``answer``, or of verl's ``prompt`` and ``reward_model.ground_truth``, as task rows.

    Published copies also have ``Problem`` and ``Answer``, or ``label`` for the answer.

    The id follows from the problem's text alone, so it is the same whatever file the problem came from. Integers are
    written plainly (``033`` as ``33``), other answers without surrounding space. With ``aime`` an answer must be an
    integer from 0 to 999.
    """

    def convert(row: Mapping[str, Any], where: str) -> Converted:
        problem, answer = _problem(row, where), _answer(row, where)
        if aime and not (answer.isdecimal() and int(answer) <= _LARGEST_AIME):
            raise ValueError(f"{where}: the answer of an AIME problem is an integer from 0 to 999, got {answer!r}")
        key = " ".join(problem.split())
        return Converted(key, answer, {"id": f"{dataset}-{_digest(key)}", "problem": problem, "answer": answer})

    return convert


def convert_retool(row: Mapping[str, Any], where: str) -> Converted:
    """A row of ReTool-SFT (arXiv 2504.11536) as a conversation: question, calls with their outputs, answer.

    There one assistant text holds everything: reasoning, ``<code>`` blocks each followed by its ``<interpreter>``
    output, and an ``<answer>``. Here each block of code is a tool call with the reasoning before it as the turn's text,
    the output a tool message, and the text around and inside the answer the last turn.

    Raises:
        ValueError: ``messages`` is not a question and a solution.
        Unusable: the texts do not have that form.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: 'messages' must be a list of a question and a solution, got {_shown(messages)}")
    if len(messages) > 2:
        raise Unusable("more than one exchange")
    texts = [
        _text(message, "content", f"{where}: message {position}", role)
        for position, (message, role) in enumerate(zip(messages, ("user", "assistant")))
    ]
    _, marker, question = texts[0].partition(_QUESTION)
    question = re.sub(r"</?answer>", "", question).strip()
    if not marker or not question:
        raise Unusable("no question")
    turns = [{"role": "user", "content": question}, *_turns(texts[1])]
    key = "\n".join(text.strip() for text in texts)
    return Converted(key, "", {"id": f"retool-sft-{_digest(key)}", "messages": turns, "tools": [TOOL_SCHEMA]})


def _turns(solution: str) -> list[dict[str, Any]]:
    """Assistant and tool messages of a solution. Raises Unusable."""
    turns: list[dict[str, Any]] = []
    position, before = 0, ""
    for block in _BLOCK.finditer(solution):
        text, kind = solution[position : block.start()].strip(), block[1]
        position = block.end()
        if before == "answer":
            raise Unusable("text after the answer")
        if _TAG.search(text) is not None or _TAG.search(block[2]) is not None:
            raise Unusable("unbalanced tags")
        if (kind == "interpreter") != (before == "code"):
            raise Unusable("code and output do not alternate")
        if kind == "interpreter":
            if text:
                raise Unusable("text between code and output")
            turns.append({"role": "tool", "name": TOOL_NAME, "content": format_output(block[2].strip())})
        else:
            turns.append(_call(text, block[2]) if kind == "code" else _final(text, block[2]))
        before = kind
    rest = solution[position:].strip()
    if before != "answer":
        raise Unusable("unbalanced tags" if _TAG.search(rest) is not None else "no answer")
    if rest:
        raise Unusable("text after the answer")
    return turns


def _call(text: str, code: str) -> dict[str, Any]:
    program = unwrap_code(code.strip()).strip()
    if not program:
        raise Unusable("empty program")
    call = {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": program}}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def _final(text: str, answer: str) -> dict[str, Any]:
    content = f"{text}\n\n{answer.strip()}".strip()
    if last_boxed(content) is None:
        raise Unusable("no boxed answer")
    return {"role": "assistant", "content": content}


def _problem(row: Mapping[str, Any], where: str) -> str:
    for key in ("problem", "Problem"):
        if key in row:
            return _text(row, key, where)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise ValueError(f"{where}: 'prompt' must be one message of the user, got {len(prompt)} messages")
        return _text(prompt[0], "content", f"{where}: 'prompt'", "user")
    if prompt is None:
        raise ValueError(f"{where}: the row has neither 'problem' nor 'prompt', but {_names(row)}")
    return _text(row, "prompt", where)


def _answer(row: Mapping[str, Any], where: str) -> str:
    key = next((key for key in ("answer", "Answer", "label") if key in row), None)
    value = row[key] if key is not None else None
    if key is None:
        key, model = "reward_model.ground_truth", row.get("reward_model")
        if not isinstance(model, Mapping) or "ground_truth" not in model:
            raise ValueError(f"{where}: the row has neither 'answer' nor '{key}', but {_names(row)}")
        value = model["ground_truth"]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"{where}: '{key}' must be a non-empty string or a number, got {_shown(value)}")
    text = str(value).strip()
    return canonical_integer(text) or text


def _text(row: Any, key: str, where: str, role: str | None = None) -> str:
    """A text that must be there, of a message of ``role`` if one is given."""
    if not isinstance(row, Mapping) or (role is not None and row.get("role") != role):
        raise ValueError(f"{where} must be a message of the role {role!r}, got {_shown(row)}")
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: '{key}' must be a non-empty string, got {_shown(value)}")
    return value.strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)) for key in row) or "no keys"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
