"""float64 references of token_logprobs, for whatever device or emulation runs the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_megatron.kernels import token_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def random_case(
    seed: int, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    return logits.to(device), torch.randint(0, vocab, (rows,), generator=generator).to(device)


def reference(logits: Tensor, targets: Tensor, temperature: float, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 leaf of the logits, log-probs and entropy by torch's log_softmax."""
    x = logits.detach().double().clamp(min=-1e30).requires_grad_()  # 0 * -inf would poison its gradient
    log_p = torch.log_softmax(x[:, :valid] / temperature, dim=-1)
    return x, log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def check(logits: Tensor, targets: Tensor, temperature: float, valid: int | None = None, seed: int = 0) -> Tensor:
    """Compare values and gradients with float64; the gradient of the logits."""
    leaf = logits.detach().requires_grad_()  # the same memory, so of the same alignment
    log_probs, entropy = token_logprobs(
        leaf, targets, temperature=temperature, valid_vocab=valid, implementation="compiled"
    )
    x, expected_lp, expected_h = reference(logits, targets, temperature, valid or logits.shape[1])
    assert ((log_probs - expected_lp).abs() <= 2e-6 * expected_lp.abs().clamp(min=1)).all()
    assert ((entropy - expected_h).abs() <= 1e-5).all()
    weights = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    (grad,) = torch.autograd.grad((weights[0] * log_probs + weights[1] * entropy).sum(), leaf)
    (expected,) = torch.autograd.grad((weights[0] * expected_lp + weights[1] * expected_h).sum(), x)
    assert grad.dtype == logits.dtype
    smallest = 6e-8 if logits.dtype == torch.float16 else 0  # fp16 has few numbers near 0
    error = (grad.double() - expected).abs()
    assert (error <= 2e-6 / temperature + smallest + ROUNDING[logits.dtype] * expected.abs()).all()
    return grad
