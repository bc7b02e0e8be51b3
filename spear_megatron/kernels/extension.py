"""Loads the compiled module spear_megatron._C and reports what this installation can use."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

from spear_megatron.kernels import cuda_library
from spear_megatron.parallel.errors import RunError

BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason why it cannot be used."""
    import torch  # noqa: F401  its OpenMP runtime must be the one that the kernels find

    return _imported("spear_megatron._C", "the compiled kernels")


def _imported(name: str, what: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError:
        return None, f"{what} ({name}) are not built; run `{BUILD_COMMAND}` in the repository"
    except ImportError as error:
        return None, f"{name} cannot be loaded ({error}); run `{BUILD_COMMAND}` in the repository"


@functools.cache
def load_autograd() -> tuple[ModuleType | None, str]:
    """The module spear_megatron._autograd and "", or None and why autograd functions in Python stand in for it."""
    module, reason = _load()
    if module is None:
        return None, reason
    module, reason = _imported("spear_megatron._autograd", "the compiled autograd functions")
    if module is None:
        return None, reason
    return _of_this_torch(module)


def _of_this_torch(module: ModuleType) -> tuple[ModuleType | None, str]:
    import torch

    if module.torch_version == torch.__version__.split("+")[0]:
        return module, ""
    built = f"spear_megatron._autograd was compiled for torch {module.torch_version}, not {torch.__version__}"
    return None, f"{built}; run `{BUILD_COMMAND}` in the repository"


def compiled_module() -> ModuleType:
    """The module spear_megatron._C. Raises RunError with the build command when it is missing or broken."""
    module, reason = _load()
    if module is None:
        raise RunError(reason)
    return module


def missing_reason() -> str:
    """Why the compiled module cannot be used, with the remedy; empty when it can."""
    return _load()[1]


@functools.cache
def warn_slow_path(reason: str) -> None:
    """Tell once per process and reason that an eager implementation stands in for a compiled kernel."""
    warnings.warn(f"{reason}; the slower eager implementation is used", RuntimeWarning, stacklevel=4)


def available() -> dict[str, Any]:
    """What ``implementation="auto"`` uses here.

    Returns:
        ``compiled``: whether spear_megatron._C loads; ``reason``: why not, with the remedy, else ""; ``isa``: the
        instruction set of the compiled CPU kernels (generic, avx2, avx512) or None; ``cuda_reason``: why the CUDA
        kernels do not load, with the remedy, else ""; ``autograd_reason``: why autograd functions are those in Python,
        which compute the same with some more time per call, else ""; and per operation a mapping from device type to
        "compiled" or "eager". Without the CUDA kernels, ``cov_select`` copies tokens on CUDA to the CPU and works
        there, as it always does for a selection over several ranks.
    """
    module, reason = _load()
    on_cpu = "eager" if module is None else "compiled"
    cuda_reason = cuda_library.missing_reason()
    return {
        "compiled": module is not None,
        "reason": reason,
        "isa": None if module is None else module.isa(),
        "cuda_reason": cuda_reason,
        "autograd_reason": load_autograd()[1],
        "token_logprobs": {"cpu": on_cpu, "cuda": "eager" if cuda_reason else "compiled"},
        "policy_loss": {"cpu": on_cpu, "cuda": "eager" if cuda_reason else "compiled"},
        "cov_select": {"cpu": on_cpu, "cuda": on_cpu if cuda_reason else "compiled"},
    }
