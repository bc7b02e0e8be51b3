"""Lets megatron-core run without CUDA, or without memory: the only place that replaces names of other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from spear_megatron.device.optional import protect_megatron

_FACTORIES = (
    "tensor", "empty", "zeros", "ones", "full", "arange",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand", "randn", "randint",
)  # fmt: skip
_FRESH = {"empty", "zeros", "ones", "full"}  # what Megatron makes weights of
_active = 0


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """While active, megatron-core's CUDA calls land on the CPU. Does nothing where CUDA is available.

    Covers the current device, ``Tensor.cuda``, tensor factories called with ``device="cuda"``, the ``torch.cuda.*``
    type names that Megatron's optimizer compares, and the CUDA random state (mapped to the CPU generator, which
    activation recomputation saves and restores). Everything that builds, runs or saves a Megatron model belongs
    inside it. May be nested; the names are process-wide, so other threads see them too.
    """
    protect_megatron()
    if torch.cuda.is_available() or _active:
        with _counted():
            yield
        return
    with _replaced("cpu"), _counted():
        yield


@contextmanager
def megatron_without_storage() -> Iterator[None]:
    """While active, what Megatron builds has shapes and dtypes but no memory: every tensor is on the meta device.

    Serves to count what a rank of any layout holds, with or without CUDA: what would be created on the GPU, and weights
    that name no device, come to the meta device. Contexts of ``megatron_on_cpu`` inside it do nothing.

    Raises:
        RuntimeError: called inside ``megatron_on_cpu``.
    """
    protect_megatron()
    if _active:
        raise RuntimeError("megatron_without_storage must be the outermost context, leave megatron_on_cpu first")
    with _replaced("meta"), _counted():
        yield


@contextmanager
def _counted() -> Iterator[None]:
    global _active
    _active += 1
    try:
        yield
    finally:
        _active -= 1


@contextmanager
def _replaced(device: str) -> Iterator[None]:
    with ExitStack() as stack:
        for target, name, replacement in _replacements(device):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _replacements(device: str) -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random

    table: list[tuple[Any, str, Any]] = [(torch, name, _moved(getattr(torch, name), device)) for name in _FACTORIES]
    if device == "meta":
        table += [(torch, name, _moved(getattr(torch, name), device, default=True)) for name in _FRESH]
    table += [
        (torch.Tensor, "cuda", _identity),
        (torch.Tensor, "type", _cuda_type(torch.Tensor.type)),
        (torch.cuda, "current_device", lambda: torch.device(device)),
        (torch.cuda, "is_initialized", lambda: False),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda.random, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
    ]
    return table


def _identity(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _moved(
    factory: Callable[..., torch.Tensor], device: str, *, default: bool = False
) -> Callable[..., torch.Tensor]:
    """``factory`` that answers a wish for CUDA, and with ``default`` no wish, on ``device``."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("device")
        if (wanted is None and default) or (wanted is not None and str(wanted).startswith("cuda")):
            kwargs["device"] = device
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    def cuda_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(tensor).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(tensor, dtype, *args, **kwargs)

    return cuda_type
