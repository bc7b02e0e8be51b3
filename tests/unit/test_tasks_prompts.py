"""Prompt sources: files, order, resuming, and rows that cannot be used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from spear_megatron.data.generator import GeneratorConfig
from spear_megatron.data.prompts import DataConfig, PromptSource, load_prompts

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict]:
    return [{"id": f"t{i}", "problem": f"What is {i}?", "answer": i, "source": "made"} for i in range(count)]


def test_files_become_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.jsonl", [*rows(2), "", {"id": 7, "problem": "p", "answer": " 3/4 "}])
    prompts = load_prompts(DataConfig(train_files=path, instruction="\nBox it."), "train")
    assert [prompt.task_id for prompt in prompts] == ["t0", "t1", "7"]
    assert prompts[1].messages == ({"role": "user", "content": "What is 1?\nBox it."},)
    assert (prompts[1].answer, prompts[1].data_source, prompts[1].extra) == ("1", "tasks", {"source": "made"})


def test_generated_prompts() -> None:
    config = DataConfig(generator=GeneratorConfig(levels=(1,), num_train=50, num_val=20), instruction=" Go.")
    train, val = load_prompts(config, "train"), load_prompts(config, "val")
    assert (len(train), len(val)) == (50, 20)
    assert all(prompt.messages[0]["content"].endswith(" Go.") for prompt in train)
    assert train[0].extra["level"] == 1 and train[0].data_source == "generator"


@pytest.mark.parametrize("name", ["aime_2024.jsonl", "aime_2025.jsonl", "deepmath_integer.jsonl"])
def test_published_task_files_load(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"the task file {name} is not here")
    prompts = load_prompts(DataConfig(val_files=str(SHARED / name)), "val")
    assert len(prompts) >= 30 and all(prompt.answer for prompt in prompts)


def test_order_is_a_keyed_permutation_per_epoch() -> None:
    prompts = load_prompts(DataConfig(generator=GeneratorConfig(num_train=10)), "train")
    source = PromptSource(prompts, seed=3, shuffle=True)
    epochs = [[prompt.task_id for prompt in source.take(10)] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == sorted(prompt.task_id for prompt in prompts) for epoch in epochs)
    again = PromptSource(prompts, seed=3, shuffle=True)
    assert [prompt.task_id for prompt in again.take(30)] == [name for epoch in epochs for name in epoch]
    assert again.position == 30
    plain = PromptSource(prompts, seed=3, shuffle=False)
    assert plain.take(12) == [*prompts, *prompts[:2]]


def test_resuming_goes_on_where_it_was() -> None:
    prompts = load_prompts(DataConfig(generator=GeneratorConfig(num_train=10)), "train")
    source = PromptSource(prompts, seed=3, shuffle=True)
    source.take(17)
    state = json.loads(json.dumps(source.state_dict()))
    expected = source.take(20)
    resumed = PromptSource(prompts, seed=3, shuffle=True)
    resumed.load_state_dict(state)
    assert resumed.take(20) == expected
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        PromptSource(prompts, seed=4, shuffle=True).load_state_dict(state)
    with pytest.raises(ValueError, match="prompts differ"):
        PromptSource(prompts[:-1], seed=3, shuffle=True).load_state_dict(state)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"id": "x", "problem": "p", "answer": NaN}', "NaN is not JSON"),
        ('{"id": "x", "problem": "\\ud800", "answer": 1}', "UTF-8"),
        ("[" * 100_000, "not valid JSON"),
        ({"problem": "p", "answer": "1"}, "'id' must be"),
        ({"prompt": [], "answer": "1"}, "keys id, problem and answer, this row has ['answer', 'prompt']"),
        ({"id": "", "problem": "p", "answer": "1"}, "'id' must be"),
        ({"id": True, "problem": "p", "answer": "1"}, "'id' must be"),
        ({"id": "x", "problem": " ", "answer": "1"}, "'problem' must be"),
        ({"id": "x", "problem": ["p" * 200], "answer": "1"}, "'problem' must be"),
        ({"id": "x", "problem": "p"}, "'answer' must be"),
        ({"id": "x", "problem": "p", "answer": None}, "'answer' must be"),
        ({"id": "x", "problem": "p", "answer": ""}, "'answer' must be"),
        ({"id": "t0", "problem": "p", "answer": "1"}, "already used at"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "tasks.jsonl", [rows(1)[0], row])
    with pytest.raises(ValueError) as failure:
        load_prompts(DataConfig(train_files=[path]), "train")
    text = str(failure.value)
    assert text.startswith(f"{path}:2: ") and message in text
    assert len(text) < len(path) * 2 + 200 and "\n" not in text


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the data file .*nowhere.jsonl"):
        load_prompts(DataConfig(val_files=str(tmp_path / "nowhere.jsonl")), "val")
    with pytest.raises(ValueError, match="data.val_files has no rows"):
        load_prompts(DataConfig(val_files=write(tmp_path / "empty.jsonl", [])), "val")
    with pytest.raises(ValueError, match="data.train_files names no file"):
        DataConfig(train_files=())
    with pytest.raises(ValueError, match="data.max_prompt_length"):
        DataConfig(max_prompt_length=0)


def test_thousands_of_damaged_rows_give_one_sentence_each(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = json.dumps({"id": "a", "problem": "What is 1?", "answer": "1"}).encode()
    path = tmp_path / "fuzz.jsonl"
    num_refused = 0
    for _ in range(600):
        line = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(line))
            line[place : place + rng.randrange(3)] = rng.choice([b"", b"null", b'"', b"{", b"\xff", b"7", b"\\", b":"])
        path.write_bytes(bytes(line))
        try:
            (prompt,) = load_prompts(DataConfig(train_files=str(path)), "train")
            assert prompt.task_id and prompt.answer and prompt.messages[0]["content"].strip()
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith((f"{path}:1: ", "data.train_files has no rows"))
    assert 150 < num_refused < 600
