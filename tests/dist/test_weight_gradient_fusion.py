"""Weight gradients that the product adds itself are the same, head included; a stand-in serves for Apex's kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import VOCAB, Layout, build_actor, largest_gradient_error, make_rows, with_trainer_log_probs


def gradients_on_rank(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Gradients without and with the fusion, and how often the kernel was called."""
    from megatron.core.tensor_parallel import layers

    from spear_megatron.model import provider
    from spear_megatron.model.acceleration import Acceleration
    from spear_megatron.model.hf_io import iter_hf_tensors

    calls = 0

    def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        main_grad.add_(grad_output.t() @ inputs)

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    found = []
    for fused in (False, True):
        with (
            mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
            mock.patch.object(layers, "_grad_accum_fusion_available", True),
            mock.patch.object(provider, "choose_acceleration", lambda *given: Acceleration(False, fused)),
        ):
            actor, shape, parallel = build_actor(folder, Layout("1 rank", max_tokens=96))
            rows, _ = with_trainer_log_probs(actor, make_rows())
            actor.policy_gradients(rows)
            found.append(dict(iter_hf_tensors(actor.chunks, shape, parallel, kind="main_grad")))
            parallel.destroy()
    plain, added = found
    return plain, added, calls


@pytest.mark.parametrize("tied", [True, False])
def test_fused_weight_gradients_are_the_same(tied: bool, tmp_path: Any) -> None:
    folder = str(make_tiny_hf(tmp_path, "qwen3", vocab_size=VOCAB, num_layers=2, tie_word_embeddings=tied))
    ((plain, added, calls),) = run_ranks(gradients_on_rank, 1, folder)
    # Four matrices of every layer in each micro-batch; the head adds its own.
    assert calls > 0 and calls % 8 == 0
    error, name = largest_gradient_error(added, plain)
    assert error < 1e-6, name
