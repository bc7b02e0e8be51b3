"""A large and a small run for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_sizes import QWEN3_32B, TINY

from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.plan.layout import Layout
from spear_megatron.plan.machine import Machine
from spear_megatron.plan.run import EnginePlan, PlannedRun

MACHINE = Machine(nodes=16, gpus_per_node=8)
RUN = PlannedRun(
    shape=QWEN3_32B,
    engine=EnginePlan(tp=4, max_num_seqs=64),
    prompts=128,
    samples=16,
    mini_batch_prompts=32,
    epochs=1,
    mean_tokens=9000,
    max_tokens=18432,
    sampled_share=0.7,
    micro_batch_tokens=18432,
    max_logits_bytes=2 << 30,
)
SMALL = replace(
    RUN, shape=TINY, prompts=8, samples=4, mini_batch_prompts=4, mean_tokens=50, max_tokens=100, micro_batch_tokens=128
)


def layout(tp: int, pp: int, dp: int, vpp: int | None = None, **options: Any) -> Layout:
    sizes: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "sequence_parallel": tp > 1,
    }
    return Layout(megatron=MegatronConfig(**sizes | options), world_size=tp * pp * dp)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
