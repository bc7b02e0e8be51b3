"""A command that fails: one line for all ranks, nothing left running, no rank that waits for another."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
from harness import run_ranks

from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.environments.protocol import Observation
from spear_megatron.environments.sandbox.protocol import Sandbox
from spear_megatron.types import Prompt

REPOSITORY = Path(__file__).parents[2]
SETTINGS = (
    "data.train_batch_size=2", "data.max_prompt_length=64", "data.max_response_length=32",
    "data.generator.num_train=8", "data.generator.num_val=2", "data.generator.levels=[1]",
    "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256", "actor_rollout_ref.model.dtype=fp32",
    "env.sandbox.preload=[]", "trainer.num_threads=1", "trainer.logger=[]", "trainer.val_before_train=false",
    "trainer.test_freq=-1", "trainer.save_hf=false", "trainer.total_training_steps=1",
)  # fmt: skip
TENSOR_2 = "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"


def dies(*, sandbox: Sandbox) -> CodeInterpreterEnvironment:
    """An environment whose making fails in a way that nobody foresaw."""
    raise LookupError("unforeseen")


dies.needs_sandbox = True  # type: ignore[attr-defined]


class RunsCode(CodeInterpreterEnvironment):
    """Starts the sandbox with every episode."""

    async def reset(self, prompt: Prompt) -> Observation:
        await self._sandbox.run("print(1)")
        return await super().reset(prompt)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("failures") / "model", seed=0)


def train_arguments(model: Path, run_dir: Path, *more: str) -> list[str]:
    return ["train", f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *SETTINGS, *more]


def command_on_rank(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command on this rank."""
    from spear_megatron.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    return code, said.getvalue()


def failing_train(arguments: list[str]) -> dict[str, Any]:
    """What is left in this process after a training step that failed once rollouts, sandbox and record were open."""
    import torch.distributed as dist

    from spear_megatron.trainer.run import Run

    streams: list[IO[bytes]] = []
    before, during = children(), set()

    def deal(run: Run, *step: object) -> None:
        streams.append(run.parts.recorder._lines._stream)
        during.update(children() - before)
        raise LookupError("unforeseen")

    original, Run.deal = Run.deal, deal  # type: ignore[assignment]
    try:
        command_on_rank(arguments)
    except LookupError as error:
        caught = str(error)
    finally:
        Run.deal = original  # type: ignore[method-assign]
    assert during, "no sandbox was started"
    left = len(children() - before)
    return {"error": caught, "groups": dist.is_initialized(), "children": left, "record closed": streams[0].closed}


def children() -> set[int]:
    """Ids of all processes below this one."""
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_bad_input_on_every_rank_is_told_once(tmp_path: Path) -> None:
    outcomes = run_ranks(command_on_rank, 2, train_arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert [code for code, _ in outcomes] == [2, 2]
    said = "".join(text for _, text in outcomes)
    assert said.startswith("error: ") and said.count("\n") == 1 and "nowhere" in said


def test_a_leader_that_cannot_start_stops_its_peers_with_its_message(model: Path, tmp_path: Path) -> None:
    arguments = train_arguments(model, tmp_path / "run", TENSOR_2, "reward.kwargs={correct: 0}")
    outcomes = run_ranks(command_on_rank, 2, arguments)
    assert [code for code, _ in outcomes] == [1, 1]
    said = [line for _, text in outcomes for line in text.splitlines() if line.startswith("error")]
    assert len(said) == 1 and said[0].startswith("error: start of the agents failed. rank 0: reward.kwargs.correct ")


def test_a_failing_step_leaves_nothing_open(model: Path, tmp_path: Path) -> None:
    arguments = train_arguments(model, tmp_path / "run", "env.name=test_command_failures:RunsCode")
    (left,) = run_ranks(failing_train, 1, arguments)
    assert left == {"error": "unforeseen", "groups": False, "children": 0, "record closed": True}


def silent_peer() -> str:
    """Rank 0 waits for a rank that stays away longer than the collectives' deadline."""
    from spear_megatron.parallel.agreement import agree_any
    from spear_megatron.parallel.errors import RunTimeout, named_waits
    from spear_megatron.parallel.state import initialize

    parallel = initialize(timeout_s=2.0)
    if parallel.rank == 1:
        time.sleep(4.0)
        return ""
    try:
        with named_waits("rank 0, step 3, phase 'update_actor'"):
            agree_any(parallel, False)
    except RunTimeout as error:
        return str(error)
    return "nothing was missing"


def test_a_wait_that_is_too_long_names_rank_and_phase() -> None:
    text = run_ranks(silent_peer, 2)[0]
    assert text.startswith("rank 0, step 3, phase 'update_actor': other ranks did not answer in time (")


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(model: Path, tmp_path: Path) -> None:
    """Not foreseen, so not agreed upon: one traceback, one line from the other rank, and nobody waits."""
    arguments = train_arguments(model, tmp_path / "run", TENSOR_2, "env.name=test_command_failures:dies")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [*launch, "spear_megatron", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stderr.count("LookupError: unforeseen") == 1, done.stderr
    assert time.monotonic() - start < 200
