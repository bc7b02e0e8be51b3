"""The compiled merge of row statistics: the eager formula to one unit in the last place, and plain sums in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spear_megatron.kernels import logprobs_compiled, logprobs_eager
from spear_megatron.kernels.softmax_stats import LOWEST, VocabShard, row_gradients


def shards_of(rows: int, columns: int, cuts: list[int], temperature: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, columns], targets, and the statistics of the shards between the cuts."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, columns, generator=generator)
    targets = torch.randint(0, columns, (rows,), generator=generator)
    bounds = [0, *cuts, columns]
    parts = [
        logprobs_eager.row_stats(logits[:, a:b].contiguous(), targets, VocabShard(a, b - a), temperature, True)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return logits, targets, torch.stack(parts)


def assert_within_one_unit(found: Tensor, expected: Tensor) -> None:
    """Equal, or neighbouring floats; NaN where the other is."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
    near = torch.nextafter(expected, torch.full_like(expected, math.inf))
    below = torch.nextafter(expected, torch.full_like(expected, -math.inf))
    assert ((found == expected) | (found == near) | (found == below)).all()


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("cuts", [[], [40], [1, 50, 51]])
def test_equals_the_eager_formula_and_plain_sums(cuts: list[int], temperature: float, with_entropy: bool) -> None:
    logits, targets, parts = shards_of(300, 90, cuts, temperature, seed=len(cuts))
    log_probs, entropy, saved = logprobs_compiled.merge_rows(parts, temperature, with_entropy)
    eager = logprobs_eager.merge_rows(parts, temperature, with_entropy)
    assert_within_one_unit(log_probs, eager[0])
    assert_within_one_unit(saved, eager[2])
    assert (entropy is None) == (eager[1] is None) == (not with_entropy)
    for row in range(0, 300, 37):
        scaled = [x / temperature for x in logits[row].tolist()]
        largest = max(scaled)
        log_total = largest + math.log(math.fsum(math.exp(x - largest) for x in scaled))
        assert log_probs[row].item() == pytest.approx(scaled[targets[row]] - log_total, rel=1e-5, abs=1e-5)
        if entropy is not None:
            exact = -math.fsum(math.exp(x - log_total) * (x - log_total) for x in scaled)
            assert entropy[row].item() == saved[row, 2].item() == pytest.approx(exact, rel=1e-4, abs=1e-5)
        else:
            assert saved[row, 2] == 0


def test_what_is_not_finite_is_nan_in_its_row_alone() -> None:
    _, _, parts = shards_of(7, 20, [9], 1.0, seed=5)
    parts[1, 0, 0] = math.nan  # a NaN logit in the second shard
    parts[0, 1, 0] = math.nan
    parts[0, 2, 0] = math.inf
    parts[:, 3, 0], parts[:, 3, 1:3] = LOWEST, 0.0  # no finite logit anywhere
    parts[0, 4] = torch.tensor([LOWEST, 0.0, 0.0, -math.inf])  # a shard of padding
    parts[:, 5, 3] = -math.inf  # a target that nobody holds
    found, expected = (module.merge_rows(parts, 1.0, True) for module in (logprobs_compiled, logprobs_eager))
    assert found[0][:4].isnan().all() and found[1][:4].isnan().all()
    assert found[0][5] == -math.inf and found[0][[4, 6]].isfinite().all()
    for left, right in zip(found, expected, strict=True):
        assert_within_one_unit(left, right)


def test_threads_and_layouts_do_not_matter() -> None:
    _, _, parts = shards_of(2000, 12, [5], 0.7, seed=2)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(logprobs_compiled.merge_rows(parts, 0.7, True))
    finally:
        torch.set_num_threads(threads)
    results.append(logprobs_compiled.merge_rows(parts.transpose(0, 1).contiguous().transpose(0, 1), 0.7, True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert logprobs_compiled.merge_rows(parts[:, :0], 0.7, True)[0].shape == (0,)


@pytest.mark.parametrize("first", ["dense", "expanded", "strided", "none"])
@pytest.mark.parametrize("second", ["dense", "none"])
def test_gradients_of_any_stride_are_joined(first: str, second: str) -> None:
    saved = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    kinds = {
        "dense": torch.arange(50.0), "expanded": torch.tensor(0.5).expand(50),
        "strided": torch.arange(100.0)[::2], "none": None,
    }  # fmt: skip
    found = logprobs_compiled.row_gradients(saved, kinds[first], kinds[second])
    assert torch.equal(found, row_gradients(saved, kinds[first], kinds[second]))
