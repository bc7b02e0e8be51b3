"""Tests on a CUDA device, run by `make gpu-check`; without a device they are skipped with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear_megatron.kernels import cuda_library

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda_library.missing_reason() if torch.cuda.is_available() else "no CUDA device"
    if reason:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
