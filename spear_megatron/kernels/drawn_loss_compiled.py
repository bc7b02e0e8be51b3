"""Selection by covariance and policy loss of one set of tokens by one compiled CPU kernel (csrc/drawn_loss.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_megatron.kernels.cov_select import NEAR_BOUND, CovJudge
from spear_megatron.kernels.extension import compiled_module
from spear_megatron.kernels.policy_loss_compiled import MODE_CODES, NUM_SUMS, KnownLoss, PolicySettings

NUM_COUNTS = 3


Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Log-probs, old log-probs, advantages, token weights (fp32 [T]) and keys (int64 [T])."""


def fits(columns: Columns, mask: Tensor | None) -> bool:
    """Whether the kernel takes these tensors as they are: contiguous, on the host, of one length."""
    shape = columns[0].shape
    dtypes = (torch.float32, torch.float32, torch.float32, torch.float32, torch.int64, torch.bool)
    tensors = columns if mask is None else (*columns, mask)
    return len(shape) == 1 and all(
        value.dtype is dtype and value.shape == shape and value.is_cpu and value.is_contiguous()
        for value, dtype in zip(tensors, dtypes, strict=False)
    )


def draw_and_differentiate(
    columns: Columns,
    mask: Tensor | None,
    settings: PolicySettings,
    ratio: float,
    judge: CovJudge,
    isa: str = "auto",
) -> tuple[KnownLoss, Tensor] | None:
    """What ``cov_selected`` and ``loss_and_gradient`` make of the tokens of the mask, one after the other.

    Args:
        columns: of tokens that :func:`fits` finds fit.
        mask: bool [T], the tokens that take part; None: all.
        settings: of the loss, mode clip_cov or kl_cov.
        ratio: selects max(floor(ratio * tokens), 1); 0 none.
        judge: which tokens are candidates; its means are not used.
        isa: "auto", or a particular instruction set (generic, avx2, avx512).

    Returns:
        Loss, sums (fp64 [9]: those of the policy loss, then candidates, tokens near a bound, selected tokens),
        gradient, and the selected tokens, bool [T]. None where tokens tie at the border of the selection.
    """
    log_probs, old_log_probs, advantages, token_weight, keys = columns
    tokens = len(keys)
    gradient = torch.empty(tokens, dtype=torch.float32)
    selected = torch.empty(tokens, dtype=torch.bool)
    loss, sums = torch.empty((), dtype=torch.float32), torch.empty(NUM_SUMS + NUM_COUNTS, dtype=torch.float64)
    decided = compiled_module().drawn_loss(
        log_probs.data_ptr(),
        old_log_probs.data_ptr(),
        advantages.data_ptr(),
        token_weight.data_ptr(),
        keys.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        tokens,
        MODE_CODES[settings.mode],
        1.0 - settings.clip_ratio_low,
        1.0 + settings.clip_ratio_high,
        settings.kl_cov_coef,
        ratio,
        (judge.lb, judge.ub),
        NEAR_BOUND,
        judge.log_bounds(),
        gradient.data_ptr(),
        selected.data_ptr(),
        loss.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return (KnownLoss(loss, sums, gradient), selected) if decided else None
