"""Ten thousand bad inputs of every kind: each gives exactly one clear sentence, or a typed result for tool calls.

Every case is bad by construction, so one that is accepted is a failure too. ``COUNTS`` says how many each kind has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import make_tiny_hf

from spear_megatron.config.convert import accepts_none, field_types, nested_dataclass, union_members
from spear_megatron.config.loader import load, valid_keys
from spear_megatron.config.schema import Config
from spear_megatron.data.prompts import DataConfig, load_prompts
from spear_megatron.data.sft import load_conversations
from spear_megatron.data.tool_calls import parse_tool_calls
from spear_megatron.environments.protocol import ToolCall
from spear_megatron.model.hf_folder import INDEX_NAME, SINGLE_NAME, HFWeights
from spear_megatron.model.shape import ModelShape

COUNTS = {
    "config keys": 500,
    "config values": 2500,
    "config files": 500,
    "task rows": 1800,
    "conversation rows": 1500,
    "config.json": 1200,
    "weights": 500,
    "tool calls": 2500,
}
LONGEST = 800


def test_they_are_ten_thousand() -> None:
    assert sum(COUNTS.values()) >= 10_000


def sentence(action: Callable[[], object], *named: str) -> str:
    """The one sentence that ``action`` is refused with; it contains every text of ``named``."""
    try:
        accepted = action()
    except ValueError as error:
        text = str(error)
    else:
        raise AssertionError(f"should name {named}, but was accepted: {accepted!r}")
    assert text and "\n" not in text and len(text) < LONGEST, text
    missing = [name for name in named if name not in text]
    assert not missing, f"{text!r} does not name {missing}"
    return text


# ---------------------------------------------------------------- configuration

KEYS = valid_keys(Config)
OPEN_MAPPINGS = ("env.kwargs.", "reward.kwargs.")


def leaves(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with its type."""
    for name, hint in field_types(cls).items():
        nested = nested_dataclass(hint)
        if nested is None:
            yield prefix + name, hint
        else:
            yield from leaves(nested, f"{prefix}{name}.")


def misspelled(rng: random.Random) -> str:
    key = rng.choice(KEYS)
    place = rng.randrange(len(key) + 1)
    return rng.choice([
        key[:place] + rng.choice("abcxyz_0") + key[place:],
        key[:place] + key[place + 1 :],
        key + "." + rng.choice(KEYS),
        "".join(rng.choice("abcdefgh") for _ in range(rng.randrange(1, 12))),
        key.upper(),
        rng.choice(KEYS).rpartition(".")[2] + "s",
    ])  # fmt: skip


def is_unknown(key: str) -> bool:
    usable = all(part.isidentifier() for part in key.split("."))
    return usable and key not in KEYS and not key.startswith(OPEN_MAPPINGS)


def below_a_value(key: str) -> bool:
    """Whether the key goes on below one that holds a plain value: then that value has the wrong type."""
    return any(key.startswith(f"{leaf}.") for leaf, _ in leaves())


def test_config_keys() -> None:
    rng, done = random.Random(1), 0
    while done < COUNTS["config keys"]:
        key = misspelled(rng)
        if not is_unknown(key):
            continue
        known = ".".join(key.split(".")[:2])
        text = sentence(lambda: load(Config, None, [f"{key}=1"]), known.split(".")[0])
        assert below_a_value(key) or (f"unknown key '{key.split('.')[0]}" in text and "did you mean" in text), text
        done += 1


WRONG = {
    int: ["x", "1.5", "[1]", "{a: 1}", "true", "1e400x", "'3'", "''", "0x1g", "2020-01-01", ".nan"],
    float: ["x", "[0.5]", "{a: 1}", "false", "'0.5'", "1,5", "one", "5%", "[]", "1e-3e"],
    bool: ["1", "0", "maybe", "[true]", "{}", "1.0", "'true'", "t", "2"],
    str: ["[a]", "{a: b}", "[]", "{}", "[1, 2]"],
    tuple: ["{a: 1}", "[{a: 1}]", "[[1]]", "[null]", "{}", "[[[]]]"],
    dict: ["1", "x", "[1]", "true", "[]"],
}
BROKEN_YAML = ["[1", "{a", "'x", '"x', "[1, 2", "{a: [}", "&a *b", "!!python/name:os.system x", "@x", "`x", "%x: :"]


def wrong_values(hint: Any) -> list[str]:
    """Texts that no type of ``hint`` takes."""
    kinds = [next((kind for kind in WRONG if is_of(member, kind)), None) for member in union_members(hint)]
    values = [value for value in WRONG[kinds[0] or str] if all(value in WRONG[kind or str] for kind in kinds)]
    return [*values, *BROKEN_YAML, *([] if accepts_none(hint) else ["null", "~"])]


def is_of(hint: Any, kind: type) -> bool:
    origin = getattr(hint, "__origin__", hint)
    if kind is dict:
        return isinstance(origin, type) and issubclass(origin, Mapping)
    return origin is kind


def test_config_values() -> None:
    rng, fields = random.Random(2), list(leaves())
    for _ in range(COUNTS["config values"]):
        key, hint = rng.choice(fields)
        value = rng.choice(wrong_values(hint))
        sentence(lambda: load(Config, None, [f"{key}={value}"]), key)


def test_config_files(tmp_path: Path) -> None:
    rng, fields = random.Random(3), list(leaves())
    path = tmp_path / "run.yaml"
    for _ in range(COUNTS["config files"]):
        key, hint = rng.choice(fields)
        lines = ["  " * depth + part + ":" for depth, part in enumerate(key.split("."))]
        lines[-1] += " " + rng.choice([value for value in wrong_values(hint) if value not in BROKEN_YAML])
        if rng.random() < 0.3:
            starts = ["trainer", "data:\n  - 1\ndata: 2\n:", "\t" + lines[0], "{" + lines[0], "- " + lines[0]]
            lines[0] = rng.choice(starts)
        path.write_text("\n".join(lines))
        sentence(lambda: load(Config, path), "run.yaml")


# ---------------------------------------------------------------- JSONL

TASK = {"id": "t", "problem": "What is 1 + 1?", "answer": "2"}
NOT_TEXT: list[Any] = [None, True, [], ["a"], {}, {"a": 1}, "", "  ", "\ud800"]
NOT_A_LIST: list[Any] = [None, "x", 3, {}, {"a": 1}, [], True]
NO_OBJECT: list[Any] = [None, 1, "x", [], [1], True, 1.5]


def broken_line(rng: random.Random, row: Any) -> bytes:
    """The row as a line that is not JSON."""
    text = json.dumps(row).encode()
    return rng.choice([
        text[: rng.randrange(1, len(text))],
        text + rng.choice([b"x", b"{}", b",", b"]"]),
        text[:1] + b"\xff" + text[1:],
        text.replace(b'"', b"'"),
        b"[" * 100_000,
        text[:-1] + b', "x": NaN}',
    ])  # fmt: skip


def bad_task(rng: random.Random) -> bytes:
    field = rng.choice(["id", "problem", "answer"])
    kind = rng.randrange(5)
    if kind == 0:
        return broken_line(rng, TASK)
    if kind == 1:
        return json.dumps({key: value for key, value in TASK.items() if key != field}).encode()
    if kind == 2:
        return json.dumps(rng.choice(NO_OBJECT)).encode()
    if kind == 3:
        return json.dumps({**TASK, "id": "good"}).encode()
    bad = [value for value in NOT_TEXT if not (field == "id" and value == "  ")]
    return json.dumps({**TASK, field: rng.choice(bad)}).encode()


def test_task_rows(tmp_path: Path) -> None:
    rng, path = random.Random(4), tmp_path / "tasks.jsonl"
    good = json.dumps({**TASK, "id": "good"}).encode()
    for _ in range(COUNTS["task rows"]):
        blank = b"\n" * rng.randrange(3)
        path.write_bytes(good + b"\n" + blank + bad_task(rng) + b"\n" + blank)
        split = rng.choice(["train", "val"])
        text = sentence(lambda: load_prompts(DataConfig(**{f"{split}_files": str(path)}), split))  # noqa: B023
        assert text.startswith(f"{path}:{2 + len(blank)}: "), text


CALL = {"function": {"name": "f", "arguments": {"code": "1"}}}
CONVERSATION: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "A"},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


def bad_conversation(rng: random.Random) -> bytes:
    row = json.loads(json.dumps(CONVERSATION))
    messages, kind = row["messages"], rng.randrange(9)
    if kind == 0:
        return broken_line(rng, row)
    if kind == 1:
        return json.dumps(rng.choice(NO_OBJECT)).encode()
    if kind == 2:
        row["messages"] = rng.choice(NOT_A_LIST)
    elif kind == 3:
        row["tools"] = rng.choice(["x", 3, {"a": 1}, True, [1], [None], ["f"], [CALL, []]])
    elif kind == 4:
        messages[rng.randrange(4)] = rng.choice(NO_OBJECT)
    elif kind == 5:
        messages[rng.randrange(4)]["role"] = rng.choice([None, "", "robot", 3, ["user"], {"role": "user"}, "User"])
    elif kind == 6:
        messages[rng.choice([0, 2, 3])]["content"] = rng.choice([None, 3, True, [], {}, ["x"], 1.5])
    elif kind == 7:
        message = rng.choice(messages)
        message.update(rng.choice([{"loss": 1}, {"loss": "yes"}, {"loss": None}, {"reasoning_content": 3},
                                   {"reasoning_content": []}]))  # fmt: skip
    else:
        calls: list[Any] = [None, 1, "x", [], {}, {"function": 3}, {"function": {}}, {"function": {"name": 3}},
                            {"name": "f"}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": "[1]"},
                            {"name": "f", "arguments": [1]},
                            {"function": {"name": "f", "arguments": None}}]  # fmt: skip
        messages[1]["tool_calls"] = rng.choice([[rng.choice(calls)], [CALL, rng.choice(calls)], "x", {"a": 1}, 3])
    return json.dumps(row).encode()


def test_conversation_rows(tmp_path: Path) -> None:
    rng, path = random.Random(5), tmp_path / "chats.jsonl"
    good = json.dumps(CONVERSATION).encode()
    for _ in range(COUNTS["conversation rows"]):
        before = rng.randrange(3)
        path.write_bytes((good + b"\n") * before + bad_conversation(rng) + b"\n" + good)
        text = sentence(lambda: load_conversations([str(path)]))
        assert text.startswith(f"{path}:{before + 1}: "), text


# ---------------------------------------------------------------- Hugging Face folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    return make_tiny_hf(folder, num_layers=2, hidden_size=8, intermediate_size=8, vocab_size=16)


NO_SIZE: list[Any] = [None, 0, -1, 1.5, "8", [], {}, True, "", [8]]
NO_RATE: list[Any] = [None, 0, -1.0, "1e-6", [], True]
BAD_FIELDS: dict[str, list[Any]] = {
    **dict.fromkeys(
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
         "max_position_embeddings"), NO_SIZE),
    "num_key_value_heads": [0, -1, 1.5, "2", [], 3, True],
    "head_dim": [0, -2, 7, 1.5, "8", []],
    "rms_norm_eps": NO_RATE,
    "model_type": [None, "", "llama", "qwen2_moe", "qwen3_moe", 3, [], {}],
    "architectures": [[], ["LlamaForCausalLM"], "Qwen3ForCausalLM", {}, ["Qwen3ForCausalLM", "x"], 3],
    "tie_word_embeddings": [None, 1, "true", []],
    "hidden_act": ["gelu", "relu", None, 3],
    "attention_bias": [True, 1, "no"],
    "attention_dropout": [0.1, 1, "x"],
    "num_experts": [8, 128],
    "quantization_config": [{"quant_method": "fp8"}, {"bits": 4}],
    "rope_parameters": [3, "yarn", [], {"rope_type": "yarn"}, {"rope_theta": -1}, {"rope_theta": "x"}, {"x": 1}],
    "rope_scaling": [3, "yarn", {"type": "linear", "factor": 2.0}, {"rope_type": "llama3"}],
    "layer_types": [["sliding_attention"], "full_attention", 3, [None]],
}  # fmt: skip


def test_config_json(model: Path, tmp_path: Path) -> None:
    rng, file = random.Random(6), tmp_path / "config.json"
    good = json.loads((model / "config.json").read_text())
    ModelShape.from_hf_config(good)
    required = ("hidden_size", "num_hidden_layers", "vocab_size", "model_type", "intermediate_size")
    for _ in range(COUNTS["config.json"]):
        kind, culprit = rng.randrange(8), ""
        if kind == 0:
            data = broken_line(rng, {"model_type": "qwen3"}).replace(b', "x": NaN}', b"")
        elif kind == 1:
            data = json.dumps(rng.choice(NO_OBJECT)).encode()
        elif kind == 2:
            culprit = rng.choice(required)
            data = json.dumps({key: value for key, value in good.items() if key != culprit}).encode()
        else:
            field = rng.choice(list(BAD_FIELDS))
            culprit = "rope_" if field.startswith("rope") else field  # its rope_theta may be named instead
            data = json.dumps({**good, field: rng.choice(BAD_FIELDS[field])}).encode()
        file.write_bytes(data)
        sentence(lambda: ModelShape.from_folder(tmp_path), str(file), culprit)


Damage = Callable[[random.Random, dict[str, torch.Tensor]], tuple[bytes, str]]


def missing(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    name = rng.choice(sorted(tensors))
    return save({key: value for key, value in tensors.items() if key != name}), name


def misshapen(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    shapes = [value[:-1], torch.cat([value, value]), value.unsqueeze(0), value.new_zeros(()), value[:0]]
    return save({**tensors, name: rng.choice(shapes).clone()}), name


def unknown(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    name = rng.choice(["model.layers.2.mlp.up_proj.weight", "transformer.wte.weight", "x", "model.norm.bias"])
    return save({**tensors, name: torch.zeros(2)}), name


def retyped(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    name, dtype = rng.choice(sorted(tensors)), rng.choice([torch.int8, torch.int64, torch.bool, torch.float64])
    return save({**tensors, name: tensors[name].to(dtype)}), name


def truncated(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    data = save(tensors)
    return data[: rng.randrange(len(data))], SINGLE_NAME


def damaged_header(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[bytes, str]:
    data = bytearray(save(tensors))
    header = int.from_bytes(data[:8], "little")
    for place in rng.sample(range(8, 8 + header), 3):
        data[place] = rng.choice(b"\x00\xff\n}{")
    if rng.random() < 0.3:
        data[:8] = rng.randrange(header + 1, 1 << 63).to_bytes(8, "little")
    return bytes(data), ""


def test_weights(model: Path, tmp_path: Path) -> None:
    rng, shape, tensors = random.Random(7), ModelShape.from_folder(model), load_file(model / SINGLE_NAME)
    damages: list[Damage] = [missing, misshapen, unknown, retyped, truncated, damaged_header]
    for number in range(COUNTS["weights"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if rng.random() < 0.1:
            text = rng.choice(["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}',
                               '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": []}',
                               "[" * 100_000])  # fmt: skip
            (folder / INDEX_NAME).write_text(text)
            culprit = INDEX_NAME
        else:
            data, culprit = rng.choice(damages)(rng, tensors)
            (folder / SINGLE_NAME).write_bytes(data)
        sentence(lambda: HFWeights.open(folder, shape), str(folder), culprit)  # noqa: B023


# ---------------------------------------------------------------- tool calls

GOOD_CALL = {"name": "code_interpreter", "arguments": {"code": "print(1)"}}


def bad_call(rng: random.Random) -> str:
    """A turn with one tool call that cannot be used."""
    text, kind = json.dumps(GOOD_CALL), rng.randrange(6)
    if kind == 0:
        text = text[: rng.randrange(len(text))]
    elif kind == 1:
        text += rng.choice(["x", "}", ",", '"', "{}", "null", " and more"])
    elif kind == 2:
        text = rng.choice([text.replace('"', "'"), text.replace(":", "=", 1), text.replace(",", ";", 1), "[" * 30_000])
    elif kind == 3:
        text = json.dumps(rng.choice([*NO_OBJECT, [GOOD_CALL]]))
    elif kind == 4:
        text = json.dumps({**GOOD_CALL, "name": rng.choice([None, "", 3, [], {}, True])})
    else:
        arguments = rng.choice([None, 3, [], ["x"], "", "{", "[1]", "3", "null", {"code": "\ud800"}, '{"a": NaN}'])
        text = json.dumps({**GOOD_CALL, "arguments": arguments})
        if rng.random() < 0.2:
            text = json.dumps({"name": "f"})
    close = rng.choice(["</tool_call>", "\n</tool_call>\n", "\n</tool_call> Done.", "", "</tool_cal"])
    return rng.choice(["", "Hm.\n", "</tool_call>"]) + "<tool_call>" + rng.choice(["", "\n", " "]) + text + close


def test_tool_calls() -> None:
    rng = random.Random(8)
    for _ in range(COUNTS["tool calls"]):
        text = bad_call(rng)
        calls = parse_tool_calls(text)
        assert len(calls) == 1 and isinstance(calls[0], ToolCall), text
        assert calls[0].error and "\n" not in calls[0].error and calls[0].arguments == {}, text
