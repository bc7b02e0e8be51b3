"""The arithmetic and indices of the CUDA kernels, run on the host thread by thread, against float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spear_megatron import _C
from spear_megatron.kernels import logprobs_eager
from spear_megatron.kernels.softmax_stats import VocabShard, merge_stats

CODES = {torch.float32: 0, torch.bfloat16: 1}


def row_at(offset: int, values: Tensor) -> Tensor:
    """``values`` in memory that starts ``offset`` elements after a multiple of 16 bytes."""
    room = torch.zeros(len(values) + 32, dtype=values.dtype)
    start = (-room.data_ptr() % 16) // room.element_size() + offset
    row = room[start : start + len(values)]
    return row.copy_(values)


def stats_of(row: Tensor, temperature: float, threads: int, with_entropy: bool = True) -> tuple[float, float, float]:
    return _C.emulate_row_stats(row.data_ptr(), CODES[row.dtype], len(row), temperature, with_entropy, threads)


def expected_stats(row: Tensor, temperature: float) -> tuple[float, float, float]:
    """Plain Python in float64."""
    values = row.double().tolist()
    largest = max(values)
    terms = [(math.exp((x - largest) / temperature), x - largest) for x in values if x > -math.inf]
    return largest, math.fsum(e for e, _ in terms), math.fsum(e * d for e, d in terms)


def check_stats(row: Tensor, temperature: float, threads: int) -> None:
    largest, total, moment = expected_stats(row, temperature)
    found = stats_of(row, temperature, threads)
    assert found[0] == largest
    assert found[1] == pytest.approx(total, rel=1e-6)
    assert found[2] == pytest.approx(moment, rel=2e-6, abs=1e-6 * total)
    assert stats_of(row, temperature, threads, with_entropy=False) == (largest, found[1], 0.0)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 31, 127, 1000, 1031, 4099])
def test_statistics_of_any_length_and_alignment(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for offset in range(9):
        values = (torch.randn(columns, generator=generator) * 4).to(dtype)
        check_stats(row_at(offset, values), 0.7, threads=(32, 64)[offset % 2])


def test_sums_of_equal_terms_do_not_drift() -> None:
    # Every addition of equal terms is rounded the same way, so that the error grows with their number.
    for depth in torch.linspace(-13.7, -0.3, 20).tolist():
        values = torch.full((152064,), depth)
        values[0] = 0
        _, total, moment = stats_of(row_at(0, values), 1.0, 256)
        exact = 1 + 152063 * math.exp(values[1].item())
        weighted = 152063 * math.exp(values[1].item()) * values[1].item()
        assert abs(math.log(total / exact)) <= 2e-6
        assert abs(math.log(total / exact) - moment / total + weighted / exact) <= 1e-5


def test_statistics_of_a_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(151936, generator=generator) * 2, torch.zeros(152064), torch.arange(151936.0) * 1e-4):
        check_stats(row_at(1, values.bfloat16()), 1.0, 512)
        check_stats(row_at(3, values), 1.0, 512)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_statistics_of_extreme_rows(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = (torch.rand(3001, generator=generator) * 2 - 1) * 1e4
    late = torch.full((3001,), -torch.inf)
    late[2950:] = wide[:51]  # most threads see nothing finite
    peaked = torch.full((3001,), -1e4)
    peaked[17] = 1e4
    rising = torch.linspace(-3e38, 3e38, 3001, dtype=torch.float64).float()  # differences overflow
    for row in (wide, late, peaked, torch.full((3001,), 1e4), rising, -rising):
        check_stats(row_at(2, row), temperature, 64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 500, 1002])
def test_unusable_rows_become_nan_in_the_merge(bad: float, at: int) -> None:
    row = torch.randn(1003, generator=torch.Generator().manual_seed(2))
    row[slice(None) if bad == -torch.inf else at] = bad
    largest, total, moment = stats_of(row_at(1, row), 1.0, 32)
    merged = merge_stats(torch.tensor([[[largest, total, moment, 0.0]]]), 1.0)
    assert merged.log_probs.isnan().all() and merged.entropy.isnan().all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("columns", [1, 7, 8, 129, 1031])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_any_length_and_alignment(dtype: torch.dtype, columns: int, inplace: bool) -> None:
    generator, padding, temperature = torch.Generator().manual_seed(columns), 5, 0.8
    for offset in range(8):
        values = (torch.randn(columns + padding, generator=generator) * 3).to(dtype)
        target = int(torch.randint(0, columns, (), generator=generator))
        shard = VocabShard(0, columns)
        targets = torch.tensor([target])
        stats = logprobs_eager.row_stats(values[None].double(), targets, shard, temperature, True)
        result = merge_stats(stats[None], temperature)
        numbers = [result.maximum, result.total, result.entropy, *torch.randn(2, 1, generator=generator).double()]
        row_grads = torch.stack(numbers, 1)
        expected = torch.empty(1, columns + padding, dtype=torch.float64)
        logprobs_eager.logits_grad(values[None].double(), targets, shard, temperature, row_grads, expected)
        row = row_at(offset, values)
        out = row if inplace else row_at(offset if columns % 2 else 0, torch.full_like(values, 7))
        grads = row_grads.float()
        _C.emulate_row_gradient(
            row.data_ptr(), out.data_ptr(), CODES[dtype], columns, columns + padding, target, temperature,
            grads.data_ptr(), 32,
        )  # fmt: skip
        assert out[columns:].eq(0).all()
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 3e-6
        torch.testing.assert_close(out.double(), expected[0], rtol=rounding, atol=1e-7)


def test_gradients_of_logits_that_underflow_are_exactly_zero() -> None:
    row = torch.tensor([0.0, -1e4, -torch.inf, -3e38, 2.0])
    grads = torch.tensor([2.0, 1.0 + math.exp(-2.0), 0.3, 1.5, -0.5])
    out = torch.full_like(row, 7.0)
    _C.emulate_row_gradient(row.data_ptr(), out.data_ptr(), 0, 5, 5, 4, 1.0, grads.data_ptr(), 32)
    assert out[1:4].eq(0).all() and out[0] != 0 and out[4] != 0
