"""Observers of ``actor_rollout_ref.rollout.*``: what is asked of the engine, and what the engine does."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from observers.core import Observer, Observers, refused
from observers.scripted_run import NO_SANDBOX, episode, figure, run_scripted

from spear_megatron.config.schema import Config

_ROLLOUT = "actor_rollout_ref.rollout"


def train_tasks(config: Config, scratch: Path) -> Any:
    """Samples and sampling of every step."""
    return [(tasks.num_samples, dataclasses.asdict(tasks.sampling)) for tasks in run_scripted(config).tasks]


def val_tasks(config: Config, scratch: Path) -> Any:
    """Samples and sampling of every evaluation."""
    return [(tasks.num_samples, dataclasses.asdict(tasks.sampling)) for tasks in run_scripted(config).evaluations]


def engine_steps(config: Config, scratch: Path) -> Any:
    """Steps that the engine takes for six requests of 4 tokens, or why it refuses them."""
    from spear_megatron.cli.agents import load_engine, load_renderer, open_agents
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rollout.engine import GenerateRequest, SamplingParams

    folder = config.actor_rollout_ref.model.path
    shape = ModelShape.from_folder(folder)
    with open_parallel(config) as parallel, open_agents(config, parallel, load_renderer(folder), shape) as agents:
        engine: Any = agents.engine
        load_engine(engine, folder, shape)

        async def all_of_them() -> None:
            sampling = SamplingParams(4)
            prompts = [tuple(range(10, 30 + 10 * i)) for i in range(6)]
            requests = [GenerateRequest(f"r{i}", prompt, sampling, i) for i, prompt in enumerate(prompts)]
            await asyncio.gather(*map(engine.generate, requests))

        agents.collector._runner.run(all_of_them())
        return engine.stats.num_steps


def engine_kind(config: Config, scratch: Path) -> Any:
    """The engine, where a server is there."""
    from spear_megatron.cli.agents import open_engine
    from spear_megatron.model.shape import ModelShape

    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    return type(open_engine(config, shape, 0, 1, ("http://127.0.0.1:9",))).__name__


def held_groups(config: Config, scratch: Path) -> Any:
    """(born, task) of the groups that are left over when one of three groups was accepted in each of two steps."""
    from spear_megatron.cli.agents import load_engine, load_renderer, open_agents, samplings
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.data.prompts import load_prompts
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.rollout.collect import Tasks

    folder = config.actor_rollout_ref.model.path
    shape, prompts = ModelShape.from_folder(folder), load_prompts(config.data, "train")
    with open_parallel(config) as parallel, open_agents(config, parallel, load_renderer(folder), shape) as agents:
        assert agents.engine is not None
        load_engine(agents.engine, folder, shape)
        left, sampling = list(enumerate(prompts[:3])), samplings(config)[0]
        for step in (1, 2):
            collected = agents.collector.collect(Tasks("train", step, tuple(left), 2, sampling, wanted=1))
            (decision,) = collected.acceptances
            left = [pair for pair in left if pair[0] in decision.dropped]
        return [(group.born, group.task) for group in agents.collector.held]


def tool_episode(config: Config, scratch: Path) -> Any:
    """An episode whose policy asks for the tool twice and then answers."""
    return episode(config, ["1", "2", "\\boxed{3}"])


def gate(config: Config, scratch: Path) -> Any:
    """What the gate records of a run whose engine reports random log-probs, what it leaves, or what stops the run."""
    from spear_megatron.parallel.errors import RunError

    names = ("mismatch/warned", "mismatch/over_bound", "filter/mismatch")
    try:
        seen: Any = [[line.get(name) for name in names] for line in run_scripted(config).record]
    except RunError as error:
        seen = str(error).partition(":")[0]
    return seen, sorted(path.name for path in scratch.glob("run/mismatch/*"))


def nonfinite_batches(config: Config, scratch: Path) -> Any:
    """Batches that are left of three updates that were not finite."""
    from observers.scripted_run import ScriptedRun, scripted

    from spear_megatron.trainer.actor import UpdateResult
    from spear_megatron.trainer.loop import train

    with scripted(config, ScriptedRun()) as run:
        run.parts.actor.update = lambda rows, **options: UpdateResult("nonfinite", {})
        train(run)
    return sorted(path.name for path in scratch.glob("run/nonfinite/*"))


_LONG = ("data.max_response_length=200",)
_VALIDATES = ("trainer.test_freq=1",)
_OVER = (f"{_ROLLOUT}.over_sampling=1.5", "algorithm.rollout_correction.mode=tis")
OBSERVERS: Observers = {
    f"{_ROLLOUT}.name": Observer(engine_kind, ("embedded", "sglang")),
    f"{_ROLLOUT}.n": Observer(train_tasks, ("2", "3")),
    f"{_ROLLOUT}.temperature": Observer(train_tasks, ("1.0", "0.7")),
    f"{_ROLLOUT}.top_p": refused("1.0", "0.9"),
    f"{_ROLLOUT}.top_k": refused("-1", "20"),
    f"{_ROLLOUT}.max_num_seqs": Observer(engine_steps, ("8", "2"), NO_SANDBOX),
    f"{_ROLLOUT}.max_model_len": Observer(engine_steps, ("null", "64"), NO_SANDBOX),
    f"{_ROLLOUT}.over_sampling": Observer(figure("oversampling/groups_unfinished"), ("1.0", "1.5")),
    f"{_ROLLOUT}.partial_rollout": Observer(figure("partial/groups_held"), ("false", "true"), _OVER),
    f"{_ROLLOUT}.partial_rollout_max_age": Observer(
        held_groups, ("1", "2"), (*NO_SANDBOX, *_OVER, f"{_ROLLOUT}.partial_rollout=true", f"{_ROLLOUT}.max_num_seqs=4")
    ),
    f"{_ROLLOUT}.multi_turn.max_assistant_turns": Observer(tool_episode, ("3", "2"), _LONG),
    f"{_ROLLOUT}.multi_turn.max_tool_response_length": Observer(tool_episode, ("256", "24"), _LONG),
    f"{_ROLLOUT}.mismatch.warn": Observer(gate, ("0.05", "null")),
    f"{_ROLLOUT}.mismatch.stop": Observer(gate, ("null", "0.06")),
    f"{_ROLLOUT}.mismatch.mask": Observer(gate, ("null", "0.06")),
    f"{_ROLLOUT}.mismatch.mask_by": Observer(gate, ("abs_diff", "k3"), (f"{_ROLLOUT}.mismatch.mask=4.5",)),
    f"{_ROLLOUT}.mismatch.token_bound": Observer(gate, ("0.1", "50.0")),
    f"{_ROLLOUT}.mismatch.keep_batches": Observer(
        nonfinite_batches, ("5", "1"), ("trainer.max_nonfinite_steps=9", "trainer.total_training_steps=3")
    ),
    f"{_ROLLOUT}.val_kwargs.n": Observer(val_tasks, ("1", "2"), _VALIDATES),
    f"{_ROLLOUT}.val_kwargs.temperature": Observer(val_tasks, ("1.0", "0.0"), _VALIDATES),
    f"{_ROLLOUT}.val_kwargs.top_p": Observer(val_tasks, ("1.0", "0.9"), _VALIDATES),
    f"{_ROLLOUT}.val_kwargs.top_k": Observer(val_tasks, ("-1", "20"), _VALIDATES),
}
