"""The planner's judgement of layouts: what is in flight, what does not fit, how long a step takes, what is proposed."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from planned import FULL, MACHINE, RUN, SMALL, layout
from qwen_sizes import QWEN3_32B, TINY

from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.plan.activations import in_flight
from spear_megatron.plan.assess import assess, model_of, rank_kinds
from spear_megatron.plan.engine import EngineWeights, KVCache
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import GIB, Machine
from spear_megatron.plan.rank import total
from spear_megatron.plan.run import EnginePlan
from spear_megatron.plan.search import layouts, propose
from spear_megatron.plan.timing import estimate, forward_flops


def most_outstanding(warm_up: int, passes: int) -> int:
    """Largest number of forward passes without their backward in warm-up, one forward one backward, cool-down."""
    order = ["f"] * min(warm_up, passes)
    for _ in range(passes - len(order)):
        order += ["f", "b"]
    order += ["b"] * min(warm_up, passes)
    outstanding = most = 0
    for step in order:
        outstanding += 1 if step == "f" else -1
        most = max(most, outstanding)
    assert outstanding == 0
    return most


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [8, 16])
def test_passes_in_flight_are_those_of_the_schedules(pp: int, count: int) -> None:
    for stage in range(pp):
        assert in_flight(layout(1, pp, 1), stage, count) == most_outstanding(pp - stage - 1, count)
        for vpp in (2, 4) if pp > 1 else ():
            warm_up = 2 * (pp - stage - 1) + (vpp - 1) * pp
            assert in_flight(layout(1, pp, 1, vpp), stage, count) == most_outstanding(warm_up, count * vpp)
    assert in_flight(layout(1, 8, 1), 0, 3) == 3


def test_counted_operations_are_those_of_the_flop_counter() -> None:
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, vocab_size=512, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    from spear_megatron.model.shape import ModelShape

    shape = ModelShape.from_hf_config(config.to_dict())
    model, tokens = transformers.Qwen3ForCausalLM(config).eval(), 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64))
    # the counter takes the whole square of the attention, we half of it
    attention = 2 * shape.num_layers * tokens * tokens * shape.num_attention_heads * shape.head_dim
    ours = forward_flops(shape, tokens, tokens, 1.0)
    assert ours + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_memory_of_a_large_layout_by_hand() -> None:
    where = layout(8, 4, 4)
    found = assess(RUN, where, MACHINE)
    terms = {term.label: term.nbytes for term in found.kinds["middle stage"]["update"]}
    per_layer = sum(
        prod(size) for name, size in QWEN3_32B.parameter_shapes().items() if name.startswith("model.layers.7.")
    )
    elements = 16 * per_layer / 8
    assert terms["parameters"] == pytest.approx(2 * elements, rel=1e-3)
    assert terms["main gradients"] == 2 * terms["parameters"]
    assert terms["optimizer state"] == pytest.approx(12 * elements / 4, rel=1e-3)
    assert KVCache(QWEN3_32B, 1, 1).nbytes == 2 * 64 * 8 * 128 * 2
    assert KVCache(QWEN3_32B, 16, 1).nbytes == KVCache(QWEN3_32B, 8, 1).nbytes
    assert EngineWeights(QWEN3_32B, 4).nbytes == 32_762_123_264 // 2


def test_recomputation_stages_and_sequence_parallelism_lower_the_activations() -> None:
    def activations(where: Layout) -> int:
        terms = assess(RUN, where, MACHINE).kinds["leader"]["update"]
        return sum(term.nbytes for term in terms if term.label in ("activations", "recomputed layers"))

    plain = activations(layout(8, 4, 4))
    assert activations(layout(8, 4, 4, **FULL)) < plain / 10
    assert activations(layout(8, 4, 4, sequence_parallel=False)) > plain
    assert activations(layout(8, 4, 4, recompute_granularity="selective")) < plain
    assert activations(layout(8, 4, 4, vpp=2)) > plain  # interleaving keeps more passes
    fused = replace(RUN, spec="transformer_engine")
    assert assess(fused, layout(8, 4, 4), MACHINE).peak <= assess(RUN, layout(8, 4, 4), MACHINE).peak


def test_a_shortage_names_the_term_and_a_remedy() -> None:
    small = replace(MACHINE, gpu_bytes=48 * GIB)
    found = assess(RUN, layout(8, 4, 4), small)
    first = next(item for item in found.shortages if item.phase == "update")
    assert not found.fits and first.term == "activations" and first.needed > 48 * GIB
    assert "activations" in first.describe() and "recompute_granularity=full" in first.describe()
    assert assess(RUN, layout(8, 4, 4, **FULL), small).fits
    tiny_host = replace(MACHINE, host_bytes=64 * GIB)
    (shortage,) = assess(RUN, layout(8, 4, 4), tiny_host).shortages
    assert (shortage.where, shortage.term) == ("host", "checkpoint staging")


def test_the_cache_gets_what_is_left_and_must_hold_one_request() -> None:
    wide = assess(RUN, layout(8, 4, 4, **FULL), MACHINE)
    for phases in wide.kinds.values():
        assert total(phases["rollout"]) <= MACHINE.gpu_bytes
    assert wide.cache_tokens <= 64 * RUN.max_tokens
    narrow = replace(RUN, engine=EnginePlan(tp=1, max_num_seqs=64))
    found = assess(narrow, layout(8, 4, 4, **FULL), replace(MACHINE, gpu_bytes=76 * GIB))
    assert any(item.term in ("KV cache", "engine weights") for item in found.shortages)
    kept = assess(replace(RUN, engine=replace(RUN.engine, sleeps=False)), layout(8, 4, 4, **FULL), MACHINE)
    assert not kept.fits
    apart = replace(RUN, engine=EnginePlan(kind="separate", tp=4, nodes=4))
    found = assess(apart, layout(8, 4, 4, **FULL), MACHINE)
    assert found.fits and "engine" in found.kinds
    assert all(term.label != "engine weights" for term in found.kinds["leader"]["rollout"])


def test_kinds_are_ranks_of_their_stage_and_models_are_shared() -> None:
    where = layout(2, 4, 2)
    kinds = rank_kinds(where)
    assert list(kinds) == ["leader", "first stage", "middle stage", "last stage"]
    for name, rank in kinds.items():
        built = model_of(SMALL, where, rank)
        assert where.rank_of(tp_rank=built.tp_rank, dp_rank=built.dp_rank, pp_rank=built.pp_rank) == rank
        stage = {"leader": 0, "first stage": 0, "middle stage": 1, "last stage": 3}[name]
        assert built.pp_rank == stage
    assert list(rank_kinds(layout(1, 1, 1))) == ["leader"] and list(rank_kinds(layout(2, 1, 1))) == ["leader", "others"]


def test_more_work_takes_longer_and_rates_scale() -> None:
    where = layout(8, 4, 4)
    base = estimate(RUN, where, MACHINE)
    assert 0 < base.mfu < MACHINE.compute_efficiency and 0 < base.bubble < 0.5
    assert estimate(replace(RUN, replayed=512), where, MACHINE).update > base.update
    assert estimate(replace(RUN, reference=True), where, MACHINE).ref == base.old_log_prob
    assert estimate(replace(RUN, old_log_prob=False), where, MACHINE).old_log_prob == 0
    assert estimate(RUN, layout(8, 4, 4, **FULL), MACHINE).update > base.update
    assert estimate(RUN, where, replace(MACHINE, memory_bandwidth=1e12)).rollout > base.rollout
    assert estimate(RUN, where, MACHINE, cache_tokens=20000).rollout > base.rollout
    faster = replace(
        MACHINE, peak_flops=2 * MACHINE.peak_flops, nvlink_bandwidth=900e9, network_bandwidth=100e9
    )
    assert estimate(RUN, where, faster).update == pytest.approx(base.update / 2)


def test_proposals_fit_are_sorted_and_valid() -> None:
    tight = replace(MACHINE, nodes=2, gpu_bytes=40 * GIB)
    run = replace(RUN, shape=replace(QWEN3_32B, num_layers=8))
    proposals = propose(run, tight, 16, keep=3)
    assert 0 < len(proposals.ranked) <= 3 < proposals.considered
    times = [item.time.total for item in proposals.ranked]
    assert times == sorted(times)
    for item in proposals.ranked:
        assert item.fits and item.layout.world_size == 16 and item.layout.tp <= 8
        assert item.run.micro_batch_tokens >= RUN.max_tokens
    assert propose(run, replace(tight, gpu_bytes=8 * GIB), 16).ranked == ()
    found = list(layouts(TINY, 8, 8))
    assert {(item.tp, item.pp) for item in found} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)}
    assert {item.vpp for item in found if (item.tp, item.pp) == (2, 2)} == {None, 2}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"micro_batch_tokens": 100}, "ppo_max_token_len_per_gpu"),
        ({"mean_tokens": 20000}, "mean_tokens"),
        ({"sampled_share": 0.0}, "sampled_share"),
    ],
)
def test_impossible_runs_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(RUN, **change)


def test_impossible_machines_and_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="gpu_memory_gb"):
        Machine(nodes=1, gpus_per_node=8, gpu_bytes=0)
    with pytest.raises(ValueError, match="compute_efficiency"):
        Machine(nodes=1, gpus_per_node=8, compute_efficiency=1.5)
    with pytest.raises(ValueError, match="engine_nodes"):
        EnginePlan(kind="separate")
    with pytest.raises(ValueError, match="max_num_seqs"):
        EnginePlan(max_num_seqs=0)


def test_context_parallelism_divides_activations_and_shards_the_optimizer_further() -> None:
    plain, cut = layout(8, 2, 8), layout(8, 2, 8, context_parallel_size=2)
    assert (cut.dp, cut.cp, cut.shards) == (4, 2, 8) and cut.describe() == "TP8 PP2 CP2 DP4 SP"
    for rank in range(0, cut.world_size, 37):
        tp_rank, cp_rank, dp_rank, pp_rank = cut.coordinates(rank)
        assert cut.rank_of(tp_rank=tp_rank, cp_rank=cp_rank, dp_rank=dp_rank, pp_rank=pp_rank) == rank
    engine = replace(RUN, spec="transformer_engine")
    whole, half = (assess(engine, where, MACHINE).kinds["leader"]["update"] for where in (plain, cut))
    bytes_of = [{term.label: term.nbytes for term in terms} for terms in (whole, half)]
    assert bytes_of[1]["activations"] == pytest.approx(bytes_of[0]["activations"] / 2, rel=1e-3)
    assert bytes_of[1]["optimizer state"] == bytes_of[0]["optimizer state"]
    # The plain layers gather keys and values of all ranks, and hide later ones by masks.
    gathered = assess(RUN, cut, MACHINE).kinds["leader"]["update"]
    assert total(gathered) > 1.5 * total(half)
    cuts = {item.cp for item in layouts(QWEN3_32B, 128, 8, RUN.max_tokens)}
    assert cuts == {1, 2, 4, 8} and {item.cp for item in layouts(QWEN3_32B, 128, 8)} == {1}
    with pytest.raises(ValueError, match="context_parallel_size=2"):
        Layout(megatron=MegatronConfig(context_parallel_size=2), world_size=3)
