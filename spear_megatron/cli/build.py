"""From the resolved configuration to the components of a run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from spear_megatron.algorithms.schedules import ScheduledCurriculum
from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.cli.agents import canonical_answer_of, load_episode_prompts, load_renderer, open_agents, samplings
from spear_megatron.cli.servers import Publishing, shared_gpus
from spear_megatron.cli.session import StopFlag, open_parallel, open_record
from spear_megatron.cli.weights import open_publish
from spear_megatron.config.checks_replay import replay_rules
from spear_megatron.config.describe import flatten, to_yaml
from spear_megatron.config.schema import Config
from spear_megatron.data.batch_files import BatchFiles
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.prompts import PromptSource
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.hf_export import export_hf
from spear_megatron.model.hf_io import load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.observability.lineage import LineageStore
from spear_megatron.observability.record import NullRecorder
from spear_megatron.observability.trajectories import TrajectoryStore
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rewards.compose import RewardRule
from spear_megatron.replay.buffer import ReplayBuffer
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.config import OptimConfig
from spear_megatron.trainer.imitation import Imitation
from spear_megatron.trainer.optimizer import PolicyOptimizer
from spear_megatron.trainer.reference import Reference
from spear_megatron.trainer.parts import Parts, StepSettings
from spear_megatron.trainer.run import Run


def build_actor(
    config: Config, parallel: ParallelState, shape: ModelShape, optim: OptimConfig, total_steps: int
) -> tuple[Actor, Reference | None]:
    """The policy with the weights of ``actor_rollout_ref.model.path``, its optimizer, the reference for a KL term."""
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
            overlap_param_gather=settings.megatron.overlap_param_gather,
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
        mini_batch_rows=settings.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n,
        correction=config.algorithm.rollout_correction,
        seed=config.trainer.seed,
    )
    return actor, reference


def num_optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, where the learning-rate decay ends."""
    actor = config.actor_rollout_ref.actor
    per_step = -(-config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs
    return per_step * config.trainer.total_training_steps


def fingerprint(config: Config) -> str:
    """Names what decides the course of training; run length, folders and layout are left out."""
    ignored = (
        "trainer.", "sft.", "actor_rollout_ref.actor.megatron.", "actor_rollout_ref.model.path",
        "actor_rollout_ref.rollout.sglang.",
    )  # fmt: skip
    items = [f"{key}={value!r}" for key, value in flatten(config).items() if not key.startswith(ignored)]
    decisive = [f"seed={config.trainer.seed}", *(["async=1"] if config.trainer.async_ else [])]
    return hashlib.sha256("\n".join([*items, *decisive]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def open_run(config: Config, stop: StopFlag) -> Iterator[Run]:
    """A run ready for ``trainer.loop.train``; a used run directory is continued from its newest good checkpoint.

    Everything is closed at the end, after an error too.

    Raises:
        ValueError: on bad input, before any model is built where that is possible.
        RunError: the run cannot start or cannot be continued.
    """
    model = config.actor_rollout_ref.model.path
    shape = ModelShape.from_folder(model)
    renderer = load_renderer(model, shape.vocab_size)
    train_prompts = load_episode_prompts(config, "train", renderer)
    validates = config.trainer.test_freq > 0 or config.trainer.val_before_train
    val_prompts = load_episode_prompts(config, "val", renderer) if validates else []
    with contextlib.ExitStack() as stack:
        parallel = stack.enter_context(open_parallel(config))
        agents = stack.enter_context(open_agents(config, parallel, renderer, shape))
        imitation = build_imitation(config, parallel)
        if imitation is not None:
            stack.callback(imitation.buffer.close)
        checkpoints = open_checkpoints(config, parallel, imitation.buffer.collect if imitation else None)
        optim = config.actor_rollout_ref.actor.optim
        actor, reference = build_actor(config, parallel, shape, optim, num_optimizer_steps(config))
        publishing = Publishing(
            parallel,
            agents.servers,
            stack.enter_context(open_publish(config, actor, shape, parallel, agents)),
            shared_gpus(config, parallel, agents.servers, actor.optimizer),
        )
        parts = Parts(
            parallel=parallel,
            actor=actor,
            reference=reference,
            prompts=PromptSource(train_prompts, seed=config.data.seed, shuffle=config.data.shuffle),
            val_prompts=val_prompts,
            collector=agents.collector,
            checkpoints=checkpoints,
            recorder=NullRecorder(),
            batch_files=open_batch_files(config, parallel),
            trajectories=None,
            publish_weights=publishing.publish,
            export=lambda folder: export_hf(actor.chunks, shape, parallel, folder, model),
            answer_of=canonical_answer_of,
            stop_requested=lambda: stop.requested,
            curriculum=build_curriculum(config),
            imitation=imitation,
            engine_metrics=agents.take_metrics if config.actor_rollout_ref.rollout.name == "sglang" else None,
            to_training=publishing.to_training,
        )
        run = Run(parts=parts, settings=step_settings(config), trainer=config.trainer, algorithm=config.algorithm)
        stack.callback(run.watch.close)
        publishing.to_training()  # servers on the same GPUs make room for the optimizer's states of a checkpoint
        resume_step = run.restore()
        recorder = stack.enter_context(open_record(config, parallel, resume_step))
        trajectories = _open_trajectories(config, parallel, renderer, resume_step)
        lineage = None
        if imitation is not None and parallel.rank == 0:
            lineage = LineageStore(config.trainer.default_local_dir, resume_step)
            stack.callback(lineage.close)
        run.parts = replace(parts, recorder=recorder, trajectories=trajectories, lineage=lineage)
        yield run


def step_settings(config: Config) -> StepSettings:
    """The values of the configuration that the phases of a step need."""
    ref = config.actor_rollout_ref
    train_sampling, val_sampling = samplings(config)
    return StepSettings(
        prompts_per_step=config.data.train_batch_size,
        samples_per_prompt=ref.rollout.n,
        sampling=train_sampling,
        val_samples=ref.rollout.val_kwargs.n,
        val_sampling=val_sampling,
        ppo_mini_batch_size=ref.actor.ppo_mini_batch_size,
        ppo_epochs=ref.actor.ppo_epochs,
        rule=RewardRule(
            form=config.algorithm.toolcall_reward_form,
            cap=config.algorithm.toolcall_reward_max,
            format_reward=config.algorithm.format_reward,
            invalid_action_penalty=invalid_action_penalty(config),
        ),
        rollout_filter_ratio=ref.rollout.rollout_filter_ratio,
        rollout_filter_type=ref.rollout.rollout_filter_type,
        invalid_action_penalty=invalid_action_penalty(config),
        replay_update=ref.actor.replay.update,
        old_log_prob=ref.actor.old_log_prob,
        needs_old_log_probs=reads_old_log_probs(config),
        mismatch=ref.rollout.mismatch,
        over_sampling=ref.rollout.over_sampling,
        partial_rollout=ref.rollout.partial_rollout,
        max_segment_length=config.data.max_prompt_length + config.data.max_response_length,
    )


def invalid_action_penalty(config: Config) -> float:
    """What a turn without a usable action costs."""
    actor = config.actor_rollout_ref.actor
    return actor.invalid_action_penalty_coef if actor.use_invalid_action_penalty else 0.0


def reads_old_log_probs(config: Config) -> bool:
    """Whether replay, a covariance selection, the rollout correction or the mask of mismatches needs log-probs from
    before the update."""
    if config.actor_rollout_ref.rollout.mismatch.mask is not None:
        return True
    actor, loss = config.actor_rollout_ref.actor, config.actor_rollout_ref.actor.policy_loss
    selects = loss.mode(replayed=False) in ("clip_cov", "kl_cov") and loss.cov_scope == "mini_batch"
    return actor.enable_trajectory_replay or selects or config.algorithm.rollout_correction.mode != "none"


def build_curriculum(config: Config) -> ScheduledCurriculum:
    """The schedules of mu(t) and gamma(t)."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    return ScheduledCurriculum(
        mode=algorithm.use_toolcall_reward,
        max_steps=algorithm.max_toolcall_steps,
        coef=actor.replay_loss_coef,
        warmup_steps=actor.max_replay_loss_steps,
    )


def build_imitation(config: Config, parallel: ParallelState) -> Imitation | None:
    """The replay buffer and what is done with it, if ``enable_trajectory_replay`` is set."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if not actor.enable_trajectory_replay:
        return None
    temperature = config.actor_rollout_ref.rollout.temperature
    multiple = actor.megatron.token_multiple
    buffer = ReplayBuffer(
        replay_rules(config),
        parallel,
        Path(config.trainer.default_local_dir),
        baseline_size=actor.baseline_buffer_size,
        seed=config.trainer.seed,
        temperature=temperature,
        max_tokens=actor.ppo_max_token_len_per_gpu // multiple * multiple,
    )
    keeps_steps = actor.replay.step_term == "keep" and algorithm.adv_estimator == "gigpo"
    return Imitation(
        buffer=buffer,
        parallel=parallel,
        temperature=temperature,
        batch_size=actor.replay.batch_size,
        step_term_weight=algorithm.gigpo.step_advantage_w if keeps_steps else 0.0,
        baseline_groups=actor.replay.baseline_groups,
    )


def open_checkpoints(
    config: Config, parallel: ParallelState, collect: Callable[[set[str]], None] | None = None
) -> CheckpointManager:
    """The checkpoints of the run directory; ``collect`` is told which files outside of them they name.

    Raises:
        ValueError: it holds checkpoints and ``trainer.resume_mode`` is disable.
        RunError: the folder cannot be used.
    """
    trainer = config.trainer
    checkpoints = CheckpointManager(
        Path(trainer.default_local_dir) / "checkpoints",
        parallel=parallel,
        keep=trainer.max_actor_ckpt_to_keep,
        async_save=trainer.async_save,
        fingerprint=fingerprint(config),
        assets=Path(config.actor_rollout_ref.model.path),
        collect=collect,
    )
    steps = checkpoints.steps()
    if trainer.resume_mode == "disable" and steps:
        raise ValueError(
            f"{trainer.default_local_dir} holds checkpoints up to step {max(steps)} and trainer.resume_mode is "
            "disable: choose another trainer.default_local_dir or resume_mode=auto"
        )
    return checkpoints


def open_batch_files(config: Config, parallel: ParallelState) -> BatchFiles:
    """Where a run saves batches that something is wrong with."""
    ref = config.actor_rollout_ref
    return BatchFiles(
        Path(config.trainer.default_local_dir),
        parallel,
        keep=ref.rollout.mismatch.keep_batches,
        config_yaml=to_yaml(config),
        model_path=ref.model.path,
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
        num_shards=parallel.dp_size,
    )
