"""After an optimizer step and a publish, the engine samples from exactly the policy that the trainer holds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import TEMPERATURE, VOCAB, Layout, build_actor, make_rows, share_of_rank

from spear_megatron.types import Row, TrajectoryId

LAYOUTS = (Layout("1 rank"), Layout("TP2", 2, tp=2), Layout("PP2", 2, pp=2), Layout("DP2", 2))


def sample(engine: Any, count: int, num_tokens: int) -> list[Row]:
    """Rows of ``count`` sampled continuations with the engine's log-probs."""
    from spear_megatron.rollout.engine import GenerateRequest, SamplingParams

    sampling = SamplingParams(num_tokens, temperature=TEMPERATURE)

    async def all_of_them() -> list[Any]:
        prompts = [tuple(range(1 + i, 6 + 2 * i)) for i in range(count)]
        requests = [GenerateRequest(f"r{i}", prompt, sampling, noise_key=i) for i, prompt in enumerate(prompts)]
        return [(request, await engine.generate(request)) for request in requests]

    rows = []
    for index, (request, result) in enumerate(asyncio.run(all_of_them())):
        ids = torch.tensor([*request.input_ids, *result.output_ids], dtype=torch.int32)
        mask = torch.arange(len(ids)) >= len(request.input_ids)
        log_probs = torch.zeros(len(ids))
        log_probs[mask] = torch.tensor(result.log_probs)
        assert set(result.policy_versions) == {1}
        rows.append(Row(TrajectoryId(1, index, 0), 0, ids, mask, log_probs, torch.zeros(len(ids))))
    return rows


def drift_on_rank(folder: str, layout: Layout) -> tuple[float, float]:
    """Largest |engine - trainer| log-prob after an update, and how far the update moved these log-probs."""
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.rollout.embedded import EmbeddedEngine
    from spear_megatron.weights.sync import publish

    actor, shape, parallel = build_actor(folder, layout, lr=1e-2)
    update = actor.update(share_of_rank(make_rows(), parallel), on_policy=True)
    assert update.skipped is None
    engine = EmbeddedEngine(shape, max_num_seqs=8, max_model_len=64) if parallel.is_leader else None
    publish(iter_hf_tensors(actor.chunks, shape, parallel), engine, version=1)
    rows = sample(engine, 6, 24) if engine is not None else []
    received: list[Any] = [rows]
    torch.distributed.broadcast_object_list(received, src=0)
    filled, metrics = actor.log_probs(received[0])
    before = initial_log_probs(folder, parallel, actor, received[0])
    drift = max(float((row.old_log_probs - row.rollout_log_probs).abs().max()) for row in filled)
    moved = max(float((row.old_log_probs - old.old_log_probs).abs().max()) for row, old in zip(filled, before))
    assert metrics["training/rollout_logp_abs_diff/max"] == pytest.approx(drift, rel=1e-6)
    assert all(int(row.ids.max()) < VOCAB for row in filled)
    return drift, moved


def initial_log_probs(folder: str, parallel: Any, actor: Any, rows: list[Row]) -> list[Row]:
    """The rows with log-probs of the weights before the update."""
    from spear_megatron.model.hf_io import load_hf_folder
    from spear_megatron.model.shape import ModelShape

    load_hf_folder(actor.chunks, ModelShape.from_folder(folder), folder, parallel)
    return actor.log_probs(rows)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_engine_and_trainer_agree_after_an_update(layout: Layout, tmp_path: Path) -> None:
    folder = str(make_tiny_hf(tmp_path / "model"))
    for drift, moved in run_ranks(drift_on_rank, layout.world_size, folder, layout):
        assert drift <= 1e-4
        assert moved > 0.05
