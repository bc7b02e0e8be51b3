"""The compiled policy loss as an operator of torch (``torch.ops.spear.policy_loss``), and which kernel serves where.

torch.compile keeps the operator in its graph as it is. Outside of it :func:`spear_megatron.kernels.policy_loss` does
not go through it: a registered operator costs more per call than the autograd function.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spear_megatron.kernels import policy_loss_compiled, policy_loss_cuda
from spear_megatron.kernels.backends import usable
from spear_megatron.kernels.checks import refuse_graph
from spear_megatron.kernels.policy_loss_compiled import NUM_SUMS, KnownLoss, PolicySettings, PolicyTokens

_COMPILED: dict[str, ModuleType] = {"cpu": policy_loss_compiled, "cuda": policy_loss_cuda}


def compiled_for(dtype: torch.dtype, device_type: str, implementation: str) -> ModuleType | None:
    """The module whose ``loss_and_gradient`` serves tensors of that dtype and place; None: plain torch.

    Raises:
        RunError: ``implementation="compiled"`` and the compiled kernel is missing or does not fit.
    """
    module = _COMPILED.get(device_type)
    return usable(
        module,
        implementation,
        fits=dtype == torch.float32,
        of_cuda=module is policy_loss_cuda,
        operation=f"policy_loss for {dtype} on {device_type}",
    )


@torch.compiler.assume_constant_result
def has_kernel(dtype: torch.dtype, device_type: str, implementation: str) -> bool:
    """Whether :func:`compiled_for` finds one; torch.compile asks once while it traces."""
    return compiled_for(dtype, device_type, implementation) is not None


@torch.library.custom_op(
    "spear::policy_loss",
    mutates_args=(),
    schema="(Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor token_weight, Tensor? selected, "
    "Tensor? mask, str mode, float clip_ratio_low, float clip_ratio_high, float clip_ratio_c, float kl_cov_coef) "
    "-> (Tensor, Tensor, Tensor)",
)
def policy_loss_op(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    selected: Tensor | None,
    mask: Tensor | None,
    mode: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    kl_cov_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`policy_loss` by the compiled kernel of the device; arguments as there, fp32 and bool.

    Returns:
        The loss, fp32 scalar; the sums, fp64 [6]; the gradient of the loss by the log-probs, fp32 [T].

    Raises:
        RunError: the compiled kernel is missing or does not fit.
    """
    module = compiled_for(log_probs.dtype, log_probs.device.type, "compiled")
    assert module is not None
    tokens = PolicyTokens(log_probs, old_log_probs, advantages, token_weight, selected, mask)
    settings = PolicySettings(mode, clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_cov_coef)
    known: KnownLoss = module.loss_and_gradient(tokens, settings)
    return tuple(known)


@torch.library.register_fake("spear::policy_loss")
def _policy_loss_fake(log_probs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = log_probs.new_empty(NUM_SUMS, dtype=torch.float64)
    return log_probs.new_empty(()), sums, log_probs.new_empty(log_probs.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])
    ctx.num_inputs = len(inputs)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_graph()
    (gradient,) = ctx.saved_tensors
    return gradient * grad_loss, *[None] * (ctx.num_inputs - 1)


torch.library.register_autograd("spear::policy_loss", _differentiate, setup_context=_keep)
