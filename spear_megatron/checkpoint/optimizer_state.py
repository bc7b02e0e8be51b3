"""Optimizer state in a form that loads at any layout: megatron-core's ``fully_reshardable``, made to work with AdamW.

megatron-core's distributed optimizer expects TE's FusedAdam, whose step count lives in the parameter groups. torch's
AdamW keeps a ``step`` tensor per parameter: it must exist before saving, stand aside while the sharded state is put in
place, and come back as one tensor per parameter (a shared one would count each step once per parameter).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def optimizer_metadata(optimizer: Any) -> dict[str, Any]:
    """Options of ``sharded_state_dict`` that give the layout-free form."""
    gathers_on_one_rank = all(getattr(part, "data_parallel_group_gloo", None) for part in _parts(optimizer))
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": gathers_on_one_rank,
        "chained_optim_avoid_prefix": True,
    }


def ensure_state(optimizer: Any) -> None:
    """Allocate the state of an optimizer that has not stepped yet, so that it can be saved or loaded into."""
    for part in _parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros((), dtype=torch.float32))


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded state dict of a Megatron optimizer, given the sharded state dict of its model chunks. Collective."""
    ensure_state(optimizer)
    with _short_collections():
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=optimizer_metadata(optimizer))


def load_optimizer_state(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Put a loaded state dict into the optimizer, step counts included."""
    parts = list(_parts(optimizer))
    states = [loaded] if len(parts) == 1 else [loaded[index] for index in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        if "param_state" in state:
            _load_distributed(part, state)
        else:
            _load_plain(part, state)


def load_schedule_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Put a saved state into a learning-rate schedule, used or fresh."""
    if hasattr(scheduler, "num_steps"):
        # megatron-core's scheduler advances by the loaded count from wherever it stands.
        scheduler.num_steps = 0
    scheduler.load_state_dict(state)


def _load_distributed(part: Any, state: dict[str, Any]) -> None:
    rest = dict(state)
    param_state = rest.pop("param_state")
    rest.pop("param_state_sharding_type")
    part.load_state_dict(rest)
    steps = [parameter_state.pop("step", None) for parameter_state in part.optimizer.state.values()]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for parameter_state, step in zip(part.optimizer.state.values(), steps, strict=True):
        if step is not None:
            parameter_state["step"] = step.detach().clone()


def _load_plain(part: Any, state: dict[str, Any]) -> None:
    inner = state.get("optimizer", state)
    # megatron-core leaves a step count of zero out, as if there were none.
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        inner["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
    part.load_state_dict(state)


@contextmanager
def _short_collections() -> Iterator[None]:
    """Let explicit ``gc.collect`` calls, which megatron-core makes, pass over every object that exists already.

    Walking the objects of torch and its friends costs several times as much as saving a small model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _parts(optimizer: Any) -> Iterator[Any]:
    chained = getattr(optimizer, "chained_optimizers", None)
    yield from ([optimizer] if chained is None else chained)
