"""Published data sets become tasks and conversations: once each, checked, counted, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_megatron.__main__ import main
from spear_megatron.data.prepare import CONFLICT, DUPLICATE, Manifest, prepare_dataset
from spear_megatron.data.prompts import DataConfig, load_prompts
from spear_megatron.data.published import Unusable, convert_retool
from spear_megatron.data.sft import load_conversations
from spear_megatron.data.sources import find_source, read_rows
from spear_megatron.environments.code_interpreter import TOOL_SCHEMA
from spear_megatron.rewards.answers import last_boxed


def dapo(problem: str, answer: Any) -> dict[str, Any]:
    """A row in the form of the hub's files."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve this. {problem}"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": "7"},
    }


def write(path: Path, rows: list[Any]) -> Path:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def prepared(folder: Path, dataset: str, rows: list[Any], ending: str = "jsonl") -> tuple[Manifest, list[Any]]:
    manifest = prepare_dataset(dataset, str(write(folder / f"source.{ending}", rows)), folder / "out")
    return manifest, [row for _, row in read_rows(folder / "out" / f"{dataset}.jsonl")]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_repeated_prompts_are_written_once_in_the_order_of_the_first(tmp_path: Path, ending: str) -> None:
    rows = [dapo("B?", "034"), dapo("A?", "2"), dapo("B?", "34"), dapo("  B?\n", " 34 "), dapo("A?", "2.0")] * 20
    manifest, written = prepared(tmp_path, "dapo-math-17k", rows, ending)
    assert [row["answer"] for row in written] == ["34", "2"]
    assert [row["problem"] for row in written] == ["Solve this. B?", "Solve this. A?"]
    assert (manifest.rows_read, manifest.rows_written, manifest.dropped) == (100, 2, {DUPLICATE: 98})


def test_the_id_follows_from_the_problem_alone(tmp_path: Path) -> None:
    _, one = prepared(tmp_path, "dapo-math-17k", [dapo("A?", "2"), dapo("B?", "3")])
    _, other = prepared(tmp_path, "dapo-math-17k", [dapo("B?  ", "03"), dapo("A?", 2)])
    assert {row["id"]: row["answer"] for row in one} == {row["id"]: row["answer"] for row in other}
    assert len({row["id"] for row in one}) == 2 and one[0]["id"].startswith("dapo-math-17k-")


def test_copies_that_disagree_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [dapo("A?", "2"), dapo("A?", "2"), dapo("A?", "3"), *(dapo(f"{i}?", "1") for i in range(5)), dapo("A?", "2")]
    manifest, written = prepared(tmp_path, "dapo-math-17k", rows)
    assert manifest.dropped == {CONFLICT: 4} and len(written) == 5
    assert manifest.examples == {CONFLICT: (f"{tmp_path / 'source.jsonl'}:3",)}
    assert manifest.rows_read == manifest.rows_written + sum(manifest.dropped.values())


def test_all_forms_of_aime_files_give_the_same_rows(tmp_path: Path) -> None:
    capital = [{"ID": "2024-II-4", "Problem": "P?", "Answer": 33}, {"ID": "2024-I-1", "Problem": "Q?", "Answer": 0}]
    plain = [{"problem": "P?", "answer": "033"}, {"problem": "Q?", "answer": "0"}]
    verl = [{"prompt": f"{p}?", "reward_model": {"ground_truth": truth}} for p, truth in (("P", "33"), ("Q", 0))]
    label = [{"prompt": [{"role": "user", "content": p}], "label": truth} for p, truth in (("P?", "33"), ("Q?", "0"))]
    found = [prepared(tmp_path, "aime-2024", rows * 32)[1] for rows in (capital, plain, verl, label)]
    assert found[0] == found[1] == found[2] == found[3] and [row["answer"] for row in found[0]] == ["33", "0"]


def test_training_reads_what_is_written(tmp_path: Path) -> None:
    for name in ("aime-2024", "aime-2025"):
        prepared(tmp_path, name, [{"problem": "P?", "answer": "33"}])
    files = tuple(str(tmp_path / "out" / f"{name}.jsonl") for name in ("aime-2024", "aime-2025"))
    prompts = load_prompts(DataConfig(val_files=files, instruction=" Box it."), "val")
    assert [prompt.data_source for prompt in prompts] == ["aime-2024", "aime-2025"]
    assert prompts[0].messages[0]["content"] == "P? Box it." and prompts[0].answer == "33"


QUESTION = "Use the tool.\n*user question:*\nWhat is 2 + 2? Put it into <answer>\\boxed{'answer'}</answer>."
SOLUTION = """Let me compute.
<code>
```python
print(2 + 2)
```
</code>
<interpreter>
4
</interpreter>
Check it silently.
<code>assert 2 + 2 == 4</code> <interpreter></interpreter>
So it is
<answer>
\\boxed{4}
</answer>
"""


def retool(solution: str, question: str = QUESTION) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]}


def test_blocks_of_a_solution_become_calls_and_outputs(tmp_path: Path) -> None:
    _, written = prepared(tmp_path, "retool-sft", [retool(SOLUTION)])
    (conversation,) = load_conversations([str(tmp_path / "out" / "retool-sft.jsonl")])

    def call(code: str) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": code}}}]

    assert list(conversation.messages) == [
        {"role": "user", "content": "What is 2 + 2? Put it into \\boxed{'answer'}."},
        {"role": "assistant", "content": "Let me compute.", "tool_calls": call("print(2 + 2)")},
        {"role": "tool", "name": "code_interpreter", "content": "4"},
        {"role": "assistant", "content": "Check it silently.", "tool_calls": call("assert 2 + 2 == 4")},
        {"role": "tool", "name": "code_interpreter", "content": "(The program printed nothing.)"},
        {"role": "assistant", "content": "So it is\n\n\\boxed{4}"},
    ]
    assert conversation.tools == (TOOL_SCHEMA,) and written[0]["id"].startswith("retool-sft-")


GOOD = "It is <answer>\\boxed{1}</answer>"
UNUSABLE = {
    "no question": retool(GOOD, "What is 1?"),
    "more than one exchange": {"messages": retool(GOOD)["messages"] * 2},
    "no answer": retool("It is \\boxed{1}"),
    "no boxed answer": retool("It is <answer>1</answer>"),
    "text after the answer": retool(f"{GOOD} as promised"),
    "text between code and output": retool(f"<code>print(1)</code> so <interpreter>1</interpreter>{GOOD}"),
    "code and output do not alternate": retool(f"<code>print(1)</code><code>print(2)</code>{GOOD}"),
    "unbalanced tags": retool(f"<code>print(1) <interpreter>1</interpreter>{GOOD}"),
    "empty program": retool(f"<code>```python\n```</code><interpreter></interpreter>{GOOD}"),
}


PIECES = (
    "<code>", "</code>", "<interpreter>", "</interpreter>", "<answer>", "</answer>", "\\boxed{1}",
    "```python\n", "```", "x ",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_solution_becomes_a_conversation_or_a_reason(solution: str) -> None:
    row = retool(solution or "x")
    try:
        messages = convert_retool(row, "here").row["messages"]
    except Unusable as reason:
        assert str(reason) in {*UNUSABLE}
        return
    roles = [message["role"] for message in messages]
    assert roles == ["user", *["assistant", "tool"] * ((len(roles) - 2) // 2), "assistant"]
    calls = [message for message in messages if message.get("tool_calls")]
    assert len(calls) == roles.count("tool") == solution.count("<interpreter>")
    assert last_boxed(messages[-1]["content"]) is not None and "tool_calls" not in messages[-1]


def test_solutions_of_another_form_are_left_out_by_reason(tmp_path: Path) -> None:
    good = [retool(f"{i} {GOOD}") for i in range(20)]
    manifest, written = prepared(tmp_path, "retool-sft", [*UNUSABLE.values(), *good, good[3]])
    assert len(written) == 20
    assert manifest.dropped == {**dict.fromkeys(UNUSABLE, 1), DUPLICATE: 1}
    for number, reason in enumerate(UNUSABLE, start=1):
        assert manifest.examples[reason] == (f"{tmp_path / 'source.jsonl'}:{number}",)


NO_DATASET = {
    "no problem": ("dapo-math-17k", {"text": "A?", "answer": "1"}, "'problem' nor 'prompt', but 'text', 'answer'"),
    "no answer": ("dapo-math-17k", {"problem": "A?"}, "'reward_model.ground_truth', but 'problem'"),
    "empty answer": ("dapo-math-17k", dapo("A?", " "), "'reward_model.ground_truth' must be a non-empty string"),
    "answer of another type": ("aime-2024", {"problem": "A?", "answer": True}, "'answer' must be"),
    "two messages": ("dapo-math-17k", {"prompt": [{}, {}], "answer": 1}, "'prompt' must be one message"),
    "another role": ("dapo-math-17k", {"prompt": [{"role": "system"}], "answer": 1}, "role 'user'"),
    "large answer": ("aime-2025", {"problem": "A?", "answer": "1000"}, "from 0 to 999, got '1000'"),
    "no number": ("aime-2025", {"problem": "A?", "answer": "\\frac12"}, "from 0 to 999"),
    "no messages": ("retool-sft", {"messages": "hello"}, "'messages' must be a list"),
    "no text": ("retool-sft", {"messages": [{"role": "user"}, {"role": "assistant"}]}, "message 0: 'content'"),
}


@pytest.mark.parametrize("case", NO_DATASET)
def test_another_structure_is_an_error_that_names_file_row_and_key(case: str, tmp_path: Path) -> None:
    dataset, bad, told = NO_DATASET[case]
    good = retool(GOOD) if dataset == "retool-sft" else {"problem": "Good?", "answer": "1"}
    path = write(tmp_path / "source.json", [good, bad])
    with pytest.raises(ValueError, match="row 2") as error:
        prepare_dataset(dataset, str(path), tmp_path / "out")
    assert str(path) in str(error.value) and told in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_mostly_of_no_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 1 are of use as retool-sft, 2 were left out for 'no answer'"):
        prepared(tmp_path, "retool-sft", [retool("a"), retool("b"), retool(GOOD)])
    with pytest.raises(ValueError, match="no rows"):
        prepared(tmp_path, "retool-sft", [])


def test_the_manifest_tells_what_was_read_and_written(tmp_path: Path) -> None:
    manifest, _ = prepared(tmp_path, "aime-2024", [{"problem": "P?", "answer": 1}] * 3)
    saved = json.loads((tmp_path / "out" / "aime-2024.manifest.json").read_text())
    data, source = (tmp_path / "out" / "aime-2024.jsonl").read_bytes(), (tmp_path / "source.jsonl").read_bytes()
    assert saved["output"] == {
        "name": "aime-2024.jsonl", "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert saved["source_files"][0]["sha256"] == hashlib.sha256(source).hexdigest()
    assert (saved["rows_read"], saved["rows_written"], saved["dropped"]) == (3, 1, {DUPLICATE: 2})
    assert saved["revision"] is None and saved["dataset"] == manifest.dataset == "aime-2024"


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path, "aime-2024", [{"problem": "P?", "answer": 1}])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spear_megatron.observability.files.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        prepared(tmp_path, "aime-2024", [{"problem": "Q?", "answer": 2}])
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert after == before


def test_a_folder_gives_its_training_files_of_the_best_format(tmp_path: Path) -> None:
    for name in ("a.json", "data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [])
    assert [path.name for path in find_source(str(tmp_path)).files] == ["train-0.jsonl", "train-1.jsonl"]
    with pytest.raises(ValueError, match="no data files"):
        (tmp_path / "empty").mkdir()
        find_source(str(tmp_path / "empty"))


def test_a_data_set_of_the_hub_is_fetched_and_its_commit_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "0123abcd"
    folder.mkdir()
    write(folder / "train.jsonl", [{"problem": "P?", "answer": 1}])
    asked: list[Any] = []

    def snapshot_download(name: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, revision))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    manifest = prepare_dataset("aime-2025", "owner/aime_2025", tmp_path / "out", revision="main")
    assert asked == [("owner/aime_2025", "dataset", "main")]
    assert (manifest.source, manifest.revision) == ("owner/aime_2025", "0123abcd")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed"):
        prepare_dataset("aime-2025", str(tmp_path / "rows.parquet"), tmp_path / "out")
    with pytest.raises(ValueError, match="needs huggingface_hub, which is not installed"):
        prepare_dataset("aime-2025", "owner/aime_2025", tmp_path / "out")


def test_parquet_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[dapo("A?", "1"), dapo("B?", "2")], [dapo("A?", "1"), {"prompt": 3}]]

    class ParquetFile:
        def __init__(self, path: Path) -> None:
            assert path.suffix == ".parquet"

        def iter_batches(self, batch_size: int) -> Iterator[Any]:
            for rows in batches:
                yield SimpleNamespace(to_pylist=lambda rows=rows: rows)

    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.ArrowInvalid, parquet.ParquetFile = ValueError, ParquetFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="row 4: 'prompt' must be a non-empty string"):
        prepare_dataset("dapo-math-17k", str(path), tmp_path / "out")
    batches[1].pop()
    assert prepare_dataset("dapo-math-17k", str(path), tmp_path / "out").dropped == {DUPLICATE: 1}


def test_real_parquet_files_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([dapo("A?", "1"), dapo("B?", "2")] * 3), path)
    manifest = prepare_dataset("dapo-math-17k", str(path), tmp_path / "out")
    assert (manifest.rows_read, manifest.rows_written) == (6, 2)
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        prepare_dataset("dapo-math-17k", str(path), tmp_path / "out")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [dapo("A?", "1"), dapo("A?", "1")])
    arguments = ["prepare", "--source", str(path), "--out", str(tmp_path / "out"), "--dataset"]
    assert main([*arguments, "dapo-math-17k"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 rows" in out and f"left out: 1 duplicate, such as {path}:2" in out
    assert main([*arguments, "dapo-math"]) == 2
    assert "use one of dapo-math-17k, aime-2024, aime-2025, retool-sft" in capsys.readouterr().err
    for source in ("owner/nothing.jsonl", "nothing"):
        assert main(["prepare", "--dataset", "aime-2024", "--source", source, "--out", str(tmp_path)]) == 2
        assert f"{source} does not exist" in capsys.readouterr().err
    assert main([*arguments, "aime-2024", "--revision", "main"]) == 2
    assert "--revision=main belongs to" in capsys.readouterr().err
