"""Whole runs on several ranks whose engine lies: all ranks stop together, and the saved batch is computed again."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from train_loop import make_agent

SETTINGS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[]", "trainer.num_threads=1", "data.generator.levels=[1]",
    "data.generator.num_train=512", "data.max_prompt_length=64", "data.max_response_length=64",
    "trainer.total_training_steps=2", "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false",
    "trainer.save_hf=false", "trainer.collective_timeout_s=60", "data.train_batch_size=4", "env.sandbox.preload=[]",
    "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "reward.name=train_loop:EvenTokens", "actor_rollout_ref.rollout.mismatch.stop=0.06",
)  # fmt: skip
MEGATRON = "actor_rollout_ref.actor.megatron"


def command_with_a_lying_engine(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, output and complaints of a command whose engine adds noise to the second turn."""
    from spear_megatron.__main__ import main
    from spear_megatron.cli import agents
    from spear_megatron.rollout.embedded import EmbeddedEngine
    from spear_megatron.testing.perturbed_engine import PerturbedEngine

    def engine(*args: Any, **options: Any) -> PerturbedEngine:
        return PerturbedEngine(EmbeddedEngine(*args, **options), noise=2.0, turn=2)

    out, complaints = io.StringIO(), io.StringIO()
    agents.EmbeddedEngine = engine  # type: ignore[assignment,misc]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaints):
            code = main(arguments)
    finally:
        agents.EmbeddedEngine = EmbeddedEngine  # type: ignore[misc]
    return code, out.getvalue(), complaints.getvalue()


@pytest.mark.parametrize("old_log_prob", ["trainer", "rollout"])
@pytest.mark.parametrize(("world_size", "pp"), [(2, 1), (2, 2)], ids=["DP2", "PP2"])
def test_all_ranks_stop_with_one_error(
    agent: str, tmp_path: Path, world_size: int, pp: int, old_log_prob: str
) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        "train", f"actor_rollout_ref.model.path={agent}", f"trainer.default_local_dir={run_dir}", *SETTINGS,
        f"{MEGATRON}.pipeline_model_parallel_size={pp}", f"actor_rollout_ref.actor.old_log_prob={old_log_prob}",
    ]  # fmt: skip
    ranks = run_ranks(command_with_a_lying_engine, world_size, arguments)
    assert [code for code, _, _ in ranks] == [1] * world_size
    told = "".join(text for _, _, text in ranks)  # each rank has the same error; one says it
    assert told.count("error:") == 1 and "worst in turn 2" in told and "step 1:" in told
    folder = run_dir / "mismatch" / "step_000001"
    leaders = world_size // pp
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    assert names == [f"rank_{rank:03d}.safetensors" for rank in range(leaders)]

    levels = []
    for layout in ([], [f"{MEGATRON}.tensor_model_parallel_size=2"]):
        ranks = run_ranks(command_with_a_lying_engine, 2, ["replay-dump", str(folder), *layout])
        assert [code for code, _, _ in ranks] == [1, 1]
        assert ranks[1][1] == "" and "turn 2" in ranks[0][1]
        levels.append(re.search(r"difference to the engine: (\S+)", ranks[0][1])[1])  # type: ignore[index]
    assert levels[0] == levels[1]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_agent(tmp_path_factory.mktemp("agent"))
