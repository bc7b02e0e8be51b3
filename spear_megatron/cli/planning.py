"""From the configuration to the planner's words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from spear_megatron.cli.build import reads_old_log_probs
from spear_megatron.config.checks_replay import most_stored
from spear_megatron.parallel.launch import local_world_size
from spear_megatron.parallel.launch import world_size as launched_ranks
from spear_megatron.plan.assess import assess
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import GIB, Machine
from spear_megatron.plan.rank import total
from spear_megatron.plan.report import time_lines, training_peak
from spear_megatron.plan.run import EnginePlan, PlannedRun
from spear_megatron.replay.payload import BYTES_PER_RECORD, BYTES_PER_TOKEN

if TYPE_CHECKING:
    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape

CPU_FLOPS = 1e11
CPU_BANDWIDTH = 2e10


def planned_run(
    config: Config,
    shape: ModelShape,
    engine: EnginePlan,
    *,
    transformer_engine: bool = False,
    mean_tokens: int | None = None,
    sampled_share: float = 0.7,
    on_host: bool = False,
    supervised: bool = False,
) -> PlannedRun:
    """What the planner needs to know of a configuration.

    Args:
        transformer_engine: layers and Adam of Transformer Engine instead of the plain ones.
        mean_tokens: of a trajectory with its prompt; None takes half of the longest.
        sampled_share: of a trajectory's tokens.
        on_host: the ranks compute on the CPU.
        supervised: the run of ``sft``, which has no rollouts, no engine and no replay.
    """
    data, ref = config.data, config.actor_rollout_ref
    actor, rollout = ref.actor, ref.rollout
    longest = data.max_prompt_length + data.max_response_length
    mean = max(1, longest // 2) if mean_tokens is None else mean_tokens
    common: dict[str, Any] = {
        "shape": shape,
        "engine": engine,
        "mean_tokens": mean,
        "max_tokens": longest,
        "sampled_share": sampled_share,
        "micro_batch_tokens": actor.ppo_max_token_len_per_gpu,
        "max_logits_bytes": actor.max_logits_mb << 20,
        "dtype": ref.model.torch_dtype,
        "spec": "transformer_engine" if transformer_engine else "plain",
        "optimizer": "single" if on_host else "fused" if transformer_engine else "foreach",
        "eager_head": actor.kernels == "eager",
        "on_host": on_host,
    }
    if supervised:
        size = config.sft.train_batch_size
        return PlannedRun(
            prompts=size, samples=1, mini_batch_prompts=size, epochs=1, old_log_prob=False,
            save_freq=max(config.sft.save_freq, 0), **common,
        )  # fmt: skip
    trajectories = data.train_batch_size * rollout.n
    replayed = replay_bytes = 0
    if actor.enable_trajectory_replay:
        replayed = max(trajectories // 4, 1) if actor.replay.batch_size is None else actor.replay.batch_size
        stored = most_stored(config) * (mean * BYTES_PER_TOKEN + BYTES_PER_RECORD)
        replay_bytes = min(stored, int(actor.replay.max_gib * GIB))
    updates = -(-data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs
    return PlannedRun(
        prompts=data.train_batch_size,
        samples=rollout.n,
        mini_batch_prompts=actor.ppo_mini_batch_size,
        epochs=actor.ppo_epochs,
        old_log_prob=actor.old_log_prob == "trainer" and (updates > 1 or reads_old_log_probs(config)),
        reference=actor.use_kl_loss or config.algorithm.use_kl_in_reward,
        replayed=replayed,
        replay_bytes=replay_bytes,
        save_freq=max(config.trainer.save_freq, 0),
        **common,
    )


def this_machine(world_size: int) -> Machine:
    """The machine of this process; on the CPU with rates of an ordinary core per rank."""
    import torch

    local = min(local_world_size(world_size), world_size)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nodes = max(1, world_size // local)
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return Machine(nodes=nodes, gpus_per_node=local, gpu_bytes=size, host_bytes=host_bytes)
    return Machine(
        nodes=nodes,
        gpus_per_node=local,
        gpu_bytes=host_bytes,
        host_bytes=host_bytes,
        peak_flops=CPU_FLOPS,
        memory_bandwidth=CPU_BANDWIDTH,
        host_flops=CPU_FLOPS,
        host_bandwidth=CPU_BANDWIDTH,
        nvlink_bandwidth=1e9,
        network_bandwidth=1e9,
        publish_bandwidth=1e9,
        storage_bandwidth=5e8,
    )


def dry_run_lines(config: Config) -> list[str]:
    """What a run on this machine will take, in a few lines: memory of its fullest rank and node, time of a step."""
    import torch

    from spear_megatron.model.shape import ModelShape

    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    world_size = launched_ranks()
    machine, on_host = this_machine(world_size), not torch.cuda.is_available()
    rollout = config.actor_rollout_ref.rollout
    if on_host and rollout.name == "sglang" and rollout.sglang.colocated:
        return ["memory: this is a configuration for GPUs, `plan --config FILE --nodes N` estimates it for them"]
    engine = EnginePlan(kind="embedded", tp=1, max_num_seqs=rollout.max_num_seqs)
    layout = Layout(megatron=config.actor_rollout_ref.actor.megatron, world_size=world_size)
    found = assess(planned_run(config, shape, engine, on_host=on_host), layout, machine)
    lines = [
        f"memory: {training_peak(found) / GIB:.2f} GiB of tensors on the fullest rank, {total(found.host) / GIB:.2f} "
        "GiB beside them on the fullest node",
        *time_lines(found)[:1],
    ]
    return lines + [f"does not fit: {shortage.describe()}" for shortage in found.shortages]
