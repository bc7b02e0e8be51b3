"""What a node's host holds, and how a configuration becomes the planner's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from planned import MACHINE, RUN, SMALL, layout
from qwen_sizes import TINY

from spear_megatron.cli.planning import planned_run
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.plan.assess import assess, model_of
from spear_megatron.plan.host import host_terms
from spear_megatron.plan.run import EnginePlan, PlannedRun
from spear_megatron.plan.terms import Term
from spear_megatron.plan.timing import estimate


def by_label(terms: Sequence[Term]) -> dict[str, int]:
    return {term.label: term.nbytes for term in terms}


def node(run: PlannedRun, number: int, *, tp: int, pp: int, dp: int, per_node: int) -> dict[str, int]:
    where = layout(tp, pp, dp)
    return by_label(host_terms(run, where, number, per_node, lambda rank: model_of(run, where, rank)))


def test_replay_and_trajectories_lie_on_the_nodes_of_the_leaders() -> None:
    run = replace(SMALL, replay_bytes=4000)
    nodes = [node(run, number, tp=2, pp=2, dp=2, per_node=4) for number in range(2)]  # stage 0 is on node 0
    assert nodes[0]["replay buffer"] == 4000 and "replay buffer" not in nodes[1]
    assert nodes[0]["trajectories"] == 64 * run.tokens and "trajectories" not in nodes[1]
    assert nodes[0]["processes"] == nodes[1]["processes"] == 4 * 3 << 30


def test_staging_grows_with_ranks_of_the_first_data_parallel_index() -> None:
    together = node(SMALL, 0, tp=1, pp=1, dp=4, per_node=4)["checkpoint staging"]
    alone = node(SMALL, 1, tp=1, pp=1, dp=4, per_node=2)["checkpoint staging"]
    assert together > 2 * alone  # ranks 2 and 3 only lay out their shards
    numel = TINY.num_parameters() + (-TINY.vocab_size % 64) * TINY.hidden_size
    assert alone == pytest.approx(2 * 12 * numel / 4, rel=0.05)  # parameters start at multiples of 64


def test_the_reference_and_embedded_engines_cost_their_weights() -> None:
    plain = node(SMALL, 0, tp=1, pp=1, dp=2, per_node=2)
    with_reference = node(replace(SMALL, reference=True), 0, tp=1, pp=1, dp=2, per_node=2)
    padded = TINY.num_parameters() + (-TINY.vocab_size % 64) * TINY.hidden_size
    assert "reference weights" not in plain and with_reference["reference weights"] == 2 * 2 * 2 * padded
    engine = EnginePlan(kind="embedded", tp=1, max_num_seqs=3)
    embedded = node(replace(SMALL, engine=engine), 0, tp=1, pp=1, dp=2, per_node=2)["embedded engines"]
    cache = 3 * SMALL.max_tokens * 2 * TINY.num_layers * 2 * 8 * 4
    assert embedded == 2 * (4 * TINY.num_parameters() + cache)
    inside, slow = replace(SMALL, engine=engine), replace(MACHINE, host_bandwidth=1e9)
    assert estimate(inside, layout(1, 1, 2), slow).rollout > estimate(inside, layout(1, 1, 2), MACHINE).rollout > 0


def test_ranks_on_the_cpu_share_the_memory_of_their_node() -> None:
    run = replace(SMALL, on_host=True, optimizer="single", engine=EnginePlan(kind="embedded", tp=1))
    machine = replace(MACHINE, nodes=1, gpus_per_node=2, gpu_bytes=1 << 40, host_bytes=1 << 40)
    assert assess(run, layout(1, 1, 2), machine).fits
    (shortage,) = assess(run, layout(1, 1, 2), replace(machine, host_bytes=1 << 20)).shortages
    assert shortage.where == "host"


def planned(*overrides: str) -> PlannedRun:
    return planned_run(load(Config, None, list(overrides)), TINY, EnginePlan())


def test_a_configuration_gives_the_run() -> None:
    run = planned("data.train_batch_size=64", "actor_rollout_ref.rollout.n=4", "trainer.save_freq=-1")
    assert (run.trajectories, run.optimizer_steps, run.save_freq, run.replayed) == (256, 1, 0, 0)
    assert run.dtype == torch.bfloat16 and run.max_tokens == 3072 and run.mean_tokens == 1536
    assert not run.old_log_prob and not run.reference  # a single update starts from its own policy
    two = planned("actor_rollout_ref.actor.ppo_mini_batch_size=32")
    assert two.old_log_prob and two.optimizer_steps == 2
    assert not planned(
        "actor_rollout_ref.actor.ppo_mini_batch_size=32", "actor_rollout_ref.actor.old_log_prob=rollout"
    ).old_log_prob
    assert planned("actor_rollout_ref.actor.use_kl_loss=true").reference
    replay = planned("actor_rollout_ref.actor.enable_trajectory_replay=true")
    assert replay.replayed == replay.trajectories // 4 and replay.replay_bytes > 0 and replay.old_log_prob
    small = "actor_rollout_ref.actor.replay.max_gib=0.001"
    bound = planned("actor_rollout_ref.actor.enable_trajectory_replay=true", small)
    assert bound.replay_bytes == (1 << 30) // 1000


def test_micro_batches_follow_tokens_and_pipeline() -> None:
    where, virtual = layout(1, 2, 2), layout(1, 2, 2, 2)
    assert RUN.micro_batches(where, 0) == 1 and RUN.micro_batches(virtual, 0) == 2
    tokens = 2 * 0.9 * RUN.micro_batch_tokens
    assert RUN.micro_batches(where, 3 * tokens) == 3 and RUN.micro_batches(virtual, 3 * tokens) == 4
