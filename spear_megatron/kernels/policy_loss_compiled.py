"""Policy loss, its gradient and its sums by the compiled CPU kernel (csrc/policy_loss.cpp)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spear_megatron.kernels.extension import compiled_module

MODE_CODES = {"vanilla": 0, "gpg": 1, "clip_cov": 2, "kl_cov": 3}
NUM_SUMS = 6


class KnownLoss(NamedTuple):
    """What a kernel makes of a set of tokens, on their device.

    Attributes:
        loss: fp32 scalar, -sum token_weight * surrogate.
        sums: fp64 [6], those of ``PolicySums``; of a drawn loss [9], with the counts of the draw.
        gradient: of the loss by the log-probs, fp32 [T], 0 beside the mask.
    """

    loss: Tensor
    sums: Tensor
    gradient: Tensor


class PolicySettings(NamedTuple):
    """Mode and constants of the policy loss, see :func:`spear_megatron.kernels.policy_surrogates.token_surrogate`."""

    mode: str
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_c: float
    kl_cov_coef: float


class PolicyTokens(NamedTuple):
    """Tokens of a policy loss, on one device.

    Attributes:
        log_probs, old_log_probs, advantages, token_weight: floating [T].
        selected: bool [T], or None in the modes that choose no tokens.
        mask: bool [T], which tokens take part; None: all.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    token_weight: Tensor
    selected: Tensor | None
    mask: Tensor | None


def loss_and_gradient(tokens: PolicyTokens, settings: PolicySettings, isa: str = "auto") -> KnownLoss:
    """Loss, sums and gradient in one pass, the same for every number of threads.

    Args:
        tokens: fp32 and bool on the CPU, of any stride.
        settings: mode and constants.
        isa: "auto", or a particular instruction set (generic, avx2, avx512).
    """
    held = PolicyTokens._make([None if value is None else value.contiguous() for value in tokens])
    gradient = torch.empty(len(held.log_probs), dtype=torch.float32)
    loss, sums = torch.empty((), dtype=torch.float32), torch.empty(NUM_SUMS, dtype=torch.float64)
    compiled_module().policy_loss(
        log_probs=held.log_probs.data_ptr(),
        old_log_probs=held.old_log_probs.data_ptr(),
        advantages=held.advantages.data_ptr(),
        weights=held.token_weight.data_ptr(),
        selected=0 if held.selected is None else held.selected.data_ptr(),
        mask=0 if held.mask is None else held.mask.data_ptr(),
        tokens=len(held.log_probs),
        mode=MODE_CODES[settings.mode],
        low=1.0 - settings.clip_ratio_low,
        high=1.0 + settings.clip_ratio_high,
        dual=settings.clip_ratio_c,
        coef=settings.kl_cov_coef,
        gradient=gradient.data_ptr(),
        loss=loss.data_ptr(),
        sums=sums.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return KnownLoss(loss, sums, gradient)
