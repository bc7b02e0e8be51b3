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


def gradients_ready(config: Config, scratch: Path) -> Any:
    """How many parameters announced their gradient to their bucket in an update."""
    with built(config) as actor:
        actor.update(rows())
        return [len(group.per_param_grad_ready_counts) for chunk in actor.chunks for group in chunk.bucket_groups]


def weights_gathered(config: Config, scratch: Path) -> Any:
    """Whether the weights are gathered when an update returns, bucket by bucket."""
    with built(config) as actor:
        actor.update(rows())
        return [group.param_gather_dispatched for chunk in actor.chunks for group in chunk.bucket_groups]


def buckets(config: Config, scratch: Path) -> Any:
    """Buckets of the gradients."""
    with built(config) as actor:
        return [len(group.buckets) for chunk in actor.chunks for group in chunk.bucket_groups]


def messages(config: Config, scratch: Path) -> Any:
    """How the stages of the pipeline talk."""
    with built(config) as actor:
        settings = actor.chunks[0].config
        return settings.overlap_p2p_comm, settings.batch_p2p_comm


def fusion(config: Config, scratch: Path) -> Any:
    """Whether a linear layer of the built model adds to the gradient in its product."""
    with built(config) as actor:
        return actor.chunks[0].config.gradient_accumulation_fusion


def precision_of_products(config: Config, scratch: Path) -> Any:
    """What Megatron is told of the layers' products and attention, and the multiple of micro-batches' lengths."""
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.model.transformer_config import build_transformer_config

    megatron = config.actor_rollout_ref.actor.megatron
    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    settings = build_transformer_config(shape, megatron, dtype=config.actor_rollout_ref.model.torch_dtype)
    return settings.fp8, settings.fp8_recipe, settings.attention_backend.name, megatron.token_multiple


_OVERLAP = (f"{_MEGATRON}.overlap_grad_reduce=true",)
_FULL = (f"{_MEGATRON}.recompute_granularity=full",)
OBSERVERS: Observers = {
    f"{_MEGATRON}.tensor_model_parallel_size": Observer(parameters, ("1", "2"), ranks=2),
    f"{_MEGATRON}.pipeline_model_parallel_size": Observer(parameters, ("1", "2"), ranks=2),
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size": Observer(parameters, ("null", "2"), _PIPELINE_2, ranks=2),
    f"{_MEGATRON}.context_parallel_size": Observer(activations, ("1", "2"), ranks=2),
    f"{_MEGATRON}.sequence_parallel": Observer(activations, ("false", "true"), _TENSOR_2, ranks=2),
    f"{_MEGATRON}.use_distributed_optimizer": Observer(optimizer, ("true", "false"), ranks=2),
    f"{_MEGATRON}.overlap_grad_reduce": Observer(gradients_ready, ("false", "true")),
    f"{_MEGATRON}.overlap_param_gather": Observer(weights_gathered, ("false", "true"), _OVERLAP),
    f"{_MEGATRON}.ddp_bucket_size": Observer(buckets, ("null", "4000"), _OVERLAP),
    f"{_MEGATRON}.overlap_p2p_comm": Observer(
        messages, ("false", "true"), (*_PIPELINE_2, f"{_MEGATRON}.virtual_pipeline_model_parallel_size=2"), ranks=2
    ),
    f"{_MEGATRON}.gradient_accumulation_fusion": Observer(fusion, ("false", "true")),
    f"{_MEGATRON}.attention_backend": Observer(precision_of_products, ("auto", "flash")),
    f"{_MEGATRON}.fp8": Observer(precision_of_products, ("null", "hybrid")),
    f"{_MEGATRON}.fp8_recipe": Observer(precision_of_products, ("delayed", "mxfp8"), (f"{_MEGATRON}.fp8=hybrid",)),
    f"{_MEGATRON}.recompute_granularity": Observer(forward_calls, ("null", "selective")),
    f"{_MEGATRON}.recompute_method": Observer(
        forward_calls, ("uniform", "block"), (*_FULL, f"{_MEGATRON}.recompute_num_layers=1")
    ),
    f"{_MEGATRON}.recompute_num_layers": Observer(
        forward_calls, ("1", "2"), (*_FULL, f"{_MEGATRON}.recompute_method=block")
    ),
}
