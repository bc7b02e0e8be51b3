"""A checkpoint written at one layout continues at any other: same weights, optimizer state and next losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf

from spear_megatron.checkpoint.manager import CheckpointManager
from spear_megatron.device.cpu_shim import megatron_on_cpu
from spear_megatron.model.hf_io import load_hf_folder
from spear_megatron.model.provider import build_model
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.parallel.state import ParallelState, initialize
from spear_megatron.trainer.actor import Actor
from spear_megatron.trainer.config import ActorConfig, OptimConfig
from spear_megatron.trainer.optimizer import PolicyOptimizer
from spear_megatron.types import Row, TrajectoryId

Layout = tuple[int, int, int, int | None]
"""World, tensor, pipeline and virtual pipeline size."""


def build(
    hf: Path, parallel: ParallelState, *, dtype: str = "fp32", sharded_optimizer: bool = True, lr: float = 1e-3
) -> Actor:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    megatron = MegatronConfig(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size,
        use_distributed_optimizer=sharded_optimizer,
    )
    shape = ModelShape.from_folder(hf)
    chunks = build_model(shape, megatron, dtype=torch_dtype, parallel=parallel)
    load_hf_folder(chunks, shape, hf, parallel)
    optim = OptimConfig(lr=lr, lr_warmup_steps=3, lr_decay_style="cosine")
    optimizer = PolicyOptimizer(
        chunks, optim, dtype=torch_dtype, use_distributed_optimizer=sharded_optimizer, total_steps=20
    )
    config = ActorConfig(ppo_max_token_len_per_gpu=64, optim=optim, megatron=megatron)
    return Actor(
        chunks, optimizer, parallel, config, valid_vocab=shape.vocab_size, temperature=1.0, max_response_length=16
    )


def rows(step: int, parallel: ParallelState) -> list[Row]:
    draw = torch.Generator().manual_seed(step)
    whole = []
    for sample in range(8):
        length = 8 + sample
        ids = torch.randint(0, 101, (length,), generator=draw, dtype=torch.int32)
        mask = torch.arange(length) >= 4
        whole.append(Row(TrajectoryId(step, 0, sample), 0, ids, mask, torch.zeros(length), torch.zeros(length)))
    return whole[parallel.dp_rank :: parallel.dp_size]


def update(actor: Actor, step: int, parallel: ParallelState) -> tuple[float, float, float]:
    metrics = actor.sft_update(rows(step, parallel)).metrics
    return metrics["sft/loss"], metrics["sft/grad_norm"], metrics["sft/lr"]


def save(manager: CheckpointManager, step: int, actor: Actor) -> None:
    optimizer = actor.optimizer
    manager.save(step, actor.chunks, optimizer.megatron, optimizer.scheduler, {"rng": {"seed": 5}})


@megatron_on_cpu()
def write(hf: Path, root: Path, layout: Layout, options: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Three updates, a checkpoint, two more updates whose figures are the reference."""
    parallel = initialize(tp=layout[1], pp=layout[2], vpp=layout[3], timeout_s=120)
    actor = build(hf, parallel, **options)
    for step in (1, 2, 3):
        update(actor, step, parallel)
    save(CheckpointManager(root, parallel=parallel, keep=2), 3, actor)
    return [update(actor, step, parallel) for step in (4, 5)]


@megatron_on_cpu()
def resume(
    hf: Path, root: Path, copy: Path, layout: Layout, options: dict[str, Any]
) -> list[tuple[float, float, float]]:
    """Load into a fresh model, write what was loaded to another folder, and go on."""
    parallel = initialize(tp=layout[1], pp=layout[2], vpp=layout[3], timeout_s=120)
    actor = build(hf, parallel, **options)
    manager = CheckpointManager(root, parallel=parallel, keep=2)
    loaded = manager.load_latest(actor.chunks, actor.optimizer.megatron, actor.optimizer.scheduler, ("rng",))
    assert loaded is not None and loaded.step == 3 and loaded.states == {"rng": {"seed": 5}}
    save(CheckpointManager(copy, parallel=parallel, keep=2), 3, actor)
    return [update(actor, step, parallel) for step in (4, 5)]


@megatron_on_cpu()
def stored(root: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Every stored tensor, whole, and the optimizer's step count, read on one rank."""
    from megatron.core import dist_checkpointing

    initialize(timeout_s=60)
    state = dist_checkpointing.load_plain_tensors(str(root))
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    optimizer = state["optimizer"]
    if "state" in optimizer.get("optimizer", optimizer):
        return tensors, int(optimizer.get("optimizer", optimizer)["state"]["common_step"])
    return tensors, int(optimizer["optimizer"]["param_groups"][0]["step"])


def check(tmp_path: Path, source: Layout, target: Layout, **options: Any) -> None:
    hf = make_tiny_hf(tmp_path / "hf")
    root, copy = tmp_path / "checkpoints", tmp_path / "copy"
    expected = run_ranks(write, source[0], hf, root, source, options)
    actual = run_ranks(resume, target[0], hf, root, copy, target, options)
    tolerance = 1e-5 if options.get("dtype", "fp32") == "fp32" else 2e-2
    for result in actual:
        for want, got in zip(expected[0], result, strict=True):
            assert got == pytest.approx(want, rel=tolerance)
    ((before, steps_before),) = run_ranks(stored, 1, root / "step_00000003" / "sharded")
    ((after, steps_after),) = run_ranks(stored, 1, copy / "step_00000003" / "sharded")
    assert steps_before == steps_after == 3
    assert before.keys() == after.keys()
    assert sum(name.startswith("optimizer.state.exp_avg_sq") for name in before) > 5
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


TARGETS: dict[str, Layout] = {
    "one rank": (1, 1, 1, None),
    "PP2": (2, 1, 2, None),
    "DP2": (2, 1, 1, None),
    "TP2": (2, 2, 1, None),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_tp2_checkpoint_continues_at(name: str, tmp_path: Path) -> None:
    check(tmp_path, (2, 2, 1, None), TARGETS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2, 2, 1, None), (4, 2, 2, None)),
        ((2, 2, 1, None), (2, 1, 2, 2)),
        ((2, 1, 2, 2), (2, 1, 1, None)),
        ((4, 2, 1, None), (1, 1, 1, None)),
    ],
)
def test_more_layouts(source: Layout, target: Layout, tmp_path: Path) -> None:
    check(tmp_path, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("sharded_optimizer", [True, False])
def test_bf16_masters_survive(sharded_optimizer: bool, tmp_path: Path) -> None:
    check(tmp_path, (2, 2, 1, None), (2, 1, 1, None), dtype="bf16", sharded_optimizer=sharded_optimizer)


@pytest.mark.slow
def test_the_plain_optimizer_reshards_too(tmp_path: Path) -> None:
    check(tmp_path, (2, 2, 1, None), (2, 1, 2, None), sharded_optimizer=False)
