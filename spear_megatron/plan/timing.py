"""Estimated seconds of a training step, from peak rates and stated efficiencies. No part of it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from spear_megatron.model.shape import ModelShape
from spear_megatron.plan.engine import BF16, kv_bytes_per_token
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import Machine
from spear_megatron.plan.run import PlannedRun

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds by phase; a training step is their sum, as phases follow each other.

    Attributes:
        rollout, old_log_prob, ref, update, publish, save: phases. Those of the trainer hold computation, bubble and
            communication.
        bubble: share of the update that pipeline stages wait. tensor_parallel, data_parallel: seconds of the update
            that these collectives take, none of it hidden (context parallelism's count as tensor parallel).
        mfu: model operations of the update over what the GPUs could have done in its time.
    """

    rollout: float
    old_log_prob: float
    ref: float
    update: float
    publish: float
    save: float
    bubble: float
    tensor_parallel: float
    data_parallel: float
    mfu: float

    @property
    def total(self) -> float:
        return self.rollout + self.old_log_prob + self.ref + self.update + self.publish + self.save


def forward_flops(shape: ModelShape, tokens: float, context: float, sampled_share: float) -> float:
    """Operations of a forward pass: 2 per weight of the layers and token, 4 Q * context / 2 per layer and token for
    causal attention (Q: columns of all query heads), 2 V H for rows of sampled tokens (arXiv 2104.04473, appendix).
    """
    head = shape.vocab_size * shape.hidden_size
    layers = shape.num_parameters() - head * (1 if shape.tie_word_embeddings else 2)
    queries = shape.num_attention_heads * shape.head_dim
    return tokens * (2 * layers + 2 * shape.num_layers * queries * context + 2 * head * sampled_share)


def estimate(run: PlannedRun, layout: Layout, machine: Machine, cache_tokens: int = 0) -> StepTime:
    """Time of a training step of ``run`` in ``layout``; ``cache_tokens`` fit into one engine's cache (0: enough)."""
    forward = forward_flops(run.shape, run.tokens, run.mean_tokens, run.sampled_share)
    passes_forward = run.workload(layout).forward_micro_batches
    pass_s = _trainer_seconds(run, layout, machine, forward, passes_forward, collectives=2)[0]
    update, bubble, tensor_parallel, model_flops = _update(run, layout, machine)
    data_parallel = _data_parallel(run, layout, machine)
    total = update + data_parallel
    generates = run.engine.kind != "none"
    return StepTime(
        rollout=rollout_seconds(run, layout, machine, cache_tokens) if generates else 0.0,
        old_log_prob=pass_s * run.old_log_prob,
        ref=pass_s * run.reference,
        update=total,
        publish=generates * run.shape.num_parameters() * run.dtype.itemsize / machine.publish_bandwidth,
        save=_save(run, layout, machine),
        bubble=bubble,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        mfu=model_flops / (total * layout.world_size * machine.peak_flops),
    )


def _update(run: PlannedRun, layout: Layout, machine: Machine) -> tuple[float, float, float, float]:
    """(seconds, bubble share, seconds of tensor-parallel collectives, model operations) without data parallelism."""
    forward = forward_flops(run.shape, run.update_tokens, run.mean_tokens, run.sampled_share)
    model = 3 * forward
    again = forward if layout.megatron.recompute_granularity == "full" else 0.0
    count = run.workload(layout).micro_batches
    collectives = 6 if again else 4
    seconds, bubble, tensor_parallel = _trainer_seconds(
        run, layout, machine, model + again, count, collectives, rounds=run.optimizer_steps
    )
    return seconds, bubble, tensor_parallel, model


def _trainer_seconds(
    run: PlannedRun,
    layout: Layout,
    machine: Machine,
    flops: float,
    micro_batches: int,
    collectives: int,
    rounds: int = 1,
) -> tuple[float, float, float]:
    """(seconds, bubble share, seconds of tensor-parallel collectives) of ``rounds`` runs of the pipeline.

    Tokens that pad micro-batches cost like others. The bubble is (PP - 1) / (m VPP) of the busy time (arXiv
    2104.04473, section 2.2.2). Every layer has ``collectives`` all-reduces of T H elements per micro-batch, 2 (TP - 1)
    / TP of their bytes over NVLink, or over the network when a tensor-parallel group leaves its node. Under context
    parallelism keys and values of the micro-batch go once over these ranks for every two of them.
    """
    tp, chunks = layout.tp, layout.megatron.num_chunks
    tokens = micro_batches * rounds * run.micro_batch_tokens * layout.dp
    used = run.tokens if rounds == 1 and collectives == 2 else run.update_tokens
    padded = max(1.0, tokens / used)
    compute = flops * padded / (layout.world_size * machine.peak_flops * machine.compute_efficiency)
    link = machine.nvlink_bandwidth if tp <= machine.gpus_per_node else machine.network_bandwidth
    message = run.micro_batch_tokens / layout.cp * run.shape.hidden_size * run.dtype.itemsize
    per_layer = collectives * 2 * (tp - 1) / tp * message / (link * machine.link_efficiency)
    per_layer += (collectives // 2) * _context_seconds(run, layout, machine)
    tensor_parallel = per_layer * run.shape.num_layers / layout.pp * micro_batches * rounds
    cut = tp if layout.megatron.sequence_parallel else 1
    hops = (collectives // 2) * micro_batches * rounds * chunks * (layout.pp > 1)
    pipeline = hops * message / cut / (machine.network_bandwidth * machine.link_efficiency)
    busy = compute + tensor_parallel + pipeline
    bubble = (layout.pp - 1) / (micro_batches * chunks)
    return busy * (1 + bubble), bubble / (1 + bubble), tensor_parallel


def _context_seconds(run: PlannedRun, layout: Layout, machine: Machine) -> float:
    """One gathering (or summing) of a layer's keys and values over the context-parallel ranks, none of it hidden."""
    if layout.cp == 1:
        return 0.0
    groups = max(1, run.shape.num_key_value_heads // layout.tp)
    size = 2 * groups * run.shape.head_dim * run.micro_batch_tokens * run.dtype.itemsize
    inside = layout.tp * layout.cp <= machine.gpus_per_node
    link = machine.nvlink_bandwidth if inside else machine.network_bandwidth
    return (layout.cp - 1) / layout.cp * size / (link * machine.link_efficiency)


def _data_parallel(run: PlannedRun, layout: Layout, machine: Machine) -> float:
    """Reduce-scatter of float32 gradients and all-gather of the weights per optimizer step, neither overlapped."""
    shards = layout.shards
    if shards == 1:
        return 0.0
    per_rank = run.shape.num_parameters() / (layout.tp * layout.pp)
    inside = layout.tp * shards <= machine.gpus_per_node
    link = machine.nvlink_bandwidth if inside else machine.network_bandwidth
    moved = per_rank * (FP32 + run.dtype.itemsize) * (shards - 1) / shards
    if not layout.megatron.use_distributed_optimizer:
        moved = per_rank * 2 * FP32 * (shards - 1) / shards
    return run.optimizer_steps * moved / (link * machine.link_efficiency)


def rollout_seconds(run: PlannedRun, layout: Layout, machine: Machine, cache_tokens: int = 0) -> float:
    """Time of generating a step's trajectories.

    The requests of an engine run in waves of ``max_num_seqs``, or of as many mean ones as its cache holds. A decoding
    step reads the engine's weights once and the cache of every request (half of it on average), or computes 2 N per
    request, whichever takes longer. Tokens of prompts and tool results are computed at the speed of a forward pass.
    Embedded engines compute in float32 at the host's rates. Environments answer in no time. A wave is as long as a mean
    trajectory: stragglers are not in it.
    """
    shape, engine = run.shape, run.engine
    gpus, flops, bandwidth, itemsize = engine.tp, machine.peak_flops, machine.memory_bandwidth, BF16
    engines = max(1, (engine.nodes or machine.nodes) * machine.gpus_per_node // engine.tp)
    if engine.kind == "embedded":
        gpus, flops, bandwidth, itemsize = 1, machine.host_flops, machine.host_bandwidth, FP32
        engines = layout.dp
    requests = ceil(run.trajectories / engines)
    together = min(requests, engine.max_num_seqs)
    if cache_tokens:
        together = max(1, min(together, cache_tokens // run.mean_tokens))
    sampled = run.mean_tokens * run.sampled_share
    cache = together * run.mean_tokens / 2 * kv_bytes_per_token(shape, gpus, itemsize)
    reading = (itemsize * shape.num_parameters() / gpus + cache) / bandwidth
    computing = together * 2 * shape.num_parameters() / gpus / flops
    decode = ceil(requests / together) * sampled * max(reading, computing) / machine.decode_efficiency
    others = requests * run.mean_tokens * (1 - run.sampled_share)
    prefill = forward_flops(shape, others, run.mean_tokens, 0.0) / (gpus * flops * machine.compute_efficiency)
    return decode + prefill


def _save(run: PlannedRun, layout: Layout, machine: Machine) -> float:
    """Weights and 12 bytes of optimizer state per parameter, over the nodes, as a share of each step."""
    if not run.save_freq:
        return 0.0
    written = run.shape.num_parameters() * (12 + run.dtype.itemsize)
    nodes = max(1, ceil(layout.world_size / machine.gpus_per_node))
    return written / (machine.storage_bandwidth * nodes) / run.save_freq
