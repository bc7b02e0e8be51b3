"""What token_logprobs and its operators accept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spear_megatron.kernels.backends import IMPLEMENTATIONS

# Gradients hold the square of the temperature or of its inverse, in float.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-9, 1e9


def check_inputs(logits: Tensor, targets: Tensor) -> None:
    """ValueError unless logits are floating [T, V] with dense rows and targets int64 [T] beside them."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [T, V], not {logits.dtype} {list(logits.shape)}")
    if logits.shape[1] == 0:
        raise ValueError("logits have no vocabulary columns")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("the last dimension of the logits must have stride 1; call .contiguous() first")
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1] or targets.device != logits.device:
        raise ValueError(
            f"targets must be int64 [{logits.shape[0]}] on {logits.device}, "
            f"not {targets.dtype} {list(targets.shape)} on {targets.device}"
        )


def check_settings(temperature: float, implementation: str) -> None:
    """ValueError for a temperature that float does not carry or an implementation that does not exist."""
    if not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:  # false for NaN; torch.compile traces comparisons
        raise ValueError(f"temperature={temperature} must be from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward method of an autograd function whose result autograd could not differentiate.

    ``torch.autograd.function.once_differentiable`` hands out a constant where no gradient is required of the incoming
    gradients, although the result depends on saved tensors: a second derivative would silently miss that part.

    Raises:
        RuntimeError: from the method, in a backward pass with ``create_graph=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        refuse_graph()
        return backward(ctx, *grads)

    return checked


def refuse_graph() -> None:
    """RuntimeError in a backward pass with ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError("the kernels have no second derivative: run the backward pass without create_graph=True")
