"""The CPU shim: everything lands on the CPU while it is entered, and nothing stays replaced."""

from __future__ import annotations

import pytest
import torch

from spear_megatron.device.cpu_shim import megatron_on_cpu, megatron_without_storage
from spear_megatron.device.platform import detect_platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is available")


def test_cuda_calls_land_on_the_cpu() -> None:
    with megatron_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.tensor([1.0], device="cuda:0", dtype=torch.float).device.type == "cpu"
        assert torch.empty_like(torch.ones(1), device=torch.device("cuda")).device.type == "cpu"
        assert torch.ones(2, device=torch.cuda.current_device()).cuda().sum() == 2
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type("torch.cuda.DoubleTensor").dtype == torch.float64
        torch.cuda.synchronize()


def test_the_random_state_of_cuda_is_that_of_the_cpu() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    with megatron_on_cpu():
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        megatron_random._set_cuda_rng_state(state)
        assert torch.equal(first, torch.rand(3))


def test_every_name_is_restored_after_nesting_and_errors() -> None:
    before = (torch.zeros, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize)
    with pytest.raises(ZeroDivisionError), megatron_on_cpu(), megatron_on_cpu():
        assert torch.zeros is not before[0]
        raise ZeroDivisionError
    after = (torch.zeros, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.synchronize)
    assert after == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_platform_without_cuda() -> None:
    platform = detect_platform(local_rank=3)
    assert (platform.device.type, platform.backend, platform.is_cuda) == ("cpu", "gloo", False)


def test_without_storage_new_tensors_have_none_and_names_come_back() -> None:
    empty, current = torch.empty, torch.cuda.current_device
    with megatron_without_storage():
        assert torch.empty(3).is_meta and torch.zeros(3, device="cuda").is_meta
        assert torch.zeros(3, device="cpu").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("meta")
        with megatron_on_cpu():
            assert torch.ones(2).is_meta
    assert torch.empty is empty and torch.cuda.current_device is current and not torch.empty(1).is_meta


def test_without_storage_must_be_outermost() -> None:
    with megatron_without_storage(), pytest.raises(RuntimeError, match="outermost"):
        with megatron_without_storage():
            pass
