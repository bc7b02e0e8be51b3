"""Runs with rollouts ahead of training: the command itself, an emulation without threads, and a run that breaks off."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from harness import run_ranks
from train_loop import _SETTINGS, EvenTokens, LoopResult, command_on_rank, compare, read_loop

from spear_megatron.types import Prompt, RewardParts, Trajectory

STEPS = 4
ASYNC = ("trainer.async=1", "algorithm.rollout_correction.mode=tis")
_OWN = ("staleness/", "training/policy_version", "filter/gen_batches")
"""Figures that tell how a step was made; an emulation has its own."""


class Coarse:
    """Whether most sampled tokens are even: within many groups it does not differ."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """Score one trajectory."""
        parts = await EvenTokens()(prompt, trajectory)
        return dataclasses.replace(parts, outcome=float(parts.success))


def arguments(model: str, run_dir: Path, *more: str) -> list[str]:
    """Command line of a short run with a checkpoint after every step."""
    return [
        f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *_SETTINGS,
        f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", "trainer.save_hf=true", "trainer.test_freq=-1",
        "data.max_response_length=24", "env.name=observers.scripted_run:Echo", *more,
    ]  # fmt: skip


def run_command(world_size: int, settings: list[str]) -> None:
    """Train with the command."""
    codes = run_ranks(command_on_rank, world_size, ["train", *settings, "--debug"])
    assert codes == [0] * world_size


def emulate_on_rank(settings: list[str]) -> None:
    """One step off without threads: each step first rolls out the next one, with the weights that were published."""
    from spear_megatron.cli.build import open_run
    from spear_megatron.cli.session import StopFlag
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.trainer.loop import train

    with open_run(load(Config, None, settings), StopFlag()) as run:
        in_turn, waiting = run.collect, []

        def collect(step: int) -> Any:
            if not waiting:
                waiting.append(in_turn(step))
            if step < STEPS:
                waiting.append(in_turn(step + 1))
            return waiting.pop(0)

        run.collect = collect
        train(run)


def break_off_on_rank(settings: list[str], step: int) -> str:
    """Train until ``step`` is recorded, but not saved, and fail there."""
    from spear_megatron.cli.build import open_run
    from spear_megatron.cli.session import StopFlag
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.trainer.loop import train

    with open_run(load(Config, None, settings), StopFlag()) as run:
        save = run.save_if_due

        def fail(number: int) -> None:
            if number == step:
                raise RuntimeError("power cut")
            save(number)

        run.save_if_due = fail
        try:
            train(run)
        except RuntimeError as error:
            return str(error)
    return "no failure"


def check_close(result: LoopResult, expected: LoopResult) -> None:
    """Figures of two layouts agree as long as their tokens do: in the first two steps, of the first weights, at least.

    Rounding differs between layouts, and sooner or later a sampled token with it, and then all that follow.
    """
    equal = [step for step in expected.tokens if result.tokens[step] == expected.tokens[step]]
    common = range(1, next((step for step in range(1, STEPS + 1) if step not in equal), STEPS + 1))
    assert len(common) >= 2, f"tokens are equal in steps {equal}"
    one, other = (
        LoopResult({step: run.metrics[step] for step in common}, {step: run.tokens[step] for step in common})
        for run in (result, expected)
    )
    difference = compare(one, other)
    assert difference.error <= 1.0, difference.worst


def course(run_dir: Path, *, own: bool = True) -> tuple[LoopResult, str]:
    """Figures and tokens of a run (without how its steps were made, if not ``own``), and its final weights' digest."""
    result = read_loop(run_dir)
    if not own:
        for figures in result.metrics.values():
            for name in [name for name in figures if name.startswith(_OWN)]:
                del figures[name]
    weights = sorted((run_dir / "hf").glob("*.safetensors"))
    assert weights
    return result, hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
