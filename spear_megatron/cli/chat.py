"""``chat RUN_DIR``: talk to a trained agent, with its tools, in a terminal."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``chat`` to ``parser``."""
    parser.add_argument("run_dir", help="run directory, or a model folder in Hugging Face format")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature, 0 is greedy")
    parser.add_argument("--message", action="append", help="ask this and leave; may be given several times")


def run(args: argparse.Namespace) -> int:
    """Answer messages until an empty line or the end of the input."""
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.parallel.paths import check_input_folder

    folder = check_input_folder(args.run_dir, "give a run directory, or a model folder in Hugging Face format")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature must not be negative, got {args.temperature}: 0 is greedy")
    model = folder / "hf" if (folder / "hf" / "config.json").is_file() else folder
    settings = folder / "config.yaml"
    overrides = [f"actor_rollout_ref.model.path={model}"]
    config = load(Config, settings if settings.is_file() else None, overrides)
    converse(config, args.temperature, args.message)
    return 0


def converse(config: Config, temperature: float, messages: list[str] | None) -> None:
    """One episode per message, shown turn by turn, on an embedded engine: servers of the run may have other weights.

    Raises:
        ValueError: the folder holds no exported model.
    """
    import dataclasses

    from spear_megatron.cli.agents import load_engine, load_renderer, max_model_len, open_environment, samplings
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rollout.embedded import EmbeddedEngine

    path = config.actor_rollout_ref.model.path
    shape = ModelShape.from_folder(path)
    renderer = load_renderer(path, shape.vocab_size)
    engine = EmbeddedEngine(shape, max_num_seqs=1, max_model_len=max_model_len(config))
    load_engine(engine, path, shape)
    make_environment, sandbox = open_environment(config)
    sampling = dataclasses.replace(samplings(config)[1], temperature=temperature)
    parts = {"engine": engine, "renderer": renderer, "sampling": sampling}
    with asyncio.Runner() as runner:  # the loop runs during an episode only, so that Ctrl-C reaches the prompt
        try:
            for number, text in enumerate(messages if messages is not None else _typed()):
                asked = text + config.data.instruction
                runner.run(answer(config, asked, number, environment=make_environment(), **parts))
        finally:
            runner.run(engine.close())
            if sandbox is not None:
                runner.run(sandbox.close())


async def answer(config: Config, text: str, number: int, **parts: Any) -> None:
    """Play one episode on ``text`` and print its turns."""
    from rich.console import Console

    from spear_megatron.cli.agents import episode_limits
    from spear_megatron.observability.view import message_panel
    from spear_megatron.parallel.seeds import derive_key
    from spear_megatron.rollout.agent_loop import run_episode
    from spear_megatron.types import Prompt, RewardParts, Trajectory, TrajectoryId

    async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        return trajectory.reward

    trajectory = await run_episode(
        reward=no_reward,
        prompt=Prompt(task_id=f"chat-{number}", messages=({"role": "user", "content": text},)),
        trajectory_id=TrajectoryId(0, number, 0),
        noise_key=derive_key(config.trainer.seed, "chat", number),
        limits=episode_limits(config),
        **parts,
    )
    console = Console(highlight=False)
    for message in trajectory.messages:
        console.print(message_panel(message))
    console.print(f"[dim]{trajectory.stop_reason.value}{': ' + trajectory.error if trajectory.error else ''}[/dim]")


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
