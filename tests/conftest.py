"""Markers and import paths shared by every test tier."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent
for _directory in (_TESTS, _TESTS / "dist"):
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: expensive variants, run by `make test` and left out of `make test-fast`")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
