"""Observers of ``actor_rollout_ref.model.*`` and ``actor_rollout_ref.actor.*`` but for the layout: real updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from observers.core import Observer, Observers
from observers.scripted_run import run_scripted

from spear_megatron.config.schema import Config
from spear_megatron.types import Row, TrajectoryId

_ACTOR = "actor_rollout_ref.actor"


@contextlib.contextmanager
def built(config: Config) -> Iterator[Any]:
    """The actor that `train` would build."""
    from spear_megatron.cli.build import build_actor, num_optimizer_steps
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.shape import ModelShape

    shape = ModelShape.from_folder(config.actor_rollout_ref.model.path)
    with open_parallel(config) as parallel:
        optim = config.actor_rollout_ref.actor.optim
        yield build_actor(config, parallel, shape, optim, num_optimizer_steps(config))[0]


def rows(seed: int = 0) -> list[Row]:
    """Four rows of 12 tokens whose old log-probs are far enough from any policy's that every clip bound acts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for sample in range(4):
        mask = torch.arange(12) >= 2 + 2 * sample
        log_probs = (-6.2 + 2.0 * torch.randn(3, 12, generator=generator)) * mask
        ids = torch.randint(5, 200, (12,), generator=generator, dtype=torch.int32)
        advantages = (-1.0 if sample % 2 else 1.5) * mask
        made.append(Row(TrajectoryId(1, 0, sample), 0, ids, mask, log_probs[0], advantages, log_probs[1], log_probs[2]))
    return made


def one_update(config: Config, scratch: Path) -> Any:
    """Figures of one update."""
    with built(config) as actor:
        return actor.update(rows()).metrics


def updates(config: Config, scratch: Path) -> Any:
    """Loss and learning rate of four updates on changing rows, and then all weights."""
    with built(config) as actor:
        figures = [actor.update(rows(seed)).metrics for seed in range(4)]
        weights = [float(p.double().abs().sum()) for chunk in actor.chunks for p in chunk.parameters()]
    return [(part["actor/loss"], part["actor/lr"]) for part in figures], weights


def micro_batches(config: Config, scratch: Path) -> Any:
    """Token count of every forward pass of one update."""
    with built(config) as actor, counted(actor.chunks[0].module) as calls:
        actor.update(rows())
    return calls


@contextlib.contextmanager
def counted(*modules: torch.nn.Module) -> Iterator[list[int]]:
    """Collects the size of the first output of every forward call of these modules."""
    calls: list[int] = []

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        calls.append(tensor.shape[0] if tensor.shape[0] > 1 else tensor.shape[1])

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield calls


def kernels(config: Config, scratch: Path) -> Any:
    """Which implementation of the log-probs an update calls."""
    from spear_megatron.kernels import logprobs_compiled, logprobs_eager

    called = []
    with contextlib.ExitStack() as stack:
        for module in (logprobs_compiled, logprobs_eager):
            spy = stack.enter_context(mock.patch.object(module, "row_stats", wraps=module.row_stats))
            called.append(spy)
        one_update(config, scratch)
    return [spy.called for spy in called]


def logits_budget(config: Config, scratch: Path) -> Any:
    """Bytes of logits that an update lets the LM head keep."""
    import spear_megatron.trainer.actor as module

    with mock.patch.object(module, "linear_token_logprobs", wraps=module.linear_token_logprobs) as spy:
        one_update(config, scratch)
    return sorted({call.kwargs["max_logits_bytes"] for call in spy.call_args_list})


def optimizer_steps(config: Config, scratch: Path) -> Any:
    """Rows of every optimizer step of a scripted run."""
    return run_scripted(config).updates


def precision(config: Config, scratch: Path) -> Any:
    """Types of the weights, and the log-probs of the rows."""
    with built(config) as actor:
        filled, _ = actor.log_probs(rows())
        return sorted({str(p.dtype) for p in actor.chunks[0].parameters()}), filled[0].old_log_probs.tolist()


def _optim(field: str, one: str, other: str, *given: str) -> tuple[str, Observer]:
    texts = tuple(f"{_ACTOR}.optim.{text}" for text in given)
    return f"{_ACTOR}.optim.{field}", Observer(updates, (one, other), texts)


def _update(field: str, one: str, other: str, *given: str) -> tuple[str, Observer]:
    return f"{_ACTOR}.{field}", Observer(one_update, (one, other), tuple(f"{_ACTOR}.{text}" for text in given))


OBSERVERS: Observers = {
    "actor_rollout_ref.model.path": Observer(updates, ("{files}/model", "{files}/other_model")),
    "actor_rollout_ref.model.dtype": Observer(precision, ("fp32", "bf16")),
    f"{_ACTOR}.ppo_mini_batch_size": Observer(optimizer_steps, ("2", "1")),
    f"{_ACTOR}.ppo_epochs": Observer(optimizer_steps, ("1", "2")),
    f"{_ACTOR}.ppo_max_token_len_per_gpu": Observer(micro_batches, ("128", "16")),
    f"{_ACTOR}.kernels": Observer(kernels, ("auto", "eager")),
    f"{_ACTOR}.max_logits_mb": Observer(logits_budget, ("2048", "1")),
    **dict(
        [
            _update("clip_ratio", "0.2", "0.1"),
            _update("clip_ratio_low", "null", "0.1"),
            _update("clip_ratio_high", "null", "0.1"),
            _update("clip_ratio_c", "3.0", "1.5"),
            _update("loss_agg_mode", "token-mean", "seq-mean-token-sum"),
            _update("entropy_coeff", "0.0", "0.01"),
            _update("use_kl_loss", "false", "true"),
            _update("kl_loss_coef", "0.001", "0.01", "use_kl_loss=true"),
            _update("kl_loss_type", "low_var_kl", "abs", "use_kl_loss=true"),
            _optim("lr", "1e-3", "1e-4"),
            _optim("weight_decay", "0.0", "0.1"),
            _optim("betas", "[0.9, 0.999]", "[0.5, 0.99]"),
            _optim("clip_grad", "1.0", "0.01"),
            _optim("lr_warmup_steps", "0", "2"),
            _optim("lr_decay_style", "constant", "cosine"),
            _optim("min_lr", "0.0", "1e-3", "lr_decay_style=linear"),
        ]
    ),
}
