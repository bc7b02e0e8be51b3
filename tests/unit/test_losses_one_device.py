"""Losses and LM head make no tensor on another device than the one they are given: run on the meta device.

Operations there know devices and shapes but no values, and refuse to mix devices as CUDA does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spear_megatron.algorithms.covariance_device import _quantiles
from spear_megatron.kernels import linear_token_logprobs
from spear_megatron.kernels.cov_select_cuda import CovColumns
from spear_megatron.trainer.losses import PolicyLoss, SurrogateRule, supervised_loss
from spear_megatron.types import MicroBatch

META = torch.device("meta")
TOKENS, CHOSEN = 16, 5


class ValuesThatDecide(TorchFunctionMode):
    """Where a value would decide: every mask has CHOSEN tokens, every condition holds.

    A mode, as a method that was once replaced on the class leaves it changed: of Tensor's item access even a restored
    one makes torch take scalars for sequences.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero:
            return torch.zeros((CHOSEN, 1), dtype=torch.int64, device=args[0].device)
        if func is Tensor.__bool__:
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            tensor, mask = args
            assert mask.device == tensor.device
            args = (tensor, torch.zeros(CHOSEN, dtype=torch.int64, device=mask.device))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def values_that_decide() -> Iterator[None]:
    with ValuesThatDecide():
        yield


def micro_batch() -> MicroBatch:
    masks, ids = ("loss_mask", "replayed", "selected"), ("tokens", "targets", "position_ids", "token_keys")
    columns: dict[str, Any] = {}
    for name in MicroBatch.__dataclass_fields__:
        dtype = torch.bool if name in masks else torch.int64 if name in ids else torch.float32
        columns[name] = torch.empty(TOKENS, dtype=dtype, device=META)
    return MicroBatch(**columns | {"cu_seqlens": torch.empty(3, dtype=torch.int32, device=META), "rows": ()})


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device=META, requires_grad=True)


@pytest.mark.parametrize("mode", ["vanilla", "gpg", "clip_cov", "kl_cov"])
@pytest.mark.parametrize("kl_kind", ["kl", "abs", "mse", "low_var_kl"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_policy_loss(mode: str, kl_kind: str, on_policy: bool) -> None:
    rule = SurrogateRule(
        mode=mode, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, kl_cov_coef=1.0, implementation="eager"
    )
    loss_of = PolicyLoss(
        rule=rule, replay_rule=rule, entropy_weight=0.1, replay_entropy_weight=0.1, kl_coef=0.1, kl_kind=kl_kind,
        on_policy=on_policy, engine_ratio=on_policy,
    )  # fmt: skip
    log_probs, entropy = on_meta(TOKENS), on_meta(TOKENS)
    loss, figures = loss_of(log_probs, entropy, micro_batch())
    loss.backward()
    assert log_probs.grad is not None and entropy.grad is not None and log_probs.grad.device == META
    assert all(value.device == META for value in (*figures.sums.values(), *figures.maxima.values()))


def test_supervised_loss_and_head() -> None:
    batch, hidden, weight = micro_batch(), on_meta(TOKENS, 8), on_meta(300, 8)
    for budget in (None, 1):
        log_probs, entropy = linear_token_logprobs(
            hidden, weight, batch.targets, mask=batch.loss_mask, valid_vocab=290, max_logits_bytes=budget
        )
        loss, figures = supervised_loss(log_probs, entropy, batch)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all(value.device == META for value in (*grads, *figures.sums.values()))


def test_quantiles_of_a_selection() -> None:
    column, keys = torch.empty(TOKENS, device=META), torch.empty(TOKENS, dtype=torch.int64, device=META)
    numbers = torch.empty(8, dtype=torch.float64, device=META)
    bounds = _quantiles(CovColumns(column, column, column, keys, None, 1, TOKENS, None), numbers, (0.5, 0.9))
    assert bounds.device == META and bounds.shape == (2,)
