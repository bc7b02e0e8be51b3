"""One training step of a tiny model in a given layout: what the layout tests and `make layouts` compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from spear_megatron.types import Row, TrajectoryId

VOCAB = 101
TEMPERATURE = 0.8
MAX_RESPONSE_LENGTH = 40


RECOMPUTE: dict[bool | str, dict[str, Any]] = {
    False: {},
    True: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective"},
}


@dataclass(frozen=True)
class Layout:
    """A way to run one step; ``max_tokens`` decides the packing, ``recompute`` is a key of RECOMPUTE."""

    name: str
    world_size: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    max_tokens: int = 128
    recompute: bool | str = False
    cp: int = 1


BASELINE = Layout("1 rank")
LAYOUTS = (
    Layout("1 rank, one micro-batch", max_tokens=1024),
    Layout("1 rank, rows alone", max_tokens=50),
    Layout("1 rank, recompute", recompute=True),
    Layout("DP2", world_size=2),
    Layout("DP2, no distributed optimizer", world_size=2, distributed_optimizer=False, max_tokens=96),
    Layout("TP2", world_size=2, tp=2),
    Layout("TP2+SP", world_size=2, tp=2, sequence_parallel=True, max_tokens=99),
    Layout("PP2", world_size=2, pp=2, max_tokens=64),
    Layout("PP2 VPP2", world_size=2, pp=2, vpp=2, max_tokens=64),
    Layout("TP2xPP2", world_size=4, tp=2, pp=2),
    Layout("TP2+SPxPP2xVPP2", world_size=4, tp=2, pp=2, vpp=2, sequence_parallel=True, max_tokens=64, recompute=True),
    Layout("CP2", world_size=2, cp=2),
    Layout("CP2xTP2+SP", world_size=4, cp=2, tp=2, sequence_parallel=True, max_tokens=96, recompute=True),
    Layout("CP2xPP2xVPP2", world_size=4, cp=2, pp=2, vpp=2, max_tokens=64),
    Layout("DP2xCP2", world_size=4, cp=2, max_tokens=96),
    Layout("DP2xTP2", world_size=4, tp=2),
    Layout("DP2xPP2", world_size=4, pp=2, distributed_optimizer=False),
)


def make_rows(count: int = 14, seed: int = 0) -> list[Row]:
    """Ragged multi-turn rows; one has an empty mask, as a filtered trajectory has. No trainer log-probs yet.

    Rows 9 and 10 are two segments of one trajectory.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        prompt = int(torch.randint(3, 10, (1,), generator=generator))
        response = int(torch.randint(2, MAX_RESPONSE_LENGTH, (1,), generator=generator))
        n = prompt + response
        mask = torch.cat([torch.zeros(prompt, dtype=torch.bool), torch.rand(response, generator=generator) < 0.7])
        mask &= number != 5
        advantage = float(torch.randn(1, generator=generator))
        first = 9 if number == 10 else number
        rows.append(
            Row(
                trajectory=TrajectoryId(1, first // 4, first % 4),
                segment=number - first,
                ids=torch.randint(0, VOCAB, (n,), generator=generator, dtype=torch.int32),
                response_mask=mask,
                rollout_log_probs=-4 * torch.rand(n, generator=generator) * mask,
                advantages=advantage * mask.float(),
            )
        )
    return rows


def share_of_rank(rows: list[Row], parallel: Any) -> list[Row]:
    """Rows of this data-parallel rank after balancing."""
    from spear_megatron.data.balance import assign
    from spear_megatron.data.packing import packed_length

    owner = assign([packed_length(row.response_mask) for row in rows], [0] * len(rows), parallel.dp_size)
    return [row for row, rank in zip(rows, owner, strict=True) if rank == parallel.dp_rank]


def build_actor(
    folder: str,
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-3,
    correction: Any = None,
    megatron_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple:
    """(actor, shape, parallel) with the weights of ``folder``; ``fields`` are of ActorConfig."""
    from spear_megatron.device.cpu_shim import megatron_on_cpu
    from spear_megatron.model.hf_io import load_hf_folder
    from spear_megatron.model.provider import build_model
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.config import MegatronConfig
    from spear_megatron.parallel.state import initialize
    from spear_megatron.trainer.actor import Actor
    from spear_megatron.trainer.config import ActorConfig, OptimConfig
    from spear_megatron.trainer.optimizer import PolicyOptimizer

    megatron = MegatronConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        use_distributed_optimizer=layout.distributed_optimizer,
        **RECOMPUTE[layout.recompute],
        **(megatron_fields or {}),
    )
    parallel = initialize(layout.tp, layout.pp, cp=layout.cp, vpp=layout.vpp, timeout_s=60)
    optim = OptimConfig(lr=lr, lr_warmup_steps=2, lr_decay_style="cosine", weight_decay=0.1, clip_grad=1.0)
    config = ActorConfig(ppo_max_token_len_per_gpu=layout.max_tokens, optim=optim, megatron=megatron, **fields)
    shape = ModelShape.from_folder(folder)
    with megatron_on_cpu():
        chunks = build_model(shape, megatron, dtype=dtype, parallel=parallel, kernels=config.kernels)
        load_hf_folder(chunks, shape, folder, parallel)
        optimizer = PolicyOptimizer(
            chunks,
            optim,
            dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=megatron.overlap_param_gather,
            total_steps=10,
        )
    actor = Actor(
        chunks,
        optimizer,
        parallel,
        config,
        valid_vocab=shape.vocab_size,
        temperature=TEMPERATURE,
        max_response_length=MAX_RESPONSE_LENGTH,
        mini_batch_rows=16,
        correction=correction,
    )
    return actor, shape, parallel


def with_trainer_log_probs(actor: Any, rows: list[Row]) -> tuple[list[Row], dict[str, float]]:
    """Rows whose old and reference log-probs lie around the model's, by a noise that belongs to the row."""
    filled, metrics = actor.log_probs(rows)
    result = []
    for row in filled:
        task, sample = row.trajectory.task, row.trajectory.sample
        generator = torch.Generator().manual_seed(100 * task + sample)
        noise = 0.3 * torch.randn(2, len(row.ids), generator=generator) * row.response_mask
        result.append(
            replace(row, old_log_probs=row.old_log_probs + noise[0], ref_log_probs=row.old_log_probs + noise[1])
        )
    return result, metrics


def step_on_rank(folder: str, layout: Layout, fields: dict[str, Any]) -> dict[str, Any] | None:
    """On the first rank: log-prob metrics before and after, loss, gradient norm, gradients by Hugging Face name."""
    from spear_megatron.model.hf_io import iter_hf_tensors

    actor, shape, parallel = build_actor(folder, layout, **fields)
    rows, before = with_trainer_log_probs(actor, share_of_rank(make_rows(), parallel))
    _, figures, norm = actor.policy_gradients(rows)
    gradients = {name: tensor for name, tensor in iter_hf_tensors(actor.chunks, shape, parallel, kind="main_grad")}
    result = actor.update(rows)
    _, after = actor.log_probs(rows)
    if parallel.rank != 0:
        return None
    return {
        "before": before,
        "loss": figures.sums["loss"],
        "figures": figures.sums,
        "grad_norm": norm,
        "gradients": gradients,
        "update": result.metrics,
        "skipped": result.skipped,
        "after": after,
    }


def largest_gradient_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest |g - g0| / |g0| over all parameters, and whose it is."""
    assert gradients.keys() == expected.keys()
    errors = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in expected.items()}
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
