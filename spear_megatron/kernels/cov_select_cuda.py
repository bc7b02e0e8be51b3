"""Selection by covariance on a CUDA device (csrc/cuda/cov_means.cu, cov_select.cu), without waiting for it.

Sums, covariances and order are those of the CPU, bit for bit, so that the same tokens are chosen. Counts and means
stay on the device; everything can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spear_megatron.kernels.backends import IMPLEMENTATIONS
from spear_megatron.kernels.cuda_library import call, measure, missing_reason
from spear_megatron.kernels.extension import warn_slow_path
from spear_megatron.parallel.errors import RunError

DEVICE_TYPES = {"cuda"}
_PACK_BLOCK = 4096


class CovColumns(NamedTuple):
    """Tokens of one or several rows back to back, on one device, contiguous.

    Attributes:
        log_probs, old_log_probs, advantages: float32 [T].
        keys: int64 [T].
        starts: int64 [rows + 1], where the rows begin; None: one row of all T.
        num_rows, longest: number of rows, and a bound of their lengths.
        places: int32 [T], where the result of a token belongs; None: at its own place.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    keys: Tensor
    starts: Tensor | None
    num_rows: int
    longest: int
    places: Tensor | None


class CovNumbers(NamedTuple):
    """fp64 scalars on the device, see ``Selection`` in :mod:`spear_megatron.algorithms.covariance`."""

    num_tokens: Tensor
    mean_advantage: Tensor
    mean_log_prob: Tensor
    lb: Tensor
    ub: Tensor
    num_candidates: Tensor
    num_selected: Tensor
    num_near_bound: Tensor


def usable(device: torch.device, implementation: str) -> bool:
    """Whether tokens on ``device`` are selected there, and not on the CPU.

    Raises:
        ValueError: unknown implementation.
        RunError: ``implementation="compiled"`` and the CUDA kernels are missing.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}")
    if device.type not in DEVICE_TYPES or implementation == "eager":
        return False
    reason = missing_reason()
    if reason and implementation == "compiled":
        raise RunError(reason)
    if reason:
        warn_slow_path(reason)
    return not reason


def pack(columns: CovColumns, mask: Tensor) -> CovColumns:
    """The tokens on the mask, in their order, as one row; what lies behind its end is undefined.

    Args:
        columns: of one row.
        mask: bool [T].
    """
    count, device = len(mask), mask.device
    with torch.cuda.device(device):
        floats = torch.empty((3, count), dtype=torch.float32, device=device)
        keys, starts = (torch.empty(size, dtype=torch.int64, device=device) for size in (count, 2))
        places = torch.empty(count, dtype=torch.int32, device=device)
        counts = torch.empty(count // _PACK_BLOCK + 1, dtype=torch.int32, device=device)
        inputs = (*columns[:4], mask.contiguous())
        outputs = (floats, keys, places, starts, counts)
        call("spear_cov_pack", *_place(mask), *map(_address, inputs), count, *map(_address, outputs))
    return CovColumns(floats[0], floats[1], floats[2], keys, starts, 1, count, places)


def means(columns: CovColumns, lb: float, ub: float) -> Tensor:
    """The numbers of a selection, fp64 [8] as ``CovNumbers``, with the last three undefined.

    The means are NaN if a log-prob or advantage is not finite, and 0 without tokens.
    """
    count, device = len(columns.keys), columns.keys.device
    with torch.cuda.device(device):
        numbers = torch.empty(len(CovNumbers._fields), dtype=torch.float64, device=device)
        size = measure("spear_cov_means_scratch", columns.num_rows, columns.longest)
        scratch = torch.empty(size, dtype=torch.float64, device=device)
        call(
            "spear_cov_means",
            *_place(columns.keys),
            _address(columns.log_probs),
            _address(columns.advantages),
            _address(columns.starts),
            columns.num_rows,
            count,
            columns.longest,
            lb,
            ub,
            numbers.data_ptr(),
            scratch.data_ptr(),
        )
    return numbers


def choose(
    columns: CovColumns, numbers: Tensor, ratio: float, log_bounds: tuple[float, float], by_covariance: bool
) -> Tensor:
    """The max(floor(ratio * tokens), 1) first candidates, bool [T]; none if the ratio is 0.

    Candidates have a covariance inside the bounds and a log-ratio that the clip bounds do not cut off. The smallest
    key comes first, or ``by_covariance`` the largest covariance; equal ones go by key, key of the row, position in it,
    advantage, log-prob and at last by place.

    Args:
        columns: the tokens.
        numbers: from :func:`means`; its last three are written.
        ratio: share of all tokens.
        log_bounds: see ``CovJudge.log_bounds``.
        by_covariance: how candidates are ordered.
    """
    count, device = len(columns.keys), columns.keys.device
    with torch.cuda.device(device):
        chosen = torch.empty(count, dtype=torch.bool, device=device)
        scratch = torch.empty(measure("spear_cov_select_scratch", count), dtype=torch.int32, device=device)
        call(
            "spear_cov_select",
            *_place(columns.keys),
            *map(_address, columns[:5]),
            columns.num_rows,
            count,
            _address(columns.places),
            ratio,
            *log_bounds,
            int(by_covariance),
            numbers.data_ptr(),
            scratch.data_ptr(),
            chosen.data_ptr(),
        )
    return chosen


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and stream, the first arguments of every kernel."""
    return tensor.get_device(), torch.cuda.current_stream().cuda_stream


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
