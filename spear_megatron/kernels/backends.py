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
    if implementation == "eager" or (implementation == "auto" and compiled is None):
        return logprobs_eager
    if compiled is None or dtype not in compiled.DTYPE_CODES:
        unfit = f"no compiled token_logprobs for {dtype} on {device.type}"
    else:
        unfit = (cuda_library if compiled is logprobs_cuda else extension).missing_reason()
        if not unfit:
            return compiled
    if implementation == "compiled":
        raise RunError(unfit)
    extension.warn_slow_path(unfit)
    return logprobs_eager
