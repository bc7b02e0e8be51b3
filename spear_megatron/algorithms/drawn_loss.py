"""Clip-Cov and KL-Cov within one micro-batch: the draw and the policy loss together, by one compiled kernel on CPUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, TokenSet, judge_of, select_tokens
from spear_megatron.algorithms.covariance_device import select_on_device
from spear_megatron.kernels import cov_select_cuda
from spear_megatron.kernels.cov_select import NEAR_BOUND, CovJudge, use_compiled
from spear_megatron.kernels.drawn_loss_compiled import Columns, draw_and_differentiate, fits
from spear_megatron.kernels.extension import load_autograd
from spear_megatron.kernels.policy_loss import PolicySums, attached, check_tokens, policy_loss
from spear_megatron.kernels.policy_loss_compiled import MODE_CODES, PolicySettings, PolicyTokens


class DrawnSums(PolicySums):
    """Sums of the loss and counts of its draw, fp64 [9]; the counts are those of a ``Selection``, fp64 scalars."""

    __slots__ = ()

    @property
    def num_candidates(self) -> Tensor:
        """Tokens that could be drawn."""
        return self.values[6]

    @property
    def num_near_bound(self) -> Tensor:
        """Tokens within 1e-5 of lb or ub, which another rounding could move across; 0 for KL-Cov."""
        return self.values[7]

    @property
    def num_selected(self) -> Tensor:
        """Tokens that were drawn."""
        return self.values[8]


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
) -> tuple[Tensor, DrawnSums, Tensor]:
    """The policy loss of clip_cov or kl_cov, of which the tokens of the mask are the set that is drawn from.

    What :func:`spear_megatron.algorithms.covariance.select_tokens` chooses among the tokens of the mask, by their
    current log-probs, and then :func:`spear_megatron.kernels.policy_loss.policy_loss`, as released code does for every
    micro-batch. On the CPU both are one call of a compiled kernel; with the CUDA kernels nothing waits for the device.
    Under torch.compile the draw on the CPU is outside of the graph.

    Args:
        log_probs, old_log_probs, advantages, token_weight, mask: as in ``policy_loss``.
        token_keys: int64 [T], from ``token_keys``.
        rule: what is drawn; its type is the mode of the loss.
        clip_ratio_low, clip_ratio_high, kl_cov_coef, implementation: as in ``policy_loss``.

    Returns:
        The loss, differentiable in the log-probs; sums and counts; the tokens drawn, bool [T], False beside the mask.

    Raises:
        ValueError: shapes, dtypes, devices or names outside of what is described above.
        RunError: ``implementation="compiled"`` and a compiled kernel is missing or does not fit.
    """
    columns = (log_probs, old_log_probs, advantages, token_weight, token_keys)
    if log_probs.is_cpu and not torch.compiler.is_compiling():
        in_one_call = _call(rule, clip_ratio_low, clip_ratio_high, kl_cov_coef, implementation)
        found = None if in_one_call is None else in_one_call(*columns, mask)
        if found is not None:
            return found[0], DrawnSums(found[1]), found[2]
    check_tokens(PolicyTokens(log_probs, old_log_probs, advantages, token_weight, None, mask), token_keys)
    on_device = cov_select_cuda.usable(log_probs.device, implementation)
    counts, selected = (_draw_there if on_device else _draw_here)(columns, rule, mask, implementation)
    loss, policy = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        token_weight,
        mode=_mode(rule),
        selected=selected,
        mask=mask,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_c=math.inf,  # neither mode has a dual clip
        kl_cov_coef=kl_cov_coef,
        implementation=implementation,
    )
    return loss, DrawnSums(torch.cat([policy.values, counts])), selected


def _mode(rule: ClipCovRule | KlCovRule) -> str:
    return "kl_cov" if isinstance(rule, KlCovRule) else "clip_cov"


Call = Callable[..., tuple[Tensor, Tensor, Tensor] | None]
"""(log-probs, old log-probs, advantages, weights, keys, mask) -> (loss, sums, selected tokens), or None."""


@functools.lru_cache(maxsize=64)
def _call(
    rule: ClipCovRule | KlCovRule,
    clip_ratio_low: float,
    clip_ratio_high: float,
    kl_cov_coef: float,
    implementation: str,
) -> Call | None:
    """The CPU kernel with its constants; None where it is not wanted or the bounds are not known before it runs.

    The call itself gives None where tensors do not fit or tokens tie at the border of the selection.
    """
    if not use_compiled(implementation) or (isinstance(rule, ClipCovRule) and rule.quantiles is not None):
        return None
    settings = PolicySettings(_mode(rule), clip_ratio_low, clip_ratio_high, math.inf, kl_cov_coef)
    judge, (module, _) = judge_of(rule), load_autograd()
    if module is None:
        return functools.partial(_call_in_python, settings, rule.ratio, judge)
    ratios = (1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    bounds = (judge.lb, judge.ub, NEAR_BOUND, *judge.log_bounds())
    call: Call = module.DrawnLoss(MODE_CODES[settings.mode], *ratios, kl_cov_coef, rule.ratio, *bounds)
    return call


def _call_in_python(
    settings: PolicySettings, ratio: float, judge: CovJudge, *tensors: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What a call of spear_megatron._autograd does, where it is not compiled."""
    *columns, mask = tensors
    if not fits(tuple(columns), mask):
        return None
    drawn = draw_and_differentiate(tuple(columns), mask, settings, ratio, judge)
    if drawn is None:
        return None
    known, selected = drawn
    return attached(columns[0], known), known.sums, selected


def _draw_there(
    columns: Columns, rule: ClipCovRule | KlCovRule, mask: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """Counts of the draw, fp64 [3], and the tokens drawn, bool [T]; on the device and without waiting for it."""
    log_probs, old_log_probs, advantages, _, keys = columns
    found = select_on_device([TokenSet(log_probs.detach(), old_log_probs, advantages, keys)], rule, mask)
    numbers = found.numbers
    return torch.stack([numbers.num_candidates, numbers.num_near_bound, numbers.num_selected]), found.masks[0]


def _draw_here(
    columns: Columns, rule: ClipCovRule | KlCovRule, mask: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """The same by ``select_tokens``."""
    log_probs, old_log_probs, advantages, _, keys = columns
    used = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    places = used.nonzero().squeeze(1)
    own = TokenSet(*(value[places] for value in (log_probs.detach(), old_log_probs, advantages, keys)))
    drawn = select_tokens([own], rule, implementation=implementation)
    selected = torch.zeros_like(used)
    selected[places] = drawn.masks[0].to(selected.device)
    found = [drawn.num_candidates, drawn.num_near_bound, drawn.num_selected]
    return torch.tensor(found, dtype=torch.float64, device=selected.device), selected
