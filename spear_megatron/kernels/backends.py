"""Which implementation of the row statistics and logit gradients serves tensors of a given dtype and device."""

from __future__ import annotations

from types import ModuleType

import torch

from spear_megatron.kernels import cuda_library, extension, logprobs_compiled, logprobs_cuda, logprobs_eager
from spear_megatron.parallel.errors import RunError

IMPLEMENTATIONS = ("auto", "compiled", "eager")
_COMPILED: dict[str, ModuleType] = {"cpu": logprobs_compiled, "cuda": logprobs_cuda}


def choose_backend(dtype: torch.dtype, device: torch.device, implementation: str) -> ModuleType:
    """The module whose `row_stats` and `logits_grad` do the work on logits of that dtype and place.

    Raises:
        RunError: ``implementation="compiled"`` and the compiled kernels are missing or do not fit.
    """
    compiled = _COMPILED.get(device.type)
    fits = compiled is not None and dtype in compiled.DTYPE_CODES
    operation = f"token_logprobs for {dtype} on {device.type}"
    of_cuda = compiled is logprobs_cuda
    return usable(compiled, implementation, fits=fits, of_cuda=of_cuda, operation=operation) or logprobs_eager


def usable(
    compiled: ModuleType | None, implementation: str, *, fits: bool, of_cuda: bool, operation: str
) -> ModuleType | None:
    """``compiled`` where ``implementation`` lets it be used and it can be; None: plain torch, after one warning.

    Args:
        compiled: the compiled implementation of this kind of device, None if there is none.
        fits: whether it takes the dtype. of_cuda: whether it stands in the CUDA library.
        operation: what is asked for, for messages.

    Raises:
        RunError: ``implementation="compiled"`` and it is missing or does not fit.
    """
    if implementation == "eager" or (implementation == "auto" and compiled is None):
        return None
    if compiled is None or not fits:
        unfit = f"no compiled {operation}"
    else:
        unfit = (cuda_library if of_cuda else extension).missing_reason()
        if not unfit:
            return compiled
    if implementation == "compiled":
        raise RunError(unfit)
    extension.warn_slow_path(unfit)
    return None
