"""Clip-Cov and KL-Cov within one micro-batch: the draw and the policy loss together, by one compiled kernel on CPUs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, judge_of, select_tokens
from spear_megatron.algorithms.covariance_device import select_on_device
from spear_megatron.kernels import cov_select_cuda
from spear_megatron.kernels.cov_select import use_compiled
from spear_megatron.kernels.drawn_loss_compiled import draw_and_differentiate, fits
from spear_megatron.kernels.policy_loss import PolicySums, attached, check_tokens, policy_loss
from spear_megatron.kernels.policy_loss_compiled import NUM_SUMS, PolicySettings, PolicyTokens


class Draw(NamedTuple):
    """Tokens that the loss drew, on the device of the tokens.

    Attributes:
        selected: bool [T], False beside the mask.
        num_candidates, num_near_bound, num_selected: as in ``Selection``, fp64 scalars.
    """

    selected: Tensor
    num_candidates: Tensor
    num_near_bound: Tensor
    num_selected: Tensor


def drawn_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    token_keys: Tensor,
    rule: ClipCovRule | KlCovRule,
    *,
    mask: Tensor | None = None,
    clip_ratio_low: float,
    clip_ratio_high: float,
    kl_cov_coef: float,
    implementation: str = "auto",
) -> tuple[Tensor, PolicySums, Draw]:
    """The policy loss of clip_cov or kl_cov, of which the tokens of the mask are the set that is drawn from.

    What :func:`spear_megatron.algorithms.covariance.select_tokens` chooses among the tokens of the mask, by their
    current log-probs, and then :func:`spear_megatron.kernels.policy_loss.policy_loss`, as released code does for every
    micro-batch. On the CPU both are one call of a compiled kernel; on CUDA nothing waits for the device.

    Args:
        log_probs, old_log_probs, advantages, token_weight, mask: as in ``policy_loss``.
        token_keys: int64 [T], from ``token_keys``.
        rule: what is drawn; its type is the mode of the loss.
        clip_ratio_low, clip_ratio_high, kl_cov_coef, implementation: as in ``policy_loss``.

    Returns:
        The loss, differentiable in the log-probs; its sums; what was drawn.

    Raises:
        ValueError: shapes, dtypes, devices or names outside of what is described above, or equal keys.
        RunError: ``implementation="compiled"`` and a compiled kernel is missing or does not fit.
    """
    mode = "kl_cov" if isinstance(rule, KlCovRule) else "clip_cov"
    columns = (log_probs, old_log_probs, advantages, token_weight, token_keys)
    bounded = isinstance(rule, KlCovRule) or rule.quantiles is None
    if bounded and not torch.compiler.is_compiling() and fits(columns, mask) and use_compiled(implementation):
        settings = PolicySettings(mode, clip_ratio_low, clip_ratio_high, math.inf, kl_cov_coef)
        found = draw_and_differentiate(columns, mask, settings, rule.ratio, judge_of(rule))
        if found is not None:
            known, selected = found
            numbers = known.sums.unbind()
            return attached(log_probs, known), PolicySums._make(numbers[:NUM_SUMS]), Draw(selected, *numbers[NUM_SUMS:])
    check_tokens(PolicyTokens(log_probs, old_log_probs, advantages, token_weight, None, mask), token_keys)
    draw = _draw(columns, rule, mask, implementation)
    loss, sums = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        token_weight,
        mode=mode,
        selected=draw.selected,
        mask=mask,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_c=math.inf,
        kl_cov_coef=kl_cov_coef,
        implementation=implementation,
    )
    return loss, sums, draw


def _draw(
    columns: tuple[Tensor, ...], rule: ClipCovRule | KlCovRule, mask: Tensor | None, implementation: str
) -> Draw:
    log_probs, old_log_probs, advantages, _, keys = columns
    tokens = TokenSet(log_probs.detach(), old_log_probs, advantages, keys)
    device = log_probs.device
    if cov_select_cuda.usable(device, implementation):
        there = select_on_device([tokens], rule, mask)
        numbers, selected = there.numbers, there.masks[0]
        return Draw(selected, numbers.num_candidates, numbers.num_near_bound, selected.sum(dtype=torch.float64))
    used = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    places = used.nonzero().squeeze(1)
    own = TokenSet(*(value[places] for value in (tokens.log_probs, old_log_probs, advantages, keys)))
    drawn = select_tokens([own], rule, implementation=implementation)
    selected = torch.zeros_like(used)
    selected[places] = drawn.masks[0].to(device)
    counts = (drawn.num_candidates, drawn.num_near_bound, drawn.num_selected)
    return Draw(selected, *(torch.tensor(float(count), dtype=torch.float64) for count in counts))
