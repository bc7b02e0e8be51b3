"""What token_logprobs and its operators accept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spear_megatron.kernels.backends import IMPLEMENTATIONS


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
    """ValueError for a temperature or an implementation that does not exist."""
    if not 0 < temperature < math.inf:  # comparisons alone, which torch.compile can trace; false for NaN
        raise ValueError(f"temperature={temperature} must be finite and > 0")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")
