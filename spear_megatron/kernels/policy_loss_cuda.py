"""Policy loss, its gradient and its sums by the CUDA kernels (csrc/cuda/policy_loss.cu).

Nothing here waits for the device, so it can be captured into a CUDA graph; results are the same bits every time.
"""

from __future__ import annotations

import torch

from spear_megatron.kernels.cuda_library import call, measure
from spear_megatron.kernels.policy_loss_compiled import MODE_CODES, NUM_SUMS, KnownLoss, PolicySettings, PolicyTokens


def loss_and_gradient(tokens: PolicyTokens, settings: PolicySettings) -> KnownLoss:
    """Loss, sums and gradient, on the device.

    Args:
        tokens: fp32 and bool on one CUDA device, of any stride.
        settings: mode and constants.

    Raises:
        RunError: the library is missing or CUDA refuses the launch.
    """
    held = PolicyTokens(*(None if value is None else value.detach().contiguous() for value in tokens))
    device, count = held.log_probs.device, len(held.log_probs)
    with torch.cuda.device(device):
        scratch = torch.empty(measure("spear_policy_loss_scratch", count), dtype=torch.float64, device=device)
        loss = torch.empty((), dtype=torch.float32, device=device)
        sums = torch.empty(NUM_SUMS, dtype=torch.float64, device=device)
        gradient = torch.empty(count, dtype=torch.float32, device=device)
        call(
            "spear_policy_loss",
            held.log_probs.get_device(),
            torch.cuda.current_stream().cuda_stream,
            *(None if value is None else value.data_ptr() for value in held),
            count,
            MODE_CODES[settings.mode],
            1.0 - settings.clip_ratio_low,
            1.0 + settings.clip_ratio_high,
            settings.clip_ratio_c,
            settings.kl_cov_coef,
            gradient.data_ptr(),
            loss.data_ptr(),
            sums.data_ptr(),
            scratch.data_ptr(),
        )
    return KnownLoss(loss, sums, gradient)
