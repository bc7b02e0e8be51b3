"""``chat RUN_DIR``: talk to a trained agent, with its tools, in a terminal, or watch it at a held-out task."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from spear_megatron.config.schema import Config
    from spear_megatron.data.chat import ChatRenderer
    from spear_megatron.types import Prompt, RewardParts, Trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``chat`` to ``parser``."""
    parser.add_argument("run_dir", help="run directory, or a model folder in Hugging Face format")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature, 0 is greedy")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--message", action="append", help="ask this and leave; may be given several times")
    asked.add_argument(
        "--task", action="append", type=int, metavar="N",
        help="play the held-out task at this place (0 is the first) and leave; may be given several times",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Answer messages until an empty line or the end of the input, or play the tasks that were asked for."""
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
    failed = converse(config, args.temperature, args.message, args.task)
    return 1 if failed and (args.message is not None or args.task is not None) else 0


def converse(config: Config, temperature: float, messages: list[str] | None, tasks: list[int] | None = None) -> int:
    """One episode per message, shown turn by turn, on an embedded engine: servers of the run may have other weights.

    Args:
        messages: None asks for them, unless there are tasks.
        tasks: places among the held-out tasks; their episodes are scored by the run's reward.

    Returns:
        How many episodes failed for reasons other than the model.

    Raises:
        ValueError: the folder holds no exported model, or there is no such task.
    """
    import dataclasses

    from spear_megatron.cli.agents import load_engine, load_renderer, max_model_len, open_environment, samplings
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rewards.registry import build_reward
    from spear_megatron.rollout.embedded import EmbeddedEngine

    path = config.actor_rollout_ref.model.path
    shape = ModelShape.from_folder(path)
    renderer = load_renderer(path, shape.vocab_size)
    prompts = _asked(config, messages) if tasks is None else iter(held_out(config, renderer, tasks))
    engine = EmbeddedEngine(shape, max_num_seqs=1, max_model_len=max_model_len(config))
    load_engine(engine, path, shape)
    reward = _unscored if tasks is None else build_reward(config.reward)
    make_environment, sandbox = open_environment(config)
    sampling = dataclasses.replace(samplings(config)[1], temperature=temperature)
    parts = {"engine": engine, "renderer": renderer, "sampling": sampling, "reward": reward}
    failed = 0
    with asyncio.Runner() as runner:  # the loop runs during an episode only, so that Ctrl-C reaches the prompt
        try:
            for number, prompt in enumerate(prompts):
                fine = runner.run(answer(config, prompt, number, environment=make_environment(), **parts))
                failed += not fine
        finally:
            runner.run(engine.close())
            if sandbox is not None:
                runner.run(sandbox.close())
            getattr(reward, "close", lambda: None)()
    return failed


def held_out(config: Config, renderer: ChatRenderer, places: Sequence[int]) -> list[Prompt]:
    """The tasks at these places of ``data.val_files``, or of the generator's held-out ones. Raises ValueError."""
    from spear_megatron.cli.agents import load_episode_prompts

    prompts = load_episode_prompts(config, "val", renderer)
    for place in places:
        if not 0 <= place < len(prompts):
            raise ValueError(f"--task {place}: there are {len(prompts)} held-out tasks, give 0 to {len(prompts) - 1}")
    return [prompts[place] for place in places]


def _asked(config: Config, messages: list[str] | None) -> Iterator[Prompt]:
    from spear_megatron.types import Prompt

    for number, text in enumerate(messages if messages is not None else _typed()):
        content = text + config.data.instruction
        yield Prompt(task_id=f"chat-{number}", messages=({"role": "user", "content": content},))


async def _unscored(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return trajectory.reward


async def answer(config: Config, prompt: Prompt, number: int, **parts: Any) -> bool:
    """Play one episode and print its turns; False if something else than the model failed."""
    from rich.console import Console

    from spear_megatron.cli.agents import episode_limits
    from spear_megatron.observability.view import message_panel
    from spear_megatron.parallel.seeds import derive_key
    from spear_megatron.rollout.agent_loop import run_episode
    from spear_megatron.types import StopReason, TrajectoryId

    trajectory = await run_episode(
        prompt=prompt,
        trajectory_id=TrajectoryId(0, number, 0),
        noise_key=derive_key(config.trainer.seed, "chat", number),
        limits=episode_limits(config),
        **parts,
    )
    console = Console(highlight=False)
    for message in trajectory.messages:
        console.print(message_panel(message))
    scored = parts["reward"] is not _unscored
    stopped = trajectory.stop_reason.value + (f": {trajectory.error}" if trajectory.error else "")
    console.print(stopped, style="dim", markup=False)
    fine = trajectory.stop_reason is not StopReason.INFRASTRUCTURE
    if fine and scored:
        _print_verdict(console, prompt, trajectory.reward)
    elif not fine and not scored:
        console.print(
            "the environment gets the message alone here: no answer, and an empty prompt.extra; --task N plays a "
            "held-out task",
            style="dim",
        )
    return fine


def _print_verdict(console: Console, prompt: Prompt, reward: RewardParts) -> None:
    from spear_megatron.observability.view import safe

    verdict = "solved" if reward.success else "not solved"
    line = f"{prompt.task_id}: {verdict}, outcome {reward.outcome:+g}, penalty {reward.penalty:+g}"
    expected = f", expected answer: {prompt.answer}" if prompt.answer is not None else ""
    console.print(safe(line + expected), style="green" if reward.success else "red", markup=False)


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
