"""Recipes train two steps on a tiny model: the shipped file, with other values for model, sizes, layout and data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from train_loop import command_on_rank

from spear_megatron.data.grid_tasks import main as write_grid
from spear_megatron.data.generator import GeneratorConfig, generate_problems
from spear_megatron.data.sft import cold_start_conversations
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.record import read_record

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
ACTOR, ROLLOUT, MEGATRON = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.megatron"
STEPS, SFT_STEPS, PROBLEMS = 2, 60, 8
MODEL = ("actor_rollout_ref.model.dtype=fp32", "trainer.num_threads=1", "trainer.logger=[]", f"{ACTOR}.optim.lr=1e-3")
LENGTHS = (
    "data.max_prompt_length=64", "data.instruction=''", "data.max_response_length=64",
    f"{ACTOR}.ppo_max_token_len_per_gpu=256",
)  # fmt: skip
SIZES = (
    *LENGTHS, "data.train_batch_size=4", f"{ACTOR}.ppo_mini_batch_size=2", f"{ACTOR}.trajectory_buffer_size=2",
    f"{ROLLOUT}.n=6", f"{ROLLOUT}.name=embedded", f"{ROLLOUT}.sglang.colocated=false",
    f"{ROLLOUT}.val_kwargs.n=1", f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=-1", "trainer.test_freq=2", "trainer.val_before_train=false", "trainer.save_hf=false",
    "trainer.collect_timeout_s=120", "trainer.collective_timeout_s=120", "env.sandbox.preload=[]",
)  # fmt: skip


def layout(tensor: int, pipeline: int) -> list[str]:
    return [
        f"{MEGATRON}.tensor_model_parallel_size={tensor}", f"{MEGATRON}.pipeline_model_parallel_size={pipeline}",
        f"{MEGATRON}.sequence_parallel={str(tensor > 1).lower()}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that `prepare` writes: few problems, each with right and wrong demonstrations."""
    folder = tmp_path_factory.mktemp("data")
    tasks = GeneratorConfig(levels=(1,), num_train=PROBLEMS)
    rows = [{"id": p.id, "problem": p.text, "answer": str(p.answer)} for p in generate_problems(tasks, "train")]
    chats = [
        {"messages": chat.messages, "tools": chat.tools}
        for seed in range(8)
        for chat in cold_start_conversations(tasks, count=PROBLEMS, error_rate=0.5, seed=seed)
    ]
    for name, chosen in (("train", rows), ("val", rows[:2]), ("sft", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.fixture(scope="module")
def agent(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after a cold start by its recipe: it calls the tool and is right about every other time."""
    folder = tmp_path_factory.mktemp("agent")
    model = make_tiny_model(folder / "model", seed=0)
    arguments = [
        "sft", "--config", str(RECIPES / "qwen3_32b_sft.yaml"), f"actor_rollout_ref.model.path={model}",
        f"sft.default_local_dir={folder / 'sft'}", f"sft.train_files={data / 'sft.jsonl'}",
        f"sft.total_training_steps={SFT_STEPS}", "sft.train_batch_size=16", "sft.lr=1e-2", *MODEL, *LENGTHS,
        *layout(1, 1), "--debug",
    ]  # fmt: skip
    assert run_ranks(command_on_rank, 1, arguments) == [0]
    losses = [line["sft/loss"] for line in read_record(folder / "sft")]
    assert len(losses) == SFT_STEPS and losses[-1] < 0.2 * losses[0]
    return folder / "sft" / "hf"


def trained(name: str, agent: Path, run_dir: Path, data: Path, tensor: int = 1, pipeline: int = 1) -> list[Any]:
    """What a run of a recipe recorded, by step."""
    arguments = [
        "train", "--config", str(RECIPES / f"{name}.yaml"), f"actor_rollout_ref.model.path={agent}",
        f"trainer.default_local_dir={run_dir}", *MODEL, *SIZES,
        f"data.train_files={data / 'train.jsonl'}", f"data.val_files={data / 'val.jsonl'}",
        *layout(tensor, pipeline), "--debug",
    ]  # fmt: skip
    ranks = tensor * pipeline
    assert run_ranks(command_on_rank, ranks, arguments) == [0] * ranks
    return read_record(run_dir)


def check(name: str, record: list[Any]) -> None:
    """Two steps that moved the weights, with the parts of the method that the name promises."""
    assert [line["step"] for line in record] == [1, 2]
    assert all(math.isfinite(line["actor/grad_norm"]) and line["actor/grad_norm"] > 0 for line in record)
    assert all(line["tools/calls_mean"] > 0.5 for line in record) and "val/success_rate" in record[-1]
    spear = "_spear" in name
    assert spear == ("replay/pushed" in record[0])
    if spear:
        assert record[0]["replay/pushed"] > 0 and record[0]["replay/replayed"] == 0
        assert record[1]["replay/replayed"] > 0 and record[1]["spear/gamma"] > 0
    # On-policy steps are two; the released code adds one of its own for each replayed mini-batch.
    extra = record[1]["training/num_optimizer_steps"] - 2
    assert (extra > 0) == name.endswith("spear_official")


SLOW = pytest.mark.slow
ON_ONE_RANK = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.endswith("_sft")]
ON_FOUR_RANKS = ("qwen2.5_32b_spear_paper", pytest.param("qwen2.5_32b_spear_official", marks=SLOW))


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_recipe_trains(name: str, agent: Path, data: Path, tmp_path: Path) -> None:
    check(name, trained(name, agent, tmp_path, data))


@pytest.mark.parametrize("name", ON_FOUR_RANKS)
def test_a_recipe_trains_as_tensor_and_pipeline_stages(name: str, agent: Path, data: Path, tmp_path: Path) -> None:
    check(name, trained(name, agent, tmp_path, data, tensor=2, pipeline=2))


BESIDE = ("quickstart_drbot", "quickstart_grpo", "quickstart_spear_official")
GRID = ("grid_world", "study_grid_world")
"""Runs beside the recipes that no other test trains."""


def check_other(name: str, agent: Path, folder: Path, *overrides: str) -> None:
    """Two steps with the file's own lengths and tasks."""
    arguments = [
        "train", "--config", str(RECIPES.parent / f"{name}.yaml"), f"actor_rollout_ref.model.path={agent}",
        f"trainer.default_local_dir={folder}", *MODEL, "data.train_batch_size=4", f"{ACTOR}.ppo_mini_batch_size=2",
        f"{ROLLOUT}.n=4", f"{ACTOR}.trajectory_buffer_size=8", f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.save_hf=false",
        "env.sandbox.preload=[]", *overrides, "--debug",
    ]  # fmt: skip
    assert run_ranks(command_on_rank, 1, arguments) == [0]
    record = read_record(folder)
    assert [line["step"] for line in record] == [1, 2]
    assert all(line["training/num_trajectories"] == 16 for line in record)


@pytest.mark.parametrize("name", BESIDE)
def test_the_other_runs_train(name: str, agent: Path, tmp_path: Path) -> None:
    check_other(name, agent, tmp_path)


@pytest.mark.parametrize("name", GRID)
def test_the_grid_world_trains(name: str, agent: Path, tmp_path: Path) -> None:
    # The agent's tokenizer has no words of the grid, so that prompts are longer.
    write_grid([str(tmp_path / "grid"), "--num", "8", "--num-val", "4", "--history", "1"])
    files = [f"data.{name}_files={tmp_path / 'grid' / name}.jsonl" for name in ("train", "val")]
    check_other(name, agent, tmp_path / "run", "data.max_prompt_length=400", *files)
