"""Loads the CUDA kernels (csrc/cuda/, spear_megatron/_cuda.so) and turns their error codes into exceptions."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from spear_megatron.parallel.errors import RunError

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"
BUILD_COMMAND = "make cuda"

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_LOGITS = (_int, _pointer, _pointer, _int, _long, _long, _long, _pointer, _long, _double)
# Parameter types of the headers csrc/cuda/*.h, in their order; every kernel takes device and stream first. Of
# token_logprobs then follow logits, dtype, rows, row stride, columns, targets, first column, temperature.
SIGNATURES: dict[str, tuple[tuple[type, ...], type]] = {
    "spear_token_logprobs_forward": ((*_LOGITS, _int, _pointer), _int),
    "spear_token_logprobs_backward": ((*_LOGITS, _pointer, _pointer, _long, _long), _int),
    "spear_merge_rows": ((_int, _pointer, _pointer, _long, _long, _double, *[_pointer] * 3), _int),
    "spear_join_rows": ((_int, *[_pointer] * 3, _long, _pointer, _long, _long, _pointer), _int),
    "spear_policy_loss": ((_int, *[_pointer] * 7, _long, _int, *[_double] * 4, *[_pointer] * 4), _int),
    "spear_policy_loss_scratch": ((_long,), _long),
    "spear_cov_pack": ((_int, *[_pointer] * 6, _long, *[_pointer] * 5), _int),
    "spear_cov_means_scratch": ((_long, _long), _long),
    "spear_cov_means": ((_int, *[_pointer] * 4, *[_long] * 3, _double, _double, _pointer, _pointer), _int),
    "spear_cov_select_scratch": ((_long,), _long),
    "spear_cov_select": ((_int, *[_pointer] * 6, _long, _long, _pointer, *[_double] * 3, _int, *[_pointer] * 3), _int),
    "spear_cuda_error_string": ((_int,), ctypes.c_char_p),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason why it cannot be used."""
    if not LIBRARY.is_file():
        return None, f"the CUDA kernels are not built; run `{BUILD_COMMAND}` in the repository (it needs nvcc)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (arguments, result) in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return None, f"the CUDA kernels cannot be loaded ({error}); run `{BUILD_COMMAND}` in the repository"
    return library, ""


def missing_reason() -> str:
    """Why the CUDA kernels cannot be used, with the remedy; empty when the library loads. Touches no device."""
    return _load()[1]


def measure(name: str, *arguments: int) -> int:
    """A size that the library computes, by a function of ``SIGNATURES`` that returns one. Touches no device.

    Raises:
        RunError: the library is missing.
    """
    library, reason = _load()
    if library is None:
        raise RunError(reason)
    size: int = getattr(library, name)(*arguments)
    return size


def call(name: str, *arguments: int | float | None) -> None:
    """Call one kernel of the library.

    Args:
        name: a function of ``SIGNATURES`` that returns an error code.
        arguments: device index, stream and so on, pointers as integers.

    Raises:
        RunError: the library is missing, or CUDA refused the launch (no device or driver, wrong arguments).
    """
    library, reason = _load()
    if library is None:
        raise RunError(reason)
    code = getattr(library, name)(*arguments)
    if code != 0:
        text = library.spear_cuda_error_string(code).decode()
        raise RunError(f"{name}: CUDA error {code}: {text}")
