"""Observers of ``actor_rollout_ref.actor.megatron.*``: what the model on each rank looks like and recomputes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from observers.actor import built, counted, rows
from observers.core import Observer, Observers

from spear_megatron.config.schema import Config

_MEGATRON = "actor_rollout_ref.actor.megatron"
_TENSOR_2 = (f"{_MEGATRON}.tensor_model_parallel_size=2",)
_PIPELINE_2 = (f"{_MEGATRON}.pipeline_model_parallel_size=2",)


def parameters(config: Config, scratch: Path) -> Any:
    """Names and shapes of this rank's parameters, chunk by chunk."""
    with built(config) as actor:
        return [{name: list(p.shape) for name, p in chunk.named_parameters()} for chunk in actor.chunks]


def _layers(actor: Any) -> list[Any]:
    return [layer for chunk in actor.chunks for layer in chunk.module.decoder.layers]


def activations(config: Config, scratch: Path) -> Any:
    """Sequence length of what every layer hands on in an update."""
    with built(config) as actor, counted(*_layers(actor)) as calls:
        actor.update(rows())
    return calls


def forward_calls(config: Config, scratch: Path) -> Any:
    """How often layers, and core attentions, run forward in one update: more often where they are recomputed."""
    with built(config) as actor, counted(*_layers(actor)) as layers:
        attentions = [layer.self_attention.core_attention for layer in _layers(actor)]
        with counted(*attentions) as attended:
            actor.update(rows())
    return len(layers), len(attended)


def optimizer(config: Config, scratch: Path) -> Any:
    """Classes of the optimizers, and how many master weights this rank keeps."""
    with built(config) as actor:
        parts = actor.optimizer.megatron.chained_optimizers
        held = sum(p.numel() for part in parts for group in part.optimizer.param_groups for p in group["params"])
        return [type(part).__name__ for part in parts], held


_FULL = (f"{_MEGATRON}.recompute_granularity=full",)
OBSERVERS: Observers = {
    f"{_MEGATRON}.tensor_model_parallel_size": Observer(parameters, ("1", "2"), ranks=2),
    f"{_MEGATRON}.pipeline_model_parallel_size": Observer(parameters, ("1", "2"), ranks=2),
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size": Observer(parameters, ("null", "2"), _PIPELINE_2, ranks=2),
    f"{_MEGATRON}.context_parallel_size": Observer(activations, ("1", "2"), ranks=2),
    f"{_MEGATRON}.sequence_parallel": Observer(activations, ("false", "true"), _TENSOR_2, ranks=2),
    f"{_MEGATRON}.use_distributed_optimizer": Observer(optimizer, ("true", "false"), ranks=2),
    f"{_MEGATRON}.recompute_granularity": Observer(forward_calls, ("null", "selective")),
    f"{_MEGATRON}.recompute_method": Observer(
        forward_calls, ("uniform", "block"), (*_FULL, f"{_MEGATRON}.recompute_num_layers=1")
    ),
    f"{_MEGATRON}.recompute_num_layers": Observer(
        forward_calls, ("1", "2"), (*_FULL, f"{_MEGATRON}.recompute_method=block")
    ),
}
