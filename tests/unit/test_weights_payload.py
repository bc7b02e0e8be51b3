"""Payloads of tensors: what a server reads is what was sent, and it is asked to import nothing unusual."""

from __future__ import annotations

import pytest
import torch

from spear_megatron.testing.payloads import METADATA, read_payload
from spear_megatron.weights.memory import host_bytes, shared_bytes
from spear_megatron.weights.payload import flat_payload, named_payload
from spear_megatron.weights.plan import plan_sync

SHAPES = {"a.weight": (3, 5), "b.bias": (7,), "c.weight": (2, 2)}
# Of SGLang's allow-list, what a pickled CPU tensor needs.
ALLOWED = {
    METADATA,
    ("collections", "OrderedDict"),
    ("copyreg", "__newobj__"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch", "uint8"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "_load_from_bytes"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transport", ["http", "shared_memory"])
def test_a_bucket_arrives_bit_for_bit(transport: str, dtype: torch.dtype) -> None:
    (bucket,) = plan_sync(SHAPES, dtype, limit_bytes=10**6, num_owners=1).buckets
    # longer than the bucket, as buffers of a pool are
    flat = (shared_bytes if transport == "shared_memory" else host_bytes)(4096)[: bucket.num_bytes]
    values = {}
    for number, entry in enumerate(bucket.entries):
        values[entry.name] = torch.randn(entry.shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        entry.view(flat, dtype).copy_(values[entry.name])
    text = flat_payload(bucket, flat, dtype, transport)  # type: ignore[arg-type]
    assert (len(text) < 2000) == (transport == "shared_memory") or bucket.num_bytes < 500
    received, asked = read_payload(text)
    assert received.keys() == SHAPES.keys() and asked <= ALLOWED, asked - ALLOWED
    for name, value in values.items():
        assert received[name].dtype == dtype and torch.equal(received[name], value)


def test_a_shared_bucket_is_opened_by_each_reader_and_used_again() -> None:
    (bucket,) = plan_sync({"a": (1000,)}, torch.float32, limit_bytes=10**6, num_owners=1).buckets
    flat = shared_bytes(bucket.num_bytes)
    for round_number in range(3):
        bucket.entries[0].view(flat, torch.float32).fill_(float(round_number))
        texts = [flat_payload(bucket, flat, torch.float32, "shared_memory") for _ in range(2)]
        for text in texts:
            assert len(text) < 2000
            assert read_payload(text)[0]["a"].eq(round_number).all()


def test_a_payload_holds_only_the_bytes_of_its_bucket() -> None:
    (bucket,) = plan_sync({"a": (10,)}, torch.float32, limit_bytes=10**6, num_owners=1).buckets
    large = host_bytes(1 << 20)
    assert len(flat_payload(bucket, large[: bucket.num_bytes], torch.float32)) < 4000


def test_separate_tensors_arrive_and_views_bring_nothing_along() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    received, asked = read_payload(named_payload([("t", matrix.T), ("m", matrix)]))
    assert torch.equal(received["t"], matrix.T) and torch.equal(received["m"], matrix) and asked <= ALLOWED
    assert len(named_payload([("row", torch.zeros(1000, 100)[3])])) < 4000


def test_memory_that_the_transport_cannot_hand_over_is_refused() -> None:
    (bucket,) = plan_sync({"a": (10,)}, torch.float32, limit_bytes=10**6, num_owners=1).buckets
    for transport in ("shared_memory", "cuda_ipc"):
        with pytest.raises(ValueError, match=transport):
            flat_payload(bucket, host_bytes(bucket.num_bytes), torch.float32, transport)  # type: ignore[arg-type]
