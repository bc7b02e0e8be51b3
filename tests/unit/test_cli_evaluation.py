"""The whole command ``evaluate``: resumed after a kill, refused in another's folder, asked of servers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import tiny_renderer

from spear_megatron.__main__ import main
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.evaluation.journal import Journal
from spear_megatron.observability.trajectories import read_trajectories
from spear_megatron.rewards.math import MathReward
from spear_megatron.rollout.loop_thread import LoopThread
from spear_megatron.testing.fake_openai import FakeOpenAI
from spear_megatron.types import Prompt, RewardParts, Trajectory

NUM_PROBLEMS, NUM_SAMPLES = 4, 4
SIZES = (
    "data.max_prompt_length=256", "data.max_response_length=32", "env.sandbox.preload=[]", "trainer.num_threads=1",
    "trainer.num_logged_trajectories=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    make_tiny_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "tasks.jsonl"
    rows = [{"id": f"t{task}", "problem": f"Find {task}.", "answer": 336 + task} for task in range(NUM_PROBLEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(model: Path, dataset: Path, out: Path, *more: str, n: int = NUM_SAMPLES) -> int:
    """``more`` are options; those with a = override the configuration, after the sizes."""
    options = ["--model", str(model), "--dataset", str(dataset), "--out", str(out), "--n", str(n)]
    options += ["--temperature", "1.0", "--top-p", "0.6", *(part for part in more if "=" not in part)]
    return main(["evaluate", *options, *SIZES, *(part for part in more if "=" in part)])


def lines(out: Path) -> list[dict[str, Any]]:
    paths = sorted((out / "samples").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def results(out: Path) -> list[bytes]:
    trajectories = out / "trajectories" / "val" / "step_000000.0.jsonl"
    return [path.read_bytes() for path in (out / "report.json", out / "report.html", trajectories)]


@pytest.fixture(scope="module")
def undisturbed(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    assert evaluate(model, dataset, out) == 0
    return out


def test_a_killed_evaluation_goes_on_and_ends_as_one_that_was_not(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keep = Journal.keep

    def die(self: Journal, prompt: Prompt, trajectory: Trajectory) -> None:
        if len(lines(tmp_path)) == 7:
            raise KeyboardInterrupt
        keep(self, prompt, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", die)
        assert evaluate(model, dataset, tmp_path) == 130
    path = tmp_path / "samples" / "samples.0.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + before[:100])  # as a kill in the middle of a write leaves it
    assert evaluate(model, dataset, tmp_path) == 0
    assert f"7 samples are in {tmp_path}, 9 are missing" in capsys.readouterr().out
    assert path.read_bytes().startswith(before) and len(lines(tmp_path)) == NUM_PROBLEMS * NUM_SAMPLES
    assert results(tmp_path) == results(undisturbed)
    assert evaluate(model, dataset, tmp_path) == 0 and results(tmp_path) == results(undisturbed)
    assert [item.trajectory.id[1:] for item in read_trajectories(tmp_path, 0, "val")] == [(0, 0), (2, 0)]


def test_samples_differ_by_problem_and_sample_and_more_of_them_can_be_taken(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = evaluate(model, dataset, tmp_path, n=2)
    kept = lines(tmp_path)
    assert first == 0 and evaluate(model, dataset, tmp_path) == 0
    assert lines(tmp_path)[: len(kept)] == kept and results(tmp_path)[:2] == results(undisturbed)[:2]
    texts = {(row["task"], row["sample"]): row["messages"][-1]["content"] for row in lines(tmp_path)}
    assert len(set(texts.values())) == len(texts) == NUM_PROBLEMS * NUM_SAMPLES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--temperature", "0.9"], "--temperature is 0.9 and was 1.0"),
        (["--top-p", "0.7"], "--top-p is 0.7 and was 0.6"),
        (["--n", "3"], "--n is 3 and was 4"),
        (["data.max_response_length=33"], "data.max_response_length is 33 and was 32"),
        (["data.instruction=Hurry."], "--dataset is"),
        (["trainer.seed=5"], "trainer.seed is 5"),
        (["env.kwargs={max_calls_per_turn: 1}"], "env.kwargs is"),
    ],
)
def test_the_folder_of_another_evaluation_is_refused(
    change: list[str], named: str, model: Path, dataset: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(undisturbed)
    code = evaluate(model, dataset, undisturbed, *change)
    assert code == 2 and named in (error := capsys.readouterr().err) and "Give another --out" in error
    assert results(undisturbed) == before


def test_another_model_at_the_same_path_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make_tiny_model(model, seed=0)
    assert evaluate(model, dataset, out, n=1) == 0
    make_tiny_model(model, seed=1)
    assert evaluate(model, dataset, out, n=1) == 2
    assert "--model is 'sha256:" in capsys.readouterr().err


def test_lost_samples_are_counted_apart_and_taken_again(
    model: Path, dataset: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge = MathReward.__call__

    async def flaky(self: MathReward, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        if trajectory.id.task == 1 and trajectory.id.sample > 0:
            raise OSError("judge is away")
        return await judge(self, prompt, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(MathReward, "__call__", flaky)
        for _ in range(2):  # the second time nothing comes of all that is missing
            assert evaluate(model, dataset, tmp_path) == 0
            report = json.loads((tmp_path / "report.json").read_text())
            assert (report["num_samples"], report["num_excluded"]) == (13, 3)
            assert report["metrics"]["avg@4"]["num_problems"] == 3 and report["problems"][1]["num_samples"] == 1
    assert "3 excluded after infrastructure failures" in capsys.readouterr().out
    assert evaluate(model, dataset, tmp_path) == 0
    assert "13 samples are in" in capsys.readouterr().out
    assert results(tmp_path)[:2] == results(undisturbed)[:2]


@contextlib.contextmanager
def listening(server: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """The server on a thread of its own, as the command has the main one."""
    loop = LoopThread("fake-server")
    try:
        loop.run(server.__aenter__(), 10.0)
        yield server
        loop.run(server.__aexit__(), 10.0)
    finally:
        loop.close()


ANSWERS = (r"\boxed{%d}", r"So it is \boxed{0%d}.", r"\boxed{%d^\circ}", r"\boxed{5}", "I do not know.")


def reply(prompt: tuple[int, ...], seed: int) -> Sequence[int]:
    """One of the answers above by the seed; before it a call of the tool, which prints the truth."""
    renderer = tiny_renderer()
    conversation = renderer.decode(prompt)
    truth = 336 + int(conversation.rpartition("Find ")[2].partition(".")[0])
    if "<tool_response>" not in conversation:
        text = f'<tool_call>\n{{"name": "code_interpreter", "arguments": {{"code": "print({truth})"}}}}\n</tool_call>'
    else:
        answer = ANSWERS[seed % len(ANSWERS)]
        text = answer % truth if "%d" in answer else answer
    return [*renderer.tokenizer.encode(text, add_special_tokens=False), renderer.turn_end_id]


@pytest.mark.parametrize("extended", [True, False])
def test_a_model_behind_an_openai_compatible_server_is_evaluated_with_its_tools(
    extended: bool, model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("KEY_OF_TEST", "secret")
    decode = tiny_renderer().decode
    with listening(FakeOpenAI(reply, decode, extended=extended, api_key="secret")) as server:
        choice = ["--engine", "openai", "--server", server.url, "--api-key-env", "KEY_OF_TEST"]
        length = "data.max_response_length=128"
        assert evaluate(model, dataset, tmp_path, *choice, length, n=8) == 0
        assert len(server.received) >= 2 * NUM_PROBLEMS * 8
        assert "normalised and strict verdicts differ on" in capsys.readouterr().out
        assert evaluate(model, dataset, tmp_path / "other", *choice[:-1], "NOT_SET", n=1) == 2
        assert "--api-key-env" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    found = lines(tmp_path)
    assert {row["num_tool_calls"] for row in found} == {1} and {row["num_turns"] for row in found} == {2}
    finals = [row["messages"][-1]["content"] for row in found]
    truths = [str(336 + row["task"]) for row in found]
    right = [str(int(truth)) in text for truth, text in zip(truths, finals, strict=True)]
    exact = [text == rf"\boxed{{{truth}}}" for truth, text in zip(truths, finals, strict=True)]
    assert report["metrics"]["success_rate"]["value"] == pytest.approx(sum(right) / 32)
    assert report["strict"]["metrics"]["success_rate"]["value"] == pytest.approx(sum(exact) / 32)
    assert report["num_disagreements"] == sum(right) - sum(exact) > 0 and sum(exact) > 0 and sum(right) < 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "http://127.0.0.1:1"], "add --engine sglang or --engine openai"),
        (["--engine", "openai"], "give --server URL once"),
        (["--engine", "sglang", "--served-model", "x"], "give --server URL too"),
        (["--engine", "openai", "--server", "http://127.0.0.1:1"], "check --server"),
    ],
)
def test_engines_that_do_not_go_together_are_refused(
    options: list[str], message: str, model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, dataset, tmp_path / "out", *options) in (1, 2)
    assert message in capsys.readouterr().err
