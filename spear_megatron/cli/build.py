"""From the resolved configuration to the components of a run. The only place that knows the whole configuration."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.config.describe import flatten
from spear_megatron.config.schema import Config
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.prompts import PromptSource, load_prompts
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.environments.protocol import Reward, final_text
from spear_megatron.environments.registry import EnvironmentFactory, environment_factory, needs_sandbox
from spear_megatron.environments.sandbox.factory import open_sandbox
from spear_megatron.environments.sandbox.protocol import Sandbox
from spear_megatron.model.hf_export import export_hf
from spear_megatron.model.hf_folder import HFWeights
from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.record import NullRecorder, Recorder, RunRecorder
from spear_megatron.observability.trajectories import TrajectoryStore
from spear_megatron.parallel.agreement import agree_ok, gather_objects
from spear_megatron.parallel.state import ParallelState, initialize
from spear_megatron.rewards.answers import canonical_answer
from spear_megatron.rewards.registry import build_reward
from spear_megatron.rollout.agent_loop import EpisodeLimits
from spear_megatron.rollout.collect import Collector, Tasks
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import Engine, SamplingParams
from spear_megatron.rollout.scheduler import EpisodeRunner, collect_groups
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.config import OptimConfig
from spear_megatron.trainer.optimizer import PolicyOptimizer
from spear_megatron.trainer.reference import Reference
from spear_megatron.trainer.run import Parts, Run, StepSettings
from spear_megatron.types import Group, Prompt, Trajectory
from spear_megatron.weights.sync import publish

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def start_parallel(config: Config) -> ParallelState:
    """Process groups of the configured layout, and the CPU threads of this rank."""
    megatron = config.actor_rollout_ref.actor.megatron
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.trainer.num_threads or max(1, (os.cpu_count() or 1) // local_ranks))
    return initialize(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        vpp=megatron.virtual_pipeline_model_parallel_size,
        seed=config.trainer.seed,
        timeout_s=config.trainer.collective_timeout_s,
    )


def load_renderer(folder: str | Path) -> ChatRenderer:
    """Chat rendering with the tokenizer of a Hugging Face folder.

    Raises:
        ValueError: the folder has no usable tokenizer or chat template.
    """
    from transformers import AutoTokenizer

    try:
        return ChatRenderer(AutoTokenizer.from_pretrained(str(folder)))
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder} has no usable tokenizer ({error}); copy the model's tokenizer files there") from error


def max_model_len(config: Config) -> int:
    """Tokens that one segment may hold."""
    return config.actor_rollout_ref.rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length


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


def open_environment(config: Config) -> tuple[EnvironmentFactory, Sandbox | None]:
    """The environment's factory, and the sandbox that its episodes share if they run code."""
    sandbox = open_sandbox(config.env.sandbox) if needs_sandbox(config.env) else None
    return environment_factory(config.env, sandbox), sandbox


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
    engine: Engine | None
    sandbox: Sandbox | None
    reward: Reward | None

    def close(self) -> None:
        """Stop engine, sandbox and answer checkers."""
        closers = [part.close for part in (self.engine, self.sandbox) if part is not None]
        self.collector.close(*closers)
        closer = getattr(self.reward, "close", None)
        if closer is not None:
            closer()


def build_agents(config: Config, parallel: ParallelState, renderer: ChatRenderer, shape: ModelShape) -> Agents:
    """Engine, sandbox, environment and reward on every leader, and the collector on every rank.

    Raises:
        ValueError: a name in env.* or reward.* cannot be resolved, or no sandbox works here.
    """
    leaders = [rank for rank, leads in enumerate(gather_objects(parallel, parallel.is_leader)) if leads]
    timeout_s = config.trainer.collect_timeout_s
    if not parallel.is_leader:
        return Agents(Collector(parallel, None, leaders=leaders, timeout_s=timeout_s), None, None, None)
    rollout = config.actor_rollout_ref.rollout
    make_environment, sandbox = open_environment(config)
    engine = EmbeddedEngine(shape, max_num_seqs=rollout.max_num_seqs, max_model_len=max_model_len(config))
    reward = build_reward(config.reward)

    async def run_groups(tasks: Tasks, own: Sequence[tuple[int, Prompt]]) -> list[Group]:
        runner = EpisodeRunner(
            engine=engine,
            renderer=renderer,
            environment_factory=make_environment,
            reward=reward,
            limits=episode_limits(config),
            sampling=tasks.sampling,
            seed=config.trainer.seed,
            purpose=tasks.purpose,
        )
        return await collect_groups(
            own,
            run=runner,
            step=tasks.step,
            num_samples=tasks.num_samples,
            max_concurrency=2 * rollout.max_num_seqs,
            deadline_s=timeout_s,
        )

    return Agents(Collector(parallel, run_groups, leaders=leaders, timeout_s=timeout_s), engine, sandbox, reward)


def build_actor(
    config: Config, parallel: ParallelState, shape: ModelShape, optim: OptimConfig, total_steps: int
) -> tuple[Actor, Reference | None]:
    """The policy with the weights of ``actor_rollout_ref.model.path``, its optimizer, and the reference if a KL term needs it."""
    settings, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    chunks = build_model(shape, settings.megatron, dtype=model.torch_dtype, parallel=parallel, kernels=settings.kernels)
    load_hf_folder(chunks, shape, model.path, parallel)
    wants_reference = settings.use_kl_loss or config.algorithm.use_kl_in_reward
    reference = Reference(chunks) if wants_reference else None
    with megatron_on_cpu():
        optimizer = PolicyOptimizer(
            chunks,
            optim,
            dtype=model.torch_dtype,
            use_distributed_optimizer=settings.megatron.use_distributed_optimizer,
            total_steps=total_steps,
        )
    actor = Actor(
        chunks,
        optimizer,
        parallel,
        settings,
        valid_vocab=shape.vocab_size,
        temperature=config.actor_rollout_ref.rollout.temperature,
        max_response_length=config.data.max_response_length,
    )
    return actor, reference


class StopFlag:
    """Set by SIGTERM or SIGUSR1 (what schedulers send before the end); read at step boundaries."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def samplings(config: Config) -> tuple[SamplingParams, SamplingParams]:
    """Sampling of training and of evaluation."""
    rollout = config.actor_rollout_ref.rollout
    train = SamplingParams(max_new_tokens=config.data.max_response_length, temperature=rollout.temperature)
    val = rollout.val_kwargs
    return train, replace(train, temperature=val.temperature, top_p=val.top_p, top_k=val.top_k)


def num_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, where the learning-rate decay ends."""
    actor = config.actor_rollout_ref.actor
    per_step = -(-config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs
    return per_step * config.trainer.total_training_steps


def fingerprint(config: Config) -> str:
    """Names what decides the course of training; run length, folders and layout are left out."""
    ignored = ("trainer.", "sft.", "actor_rollout_ref.actor.megatron.", "actor_rollout_ref.model.path")
    items = [f"{key}={value!r}" for key, value in flatten(config).items() if not key.startswith(ignored)]
    return hashlib.sha256("\n".join([*items, f"seed={config.trainer.seed}"]).encode()).hexdigest()[:16]


@dataclass
class BuiltRun:
    """A run ready for ``trainer.loop.train`` and what has to be closed after it."""

    run: Run
    agents: Agents
    parallel: ParallelState
    resumed_from: int | None

    def close(self) -> None:
        """Stop the agents and leave the process groups."""
        self.agents.close()
        self.parallel.destroy()


def build_run(config: Config, stop: StopFlag) -> BuiltRun:
    """Everything that ``train`` needs; a used run directory is continued from its newest good checkpoint.

    Raises:
        ValueError: on bad input, before any model is built where that is possible.
    """
    folder = Path(config.trainer.default_local_dir)
    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    renderer = load_renderer(config.actor_rollout_ref.model.path)
    train_prompts = load_prompts(config.data, "train")
    val_prompts = load_prompts(config.data, "val") if config.trainer.test_freq > 0 or config.trainer.val_before_train else []
    parallel = start_parallel(config)
    agents = build_agents(config, parallel, renderer, shape)
    actor, reference = build_actor(config, parallel, shape, config.actor_rollout_ref.actor.optim, num_optimizer_steps(config))
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        parallel=parallel,
        keep=config.trainer.max_actor_ckpt_to_keep,
        async_save=config.trainer.async_save,
        fingerprint=fingerprint(config),
        assets=Path(config.actor_rollout_ref.model.path),
    )
    agree_ok(parallel, "resume", unusable_run_dir(config, checkpoints.steps()))
    train_sampling, val_sampling = samplings(config)
    parts = Parts(
        parallel=parallel,
        actor=actor,
        reference=reference,
        prompts=PromptSource(train_prompts, seed=config.data.seed, shuffle=config.data.shuffle),
        val_prompts=val_prompts,
        collector=agents.collector,
        checkpoints=checkpoints,
        recorder=NullRecorder(),
        trajectories=None,
        publish_weights=lambda version: publish(iter_hf_tensors(actor.chunks, shape, parallel), agents.engine, version),
        export=functools.partial(_export, actor.chunks, shape, parallel, config.actor_rollout_ref.model.path),
        answer_of=canonical_answer_of,
        stop_requested=lambda: stop.requested,
    )
    settings = StepSettings(
        prompts_per_step=config.data.train_batch_size,
        samples_per_prompt=config.actor_rollout_ref.rollout.n,
        sampling=train_sampling,
        val_samples=config.actor_rollout_ref.rollout.val_kwargs.n,
        val_sampling=val_sampling,
        ppo_mini_batch_size=config.actor_rollout_ref.actor.ppo_mini_batch_size,
        ppo_epochs=config.actor_rollout_ref.actor.ppo_epochs,
    )
    run = Run(parts=parts, settings=settings, trainer=config.trainer, algorithm=config.algorithm)
    resumed_from = run.restore()
    run.parts = replace(
        parts,
        recorder=open_recorder(config, parallel, resumed_from),
        trajectories=_open_trajectories(config, parallel, renderer, resumed_from),
    )
    return BuiltRun(run=run, agents=agents, parallel=parallel, resumed_from=resumed_from)


def _export(
    chunks: Sequence[MegatronModule], shape: ModelShape, parallel: ParallelState, source: str, out_dir: Path
) -> None:
    export_hf(chunks, shape, parallel, out_dir, source)


def unusable_run_dir(config: Config, steps: Sequence[int]) -> str | None:
    """Why this run directory must not be used, or None."""
    if config.trainer.resume_mode == "disable" and steps:
        return (
            f"{config.trainer.default_local_dir} holds checkpoints up to step {max(steps)} and trainer.resume_mode is disable: "
            "choose another trainer.default_local_dir or resume_mode=auto"
        )
    return None


def open_recorder(config: Config, parallel: ParallelState, resume_step: int | None) -> Recorder:
    """The record of the run on rank 0, nothing on the others."""
    if parallel.rank != 0:
        return NullRecorder()
    return RunRecorder(
        config.trainer.default_local_dir,
        config.trainer.logger,
        resume_step=resume_step,
        total_steps=config.trainer.total_training_steps,
    )


def _open_trajectories(
    config: Config, parallel: ParallelState, renderer: ChatRenderer, resume_step: int | None
) -> TrajectoryStore | None:
    if not parallel.is_leader:
        return None
    return TrajectoryStore(
        config.trainer.default_local_dir,
        config.trainer.num_logged_trajectories,
        renderer.decode,
        shard=parallel.dp_rank,
        resume_step=resume_step,
    )
