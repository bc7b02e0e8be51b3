"""Every command through the real command line, from a tiny model to a trained agent and back."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import DEADLINE_S, SFT, SMALL, command, environment, run, train_arguments

from spear_megatron.__main__ import main
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.grid_tasks import main as make_grid_tasks
from spear_megatron.data.prompts import load_prompts
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.record import read_record


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def sft_dir(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    run("sft", f"actor_rollout_ref.model.path={model}", f"sft.default_local_dir={folder}", *SMALL, *SFT)
    return folder


@pytest.fixture(scope="module")
def run_dir(sft_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    run(*train_arguments(sft_dir / "hf", folder))
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_model(one: Path, other: Path) -> None:
    """Weights bit for bit; config, tokenizer and generation config as JSON."""
    weights, others = tensors(one), tensors(other)
    assert weights.keys() == others.keys() and all((weights[name] == others[name]).all() for name in weights)
    names = {path.name for path in one.glob("*.json")}
    assert names == {path.name for path in other.glob("*.json")} and {"config.json", "tokenizer.json"} <= names
    assert all(json.loads((one / name).read_text()) == json.loads((other / name).read_text()) for name in names)


def without_timings(folder: Path) -> list[dict[str, Any]]:
    machine = ("timing_s/", "perf/", "unix_time")
    return [{k: v for k, v in line.items() if not k.startswith(machine)} for line in read_record(folder)]


def test_sft_learns_and_exports(sft_dir: Path) -> None:
    losses = [line["sft/loss"] for line in read_record(sft_dir)]
    assert len(losses) == 120 and losses[-1] < 0.1 * losses[0]
    names = {path.name for path in (sft_dir / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names


def test_train_leaves_record_checkpoints_trajectories_and_a_model(run_dir: Path, sft_dir: Path) -> None:
    record = read_record(run_dir)
    assert [line["step"] for line in record] == list(range(7))  # step 0 is the evaluation before training
    assert all("val/success_rate" in record[step] for step in (0, 3, 6))
    assert all(math.isfinite(line["actor/grad_norm"]) and line["tools/calls_mean"] > 0.5 for line in record[1:])
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_00000004", "step_00000006"}
    before, after = tensors(sft_dir / "hf"), tensors(run_dir / "hf")
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    saved = load(Config, run_dir / "config.yaml")
    assert saved.trainer.total_training_steps == 6 and saved.trainer.default_local_dir == str(run_dir)


def test_the_export_loads_in_plain_transformers(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = AutoModelForCausalLM.from_pretrained(run_dir / "hf").generate(**ids, max_new_tokens=4)
    assert reply.shape[1] > ids["input_ids"].shape[1]


def test_evaluate_writes_a_report(run_dir: Path, tmp_path: Path) -> None:
    model = f"actor_rollout_ref.model.path={run_dir / 'hf'}"
    out = run("evaluate", "--out", tmp_path, "--n", "2", "--temperature", "0.7", model, *SMALL)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_problems"] == 6 and {"success_rate", "avg@2", "pass@2", "maj@2"} <= report["metrics"].keys()
    assert "success_rate" in out and "6 problems, 12 samples" in out


def test_evaluate_reads_a_dataset(run_dir: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "tasks.jsonl"
    rows = [{"id": i, "problem": f"What is {i} + 1?", "answer": i + 1} for i in (1, 2)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"actor_rollout_ref.model.path={run_dir / 'hf'}"
    run("evaluate", "--dataset", dataset, "--out", tmp_path / "out", "--temperature", "0", model, *SMALL)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_problems"] == 2


@pytest.mark.slow
def test_convert_both_ways_is_bit_exact(run_dir: Path, tmp_path: Path) -> None:
    run("convert", "mcore-to-hf", "--mcore", run_dir, "--out", tmp_path / "hf")
    sums = json.loads((tmp_path / "hf" / "model.checksums.json").read_text())["tensors"]
    assert set(tensors(tmp_path / "hf")) == set(sums)
    (tmp_path / "hf" / "model.checksums.json").rename(tmp_path / "checksums.json")  # an export has none
    assert_same_model(tmp_path / "hf", run_dir / "hf")
    run("convert", "hf-to-mcore", "--hf", tmp_path / "hf", "--out", tmp_path / "mcore", "--tp", "2")
    run("convert", "mcore-to-hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model.checksums.json").read_text())["tensors"] == sums
    (tmp_path / "again" / "model.checksums.json").unlink()
    assert_same_model(tmp_path / "again", tmp_path / "hf")


def test_view_shows_conversations_and_masks(run_dir: Path) -> None:
    shown = run("view", run_dir, "--step", "2", "--best")
    assert f"{run_dir}: step 2, train" in shown.replace("\n", "") and "code_interpreter" in shown
    tokens = run("view", run_dir, "--tokens", "--worst")
    assert "<|im_start|>assistant" in tokens and "«" in tokens
    assert "step 6, val" in run("view", run_dir, "--kind", "val").replace("\n", "")


def test_doctor_reads_the_run(run_dir: Path) -> None:
    findings = json.loads(run("doctor", run_dir, "--json"))
    assert all({"level", "name", "evidence", "remedy", "keys"} <= finding.keys() for finding in findings)
    assert all(finding["level"] != "error" for finding in findings)
    run("doctor", run_dir)


def test_chat_answers_with_the_tool(run_dir: Path) -> None:
    questions = ("--message", "What is 2 + 3?", "--message", "What is 4 * 5?")
    out = run("chat", run_dir, *questions)
    assert out.count("code_interpreter") >= 2
    assert out == run("chat", run_dir, *questions)


def test_chat_plays_held_out_tasks_and_scores_them(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(Config, run_dir / "config.yaml")
    asked = [prompt for prompt in load_prompts(config.data, "val")][:4]
    out = run("chat", run_dir, *(word for place in (3, 0) for word in ("--task", place)))
    verdicts = [line for line in out.splitlines() if "expected answer: " in line]
    assert [line.split(":")[0] for line in verdicts] == [asked[3].task_id, asked[0].task_id]
    for line, prompt in zip(verdicts, (asked[3], asked[0]), strict=True):
        assert line.endswith(f"expected answer: {prompt.answer}")
        assert (": not solved, outcome +0" in line) != (": solved, outcome +1" in line)
    assert main(["chat", str(run_dir), "--task", "100000"]) == 2
    assert "--task 100000: there are " in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_signal_saves_and_the_same_command_continues(run_dir: Path, sft_dir: Path, tmp_path: Path) -> None:
    arguments = train_arguments(sft_dir / "hf", tmp_path)
    with subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + DEADLINE_S
        record = tmp_path / "metrics.jsonl"
        while not record.is_file() or record.read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline, "no step was recorded"
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    stopped_at = read_record(tmp_path)[-1]["step"]
    assert 1 <= stopped_at < 6 and f"stopped by signal after step {stopped_at}" in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{stopped_at:08d}"]
    assert not (tmp_path / "hf").exists()
    output = run(*arguments)
    assert f"continuing after step {stopped_at}" in output and f"the model is in {tmp_path / 'hf'}" in output
    assert without_timings(tmp_path) == without_timings(run_dir)
    assert_same_model(tmp_path / "hf", run_dir / "hf")


def test_chat_with_an_environment_that_needs_more_than_a_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").symlink_to(model)
    assert make_grid_tasks([str(tmp_path), "--num", "2", "--num-val", "2"]) == 0
    data = f"{{max_response_length: 16, val_files: {tmp_path}/val.jsonl}}"
    settings = f"env: {{name: grid_world, kwargs: {{max_steps: 2}}}}\nreward: {{name: environment}}\ndata: {data}\n"
    (tmp_path / "config.yaml").write_text(settings)
    capsys.readouterr()
    assert main(["chat", str(tmp_path), "--message", "hello"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "infrastructure: environment reset: " in told and "an empty prompt.extra" in told and "--task" in told
    assert main(["chat", str(tmp_path), "--task", "1"]) == 0
    task = json.loads((tmp_path / "val.jsonl").read_text().splitlines()[1])
    assert f"{task['id']}: not solved, outcome " in capsys.readouterr().out


def test_a_start_in_a_used_folder_names_the_keys_that_changed(tmp_path: Path) -> None:
    from spear_megatron.cli.preflight import changed_lines, save_resolved

    folder = f"trainer.default_local_dir={tmp_path}"
    old = load(Config, None, [folder, "reward.kwargs={wrong: -1}"])
    assert changed_lines(old) == []
    save_resolved(old)
    assert changed_lines(old) == []
    new = load(Config, None, [folder, "reward.kwargs={wrong: 0}", "data.shuffle=false"])
    told = "changed since the last start: data.shuffle True -> False, reward.kwargs.wrong -1 -> 0"
    assert changed_lines(new) == [told]


@pytest.mark.parametrize("name", ["train", "sft", "evaluate"])
def test_dry_run_prints_the_plan_and_touches_nothing(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name, "--dry-run", f"actor_rollout_ref.model.path={model}", "trainer.seed=7", *SMALL, *SFT]) == 0
    plan = capsys.readouterr().out
    (tmp_path / "plan.yaml").write_text(plan)
    resolved = load(Config, tmp_path / "plan.yaml")
    assert resolved.trainer.seed == 7 and resolved.data.max_response_length == 64
    assert "1 ranks = tensor 1 x pipeline 1 x data 1" in plan
    assert ("# memory: " in plan and "# estimated step " in plan) == (name == "train")
    assert {"train": "# step: ", "sft": " conversations, ", "evaluate": "# evaluation: "}[name] in plan
    assert "# data: " in plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


UNVALIDATED = ["trainer.val_before_train=false", "trainer.test_freq=-1"]
def test_a_dry_run_tells_of_data_that_is_elsewhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, bare = tmp_path / "tasks.jsonl", tmp_path / "bare"
    tasks.write_text("".join(json.dumps({"id": i, "problem": "1+1", "answer": 2}) + "\n" for i in range(3)))
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    files = [f"data.train_files={tasks}", f"data.val_files={tmp_path / 'none.jsonl'}"]
    assert main(["train", "--dry-run", f"actor_rollout_ref.model.path={bare}", *SMALL, *files]) == 0
    plan = capsys.readouterr().out
    assert "# data: 3 training tasks; " in plan and "has some of the 3 training tasks several times" in plan
    assert f"not here and not checked: data.val_files {tmp_path / 'none.jsonl'}" in plan
    assert f"no tokenizer in {bare}" in plan
    nothing = ["sft", "--dry-run", f"actor_rollout_ref.model.path={bare}", *SMALL]
    assert main([*nothing, f"sft.train_files={tmp_path}/no"]) == 0
    assert f"not here and not checked: sft.train_files {tmp_path}/no" in capsys.readouterr().out


BAD_COMMANDS = {
    "unknown key": (["train", "trainer.total_steps=3"], "trainer.total_training_steps"),
    "bad value": (["train", "trainer.save_freq=0"], "trainer.save_freq"),
    "wrong type": (["sft", "sft.lr=fast"], "sft.lr"),
    "warm-up": (["sft", "{model}", "sft.total_training_steps=2"], "sft.lr_warmup_steps=5"),
    "task row": (["train", "--dry-run", "{model}", *SMALL, "data.train_files={row}", *UNVALIDATED], "row.jsonl:1"),
    "task folder": (["train", "--dry-run", "{model}", *SMALL, "data.train_files={empty}", *UNVALIDATED], "{empty}"),
    "prompt": (["train", "--dry-run", "{model}", *SMALL, "data.max_prompt_length=5"], "data.max_prompt_length=5"),
    "conversation": (["sft", "--dry-run", "{model}", *SMALL, "sft.train_files={row}"], "row.jsonl:1"),
    "no model": (["train"], "actor_rollout_ref.model.path"),
    "not a model": (["evaluate", "--model", "{empty}"], "config.json"),
    "no such file": (["train", "--config", "{empty}/x.yaml"], "x.yaml"),
    "layout": (["train", "{model}", "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"], "1 ranks"),
    "lengths": (["train", "{model}", "data.max_response_length=4000"], "data.max_response_length"),
    "greedy training": (["train", "{model}", "actor_rollout_ref.rollout.temperature=0"], "rollout.temperature"),
    "dataset": (["evaluate", "--dataset", "{empty}/x.jsonl", "{model}", *SMALL], "x.jsonl"),
    "environment": (["train", "{model}", *SMALL, "env.name=code_interpretr"], "code_interpreter"),
    "reward": (["train", "{model}", *SMALL, "reward.kwargs={exact: 1}"], "reward.kwargs"),
    "view of nothing": (["view", "{empty}"], "{empty}"),
    "doctor of nothing": (["doctor", "{empty}"], "{empty}"),
    "chat with nothing": (["chat", "{empty}", "--message", "hello"], "{empty}"),
    "convert nothing": (["convert", "mcore-to-hf", "--mcore", "{empty}", "--out", "{empty}/out"], "{empty}"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_user_errors_are_one_line_that_names_the_culprit(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments, culprit = BAD_COMMANDS[case]
    row = tmp_path / "row.jsonl"
    row.write_text('{"id": "a", "question": "b"}\n')
    texts = {"{empty}": str(empty), "{model}": f"actor_rollout_ref.model.path={model}", "{row}": str(row)}

    def filled(text: str) -> str:
        for name, value in texts.items():
            text = text.replace(name, value)
        return text

    assert main([filled(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and filled(culprit) in error[0], error
    assert not any(empty.iterdir()) and not (tmp_path / "outputs").exists()
