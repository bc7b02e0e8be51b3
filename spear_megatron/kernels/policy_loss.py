"""Policy loss of many tokens and what a trainer records of it: one pass by a compiled kernel, or plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spear_megatron.kernels.backends import IMPLEMENTATIONS
from spear_megatron.kernels.checks import differentiable_once
from spear_megatron.kernels.extension import load_autograd
from spear_megatron.kernels.policy_loss_compiled import KnownLoss, PolicySettings, PolicyTokens
from spear_megatron.kernels.policy_loss_ops import compiled_for, has_kernel, policy_loss_op
from spear_megatron.kernels.policy_surrogates import check_mode, token_surrogate


class PolicySums(NamedTuple):
    """Sums over the tokens that take part, detached, on the device of the tokens; the properties are fp64 scalars.

    Attributes:
        values: fp64 [6], the properties in their order; a subclass has more.
    """

    values: Tensor

    @property
    def loss(self) -> Tensor:
        """The loss before it is rounded to the dtype of the log-probs."""
        return self.values[0]

    @property
    def clipped(self) -> Tensor:
        """Number of tokens where PPO's clip is active."""
        return self.values[1]

    @property
    def dual_clipped(self) -> Tensor:
        """Number of tokens where the dual clip is active."""
        return self.values[2]

    @property
    def log_ratio(self) -> Tensor:
        """Sum of log pi / pi_old, limited to [-20, 20]."""
        return self.values[3]

    @property
    def ratio(self) -> Tensor:
        """Sum of the ratios, exponentials of what ``log_ratio`` sums."""
        return self.values[4]

    @property
    def max_ratio(self) -> Tensor:
        """Largest ratio, 0 without tokens."""
        return self.values[5]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    mode: str,
    selected: Tensor | None = None,
    mask: Tensor | None = None,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    kl_cov_coef: float,
    implementation: str = "auto",
) -> tuple[Tensor, PolicySums]:
    """Minus the weighted sum of the tokens' surrogates, differentiable in the current log-probs alone.

    The surrogates are those of :func:`spear_megatron.kernels.policy_surrogates.token_surrogate`. A log-prob, current or
    old, that is NaN or infinite makes the loss NaN, whether its token is clipped or selected or not (gpg reads no old
    ones, and is infinite or NaN). The compiled kernel's result does not depend on the number of threads, and on CUDA it
    neither waits for the device nor changes from one call to the next.
    Under torch.compile it is one operator of the graph (`spear::policy_loss`).

    Args:
        log_probs: floating [T], of the current policy; the compiled kernel takes fp32.
        old_log_probs, advantages, token_weight: [T], of the same dtype; normaliser, gamma and correction are all in
            the weight.
        mode: vanilla, gpg, clip_cov or kl_cov.
        selected: bool [T], the tokens chosen by covariance; clip_cov and kl_cov need it, the others take none.
        mask: bool [T], the tokens that take part; what stands at others has no effect. None: all.
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high].
        clip_ratio_c: dual-clip bound.
        kl_cov_coef: price of moving of the selected tokens of kl_cov.
        implementation: as in ``token_logprobs``: "auto" takes the compiled kernel on the CPU and on CUDA, and where
            it does not fit there warns once and takes plain torch; "compiled" raises instead; "eager" is plain torch.

    Returns:
        The loss, a scalar of the dtype of the log-probs, and the sums.

    Raises:
        ValueError: shapes, dtypes, devices or names outside of what is described above.
        RunError: ``implementation="compiled"`` and the compiled kernel is missing or does not fit.
    """
    tokens = PolicyTokens(log_probs, old_log_probs, advantages, token_weight, selected, mask)
    settings = PolicySettings(mode, clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_cov_coef)
    check_tokens(tokens)
    _check_settings(mode, selected, implementation)
    if torch.compiler.is_compiling():
        if not has_kernel(log_probs.dtype, log_probs.device.type, implementation):
            return _eager(tokens, settings)
        loss, sums, _ = policy_loss_op(*tokens, *settings)
        return loss, PolicySums(sums)
    module = compiled_for(log_probs.dtype, log_probs.device.type, implementation)
    if module is None:
        return _eager(tokens, settings)
    known = module.loss_and_gradient(tokens, settings)
    return attached(log_probs, known), PolicySums(known.sums)


def check_tokens(tokens: PolicyTokens, keys: Tensor | None = None) -> None:
    """ValueError unless all are [T], of the dtypes that the losses take, on one device; keys are int64 [T]."""
    first = tokens.log_probs
    if first.dim() != 1 or not first.is_floating_point():
        raise ValueError(f"log_probs must be floating [T], not {first.dtype} {list(first.shape)}")
    names = (*tokens._fields, "token_keys")
    dtypes = (first.dtype,) * 4 + (torch.bool,) * 2 + (torch.int64,)
    shape, device = first.shape, first.device
    for name, value, dtype in zip(names, (*tokens, keys), dtypes, strict=True):
        if value is not None and (value.dtype is not dtype or value.shape != shape or value.device != device):
            raise ValueError(
                f"{name} must be {dtype} [{len(first)}] on {device} as log_probs are, "
                f"not {value.dtype} {list(value.shape)} on {value.device}"
            )


def _check_settings(mode: str, selected: Tensor | None, implementation: str) -> None:
    check_mode(mode, selected)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")


def attached(log_probs: Tensor, known: KnownLoss) -> Tensor:
    """The loss, as a function of the log-probs that can be differentiated once."""
    module, _ = load_autograd()
    loss: Tensor
    if module is None:
        loss = _KnownGradient.apply(log_probs, known)
    else:
        loss = module.attached(log_probs, known.loss, known.gradient)
    return loss


class _KnownGradient(torch.autograd.Function):
    """What csrc/autograd/known_gradient.h does, where it is not compiled."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, known: KnownLoss) -> Tensor:
        ctx.save_for_backward(known.gradient)
        return known.loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        if grad_loss.is_cpu and grad_loss.item() == 1:  # the loss itself was differentiated
            return gradient, None
        return gradient * grad_loss, None


def _eager(tokens: PolicyTokens, settings: PolicySettings) -> tuple[Tensor, PolicySums]:
    if tokens.mask is not None:
        mask = tokens.mask
        used = [None if value is None else value[mask] for value in tokens[:-1]]
        tokens = PolicyTokens._make([*used, None])
    policy = token_surrogate(
        settings.mode,
        tokens.log_probs,
        tokens.old_log_probs.detach(),
        tokens.advantages.detach(),
        selected=tokens.selected,
        clip_ratio_low=settings.clip_ratio_low,
        clip_ratio_high=settings.clip_ratio_high,
        clip_ratio_c=settings.clip_ratio_c,
        kl_cov_coef=settings.kl_cov_coef,
    )
    loss = -(tokens.token_weight.detach() * policy.surrogate).sum(dtype=torch.float64)
    ratio = policy.log_ratio.double().exp()
    summed = [value.sum(dtype=torch.float64) for value in (policy.clipped, policy.dual_clipped, policy.log_ratio)]
    largest = ratio.max() if len(ratio) else torch.zeros_like(loss)
    sums = torch.stack([loss.detach(), *summed, ratio.sum(), largest.detach()])
    return loss.to(tokens.log_probs.dtype), PolicySums(sums.detach())
