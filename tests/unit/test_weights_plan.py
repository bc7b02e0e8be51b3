"""Properties of the buckets that a sync cuts the model into."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_megatron.weights.plan import plan_sync

SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=40
).map(lambda shapes: {f"tensor.{i}": shape for i, shape in enumerate(shapes)})
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(shapes=SHAPES, dtype=DTYPES, limit=st.integers(1, 5000), owners=st.integers(1, 5))
def test_every_tensor_travels_once_in_order_and_within_the_limit(
    shapes: Any, dtype: torch.dtype, limit: int, owners: int
) -> None:
    plan = plan_sync(shapes, dtype, limit_bytes=limit, num_owners=owners)
    assert [entry.name for bucket in plan.buckets for entry in bucket.entries] == list(shapes)
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    for bucket in plan.buckets:
        end = 0
        for entry in bucket.entries:
            assert entry.shape == shapes[entry.name] and entry.start == end
            assert entry.num_bytes == prod(entry.shape) * dtype.itemsize
            end += entry.num_bytes
        assert bucket.num_bytes == end and 0 <= bucket.owner < owners
        assert end <= limit or len(bucket.entries) == 1
    large = {name for name, shape in shapes.items() if prod(shape) * dtype.itemsize > limit}
    assert set(plan.oversized) == large
    owned = [bucket.index for rank in range(owners) for bucket in plan.owned_by(rank)]
    assert sorted([*owned, plan.closing.index]) == list(range(len(plan.buckets))) and plan.closing.owner == 0
    assert plan.num_bytes == sum(prod(shape) for shape in shapes.values()) * dtype.itemsize


@given(shapes=SHAPES, dtype=DTYPES, limit=st.integers(1, 5000), owners=st.integers(1, 5))
def test_owners_differ_by_less_than_one_bucket(shapes, dtype, limit, owners) -> None:  # type: ignore[no-untyped-def]
    plan = plan_sync(shapes, dtype, limit_bytes=limit, num_owners=owners)
    assert plan == plan_sync(dict(shapes), dtype, limit_bytes=limit, num_owners=owners)
    loads = [sum(b.num_bytes for b in plan.buckets if b.owner == rank) for rank in range(owners)]
    assert max(loads) - min(loads) <= max(bucket.num_bytes for bucket in plan.buckets)


def test_a_view_is_the_tensor_and_shares_memory() -> None:
    plan = plan_sync({"a": (2, 3), "b": (4,)}, torch.float32, limit_bytes=1000, num_owners=1)
    flat = torch.zeros(plan.closing.num_bytes, dtype=torch.uint8)
    plan.closing.entries[1].view(flat, torch.float32).fill_(2.0)
    assert flat.view(torch.float32).tolist() == [0.0] * 6 + [2.0] * 4


def test_what_cannot_be_planned_is_refused() -> None:
    for shapes, limit, owners in (({}, 1, 1), ({"a": (1,)}, 0, 1), ({"a": (1,)}, 1, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            plan_sync(shapes, torch.float32, limit_bytes=limit, num_owners=owners)
