"""From the resolved configuration to what a data-parallel leader rolls out with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spear_megatron.cli.servers import open_rollout_servers
from spear_megatron.config.schema import Config
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.generator import Split
from spear_megatron.data.prompts import load_prompts
from spear_megatron.environments.protocol import Reward, final_text
from spear_megatron.environments.registry import EnvironmentFactory, environment_factory, needs_sandbox, opening_of
from spear_megatron.environments.sandbox.factory import open_sandbox
from spear_megatron.environments.sandbox.protocol import Sandbox
from spear_megatron.environments.workers.factory import open_workers
from spear_megatron.environments.workers.pool import WorkerPool
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.agreement import agreed, gather_objects
from spear_megatron.parallel.paths import check_input_folder
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rewards.answers import canonical_answer
from spear_megatron.rewards.registry import build_reward
from spear_megatron.rollout.acceptance import FILE, AcceptanceLog, read_decisions
from spear_megatron.rollout.agent_loop import EpisodeLimits
from spear_megatron.rollout.collect import Collector, Tasks
from spear_megatron.rollout.config import RolloutConfig
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import Engine, SamplingParams, is_colocated
from spear_megatron.rollout.oversampling import Drawing, Drawn, Portion, StoppableEngine, draw_groups
from spear_megatron.rollout.prompt_lengths import check_prompt_lengths
from spear_megatron.rollout.scheduler import EpisodeRunner, collect_groups
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.rollout.sglang.start import Servers
from spear_megatron.types import Group, Prompt, Trajectory


def load_renderer(folder: str | Path, vocab_size: int | None = None) -> ChatRenderer:
    """Chat rendering with the tokenizer of a Hugging Face folder.

    Args:
        vocab_size: rows of the model's embedding, which must hold every token; None where there is no model.

    Raises:
        ValueError: the folder has no usable tokenizer or chat template, or its tokens are not those of the model.
    """
    from transformers import AutoTokenizer

    check_input_folder(folder, "give a model folder in Hugging Face format")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a library raises on files that it cannot use
        reason = " ".join(str(error).split())[:200]
        remedy = "copy config.json and the tokenizer files of the model there"
        raise ValueError(f"{folder} has no usable tokenizer ({type(error).__name__}: {reason}): {remedy}") from error
    try:
        renderer = ChatRenderer(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has token ids up to {largest}, but config.json a vocab_size of {vocab_size}: "
            "copy the tokenizer files that belong to this model there"
        )
    return renderer


def load_episode_prompts(config: Config, split: Split, renderer: ChatRenderer) -> list[Prompt]:
    """The prompts of a split, none of them too long to begin an episode with.

    Raises:
        ValueError: a row cannot be used, or a prompt exceeds ``data.max_prompt_length`` (environments that tell their
            opening only in an episode are not asked: there the episode refuses it).
    """
    prompts = load_prompts(config.data, split)
    opening = opening_of(config.env)
    if opening is not None:
        check_prompt_lengths(prompts, opening, renderer, max_prompt_length=config.data.max_prompt_length)
    return prompts


def max_model_len(config: Config) -> int:
    """Tokens that one segment may hold."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    return config.actor_rollout_ref.rollout.max_model_len or longest


def episode_limits(config: Config) -> EpisodeLimits:
    """Bounds of one episode."""
    rollout = config.actor_rollout_ref.rollout
    return EpisodeLimits(
        max_turns=rollout.multi_turn.max_assistant_turns,
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=config.data.max_response_length,
        max_model_len=max_model_len(config),
        max_tool_response_length=rollout.multi_turn.max_tool_response_length,
    )


def samplings(config: Config) -> tuple[SamplingParams, SamplingParams]:
    """Sampling of training and of evaluation."""
    rollout = config.actor_rollout_ref.rollout
    train = SamplingParams(max_new_tokens=config.data.max_response_length, temperature=rollout.temperature)
    val = rollout.val_kwargs
    return train, replace(train, temperature=val.temperature, top_p=val.top_p, top_k=val.top_k)


def open_environment(config: Config) -> tuple[EnvironmentFactory, Sandbox | WorkerPool | None]:
    """The environment's factory, and what its episodes share: a sandbox if they run code, or their workers."""
    if config.env.workers.backend != "local":
        pool = open_workers(config.env)
        return pool.environment, pool
    sandbox = open_sandbox(config.env.sandbox) if needs_sandbox(config.env) else None
    return environment_factory(config.env, sandbox), sandbox


def open_engine(
    config: Config, shape: ModelShape, dp_rank: int, dp_size: int, servers: Sequence[str] | None = None
) -> Engine:
    """The engine of one of ``dp_size`` leaders: its own embedded one, or its share of the servers that all use.

    ``servers`` are those that the run started; None takes the configured ones.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "embedded":
        return EmbeddedEngine(shape, max_num_seqs=rollout.max_num_seqs, max_model_len=max_model_len(config))
    return SGLangEngine(
        shape,
        rollout.sglang,
        servers=rollout.sglang.servers if servers is None else servers,
        max_in_flight=share_of_server(rollout, dp_size),
        max_model_len=max_model_len(config),
        sends_weights=dp_rank == 0,
    )


def share_of_server(rollout: RolloutConfig, dp_size: int) -> int:
    """Requests that one of ``dp_size`` leaders may keep at each server."""
    return max(1, (rollout.sglang.max_in_flight or rollout.max_num_seqs) // dp_size)


def max_episodes(rollout: RolloutConfig, dp_size: int, num_servers: int | None = None) -> int:
    """Episodes that one leader plays at a time: twice what its engine computes, as half of them wait for tools."""
    if rollout.name == "embedded":
        return 2 * rollout.max_num_seqs
    num_servers = len(rollout.sglang.servers) if num_servers is None else num_servers
    return 2 * share_of_server(rollout, dp_size) * num_servers


def load_engine(engine: Engine, folder: str | Path, shape: ModelShape) -> None:
    """Fill an engine with the weights of a Hugging Face folder, one tensor at a time."""
    with HFWeights.open(folder, shape) as weights:
        engine.update_weights(((name, weights.read(name)) for name in shape.parameter_shapes()), 0)


def canonical_answer_of(trajectory: Trajectory) -> str | None:
    """Final answer of a trajectory, for majority votes."""
    return canonical_answer(final_text(trajectory.messages))


@dataclass
class Agents:
    """What a data-parallel leader rolls out with; on other ranks everything is None and only ``collector`` is used."""

    collector: Collector
    engine: Engine | None = None
    sandbox: Sandbox | WorkerPool | None = None
    reward: Reward | None = None
    servers: Servers = Servers((), None)

    def take_metrics(self) -> dict[str, float]:
        """Figures of this rank's engine since the last call, and of the servers that this rank started."""
        engine = self.engine.stats.take_metrics() if isinstance(self.engine, SGLangEngine) else {}
        return {**engine, **(self.servers.fleet.metrics() if self.servers.fleet is not None else {})}

    def close(self) -> None:
        """Stop engine, sandbox and answer checkers."""
        with contextlib.ExitStack() as stack:  # each is closed though an earlier one failed
            stack.callback(getattr(self.reward, "close", lambda: None))
            parts = [part for part in (self.engine, self.sandbox) if part is not None]
            stack.callback(self.collector.close, *(part.close for part in parts))


@contextlib.contextmanager
def open_agents(
    config: Config,
    parallel: ParallelState,
    renderer: ChatRenderer,
    shape: ModelShape,
    engine_factory: Callable[[int], Engine] | None = None,
) -> Iterator[Agents]:
    """Engine, sandbox, environment and reward on every leader, and the collector on every rank.

    ``engine_factory`` makes the engine of one of so many leaders, in place of :func:`open_engine`.

    Raises:
        ValueError: a name in env.* or reward.* cannot be resolved, or no sandbox works here.
        RunError: the same of some rank, on all of several.
    """
    leaders = [rank for rank, leads in enumerate(gather_objects(parallel, parallel.is_leader)) if leads]
    collector = functools.partial(
        Collector,
        parallel,
        leaders=leaders,
        timeout_s=config.trainer.collect_timeout_s,
        decisions=open_decisions(config, parallel),
        background=config.trainer.async_ > 0,
    )
    with open_rollout_servers(config, parallel, shape, max_model_len(config)) as servers:
        with agreed(parallel, "start of the agents"):
            if parallel.is_leader:
                if engine_factory is not None:
                    engine = engine_factory(parallel.dp_size)
                else:
                    engine = open_engine(config, shape, parallel.dp_rank, parallel.dp_size, servers.urls)
                agents = _leader_agents(config, parallel, renderer, engine, collector, servers)
            else:
                agents = Agents(collector(None), servers=servers)
        try:
            yield agents
        finally:
            agents.close()


def open_decisions(config: Config, parallel: ParallelState) -> AcceptanceLog:
    """What earlier processes of this run accepted into its steps, the same on every rank; rank 0 continues the file.

    Raises:
        ValueError: the file is damaged.
        RunError: the same, on all of several ranks.
    """
    path = Path(config.trainer.default_local_dir) / FILE
    known: list[dict[str, Any]] = []
    with agreed(parallel, f"reading {FILE}"):
        if parallel.rank == 0:
            known = read_decisions(path)
    known = gather_objects(parallel, known)[0]
    with agreed(parallel, f"reading {FILE}"):
        return AcceptanceLog(known, path if parallel.rank == 0 else None)


def check_engine_for(config: Config, engine: Engine) -> None:
    """Refuse what this engine cannot do. Raises ValueError."""
    if config.trainer.async_ and is_colocated(engine):
        raise ValueError(
            f"trainer.async={config.trainer.async_} samples while the trainer updates, but the engine "
            f"actor_rollout_ref.rollout.name={config.actor_rollout_ref.rollout.name} has no copy of the weights of its "
            "own: set trainer.async=0 or take another engine"
        )


def _leader_agents(
    config: Config,
    parallel: ParallelState,
    renderer: ChatRenderer,
    engine: Engine,
    collector: Callable[..., Collector],
    servers: Servers,
) -> Agents:
    rollout = config.actor_rollout_ref.rollout
    reward = build_reward(config.reward)
    check_engine_for(config, engine)
    make_environment, sandbox = open_environment(config)  # last: it starts processes, which a failure would leave
    max_concurrency = max_episodes(rollout, parallel.dp_size, len(servers.urls))

    def runner(engine: Engine, tasks: Tasks) -> EpisodeRunner:
        return EpisodeRunner(
            engine=engine,
            renderer=renderer,
            environment_factory=make_environment,
            reward=reward,
            limits=episode_limits(config),
            sampling=tasks.sampling,
            seed=config.trainer.seed,
            purpose=tasks.purpose,
        )

    async def run_groups(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        return await collect_groups(
            own,
            run=runner(engine, tasks),
            step=tasks.step,
            num_samples=tasks.num_samples,
            max_concurrency=max_concurrency,
            deadline_s=config.trainer.collect_timeout_s,
            keeper=tasks.keeper,
        )

    async def run_drawn(tasks: Tasks, portion: Portion) -> Drawn:
        stoppable = StoppableEngine(engine)
        drawing = Drawing(
            step=tasks.step,
            num_samples=tasks.num_samples,
            run=runner(stoppable, tasks),
            stop=stoppable.stop,
            owner=parallel.dp_rank,
            max_concurrency=max_concurrency,
            deadline_s=config.trainer.collect_timeout_s,
            max_age=rollout.partial_rollout_max_age if rollout.partial_rollout else 0,
        )
        return await draw_groups(drawing, portion)

    return Agents(collector(run_groups, run_drawn=run_drawn), engine, sandbox, reward, servers)
