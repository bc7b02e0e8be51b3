"""What of an optimizer leaves the device while servers generate: masters and moments, all of them and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import Layout, build_actor, make_rows, with_trainer_log_probs


def look(folder: str, dtype: torch.dtype, distributed: bool) -> dict[str, Any]:
    """On one rank: sizes of the states, what a move changes, and whether the model still computes after it."""
    from spear_megatron.trainer.offload import StateOffload, states_of

    layout = Layout("one", distributed_optimizer=distributed)
    actor, _, _ = build_actor(folder, layout, dtype=dtype)
    rows, _ = with_trainer_log_probs(actor, make_rows())
    actor.update(rows)
    states = list(states_of(actor.optimizer))
    addresses = [state.data_ptr() for state in states]
    offload = StateOffload(actor.optimizer)
    offload.to_host()
    offload.to_device()
    after_noop = [state.data_ptr() for state in states_of(actor.optimizer)]
    actor.update(rows)
    before, _ = actor.log_probs(rows)
    for state in states_of(actor.optimizer):
        state.detach().fill_(torch.nan)
    model = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    after, _ = actor.log_probs(rows)
    return {
        "parameters": sum(parameter.numel() for chunk in actor.chunks for parameter in chunk.parameters()),
        "states": sum(state.numel() for state in states),
        "unchanged": addresses == after_noop,
        "model stays": all(torch.isfinite(parameter).all() for parameter in model),
        "computes": all(torch.equal(a.old_log_probs, b.old_log_probs) for a, b in zip(before, after, strict=True)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("offload") / "hf", "qwen3", num_layers=2)


@pytest.mark.parametrize("dtype, distributed", list(itertools.product((torch.float32, torch.bfloat16), (True, False))))
def test_masters_and_moments_leave_and_the_model_stays(folder: Path, dtype: torch.dtype, distributed: bool) -> None:
    (seen,) = run_ranks(look, 1, str(folder), dtype, distributed)
    copies = 2 if dtype == torch.float32 else 3
    assert seen["states"] == copies * seen["parameters"]
    assert {key: value for key, value in seen.items() if isinstance(value, bool) and not value} == {}
