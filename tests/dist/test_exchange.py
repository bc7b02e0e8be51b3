"""The payload exchange: ragged records arrive whole, in order, on every rank of the owner's model copy."""

from __future__ import annotations

import time

import pytest
import torch
from harness import run_ranks

from spear_megatron.data.exchange import TensorRecord, decode_records, encode_records, exchange, redistribute
from spear_megatron.data.packing import row_key
from spear_megatron.types import Row, TrajectoryId


def make_record(source: int, number: int) -> TensorRecord:
    generator = torch.Generator().manual_seed(1000 * source + number)
    return TensorRecord(
        tensors={
            "ids": torch.randint(0, 99, (number,), generator=generator, dtype=torch.int32),
            "log_probs": torch.randn(number, 2, generator=generator),
            "mask": torch.rand(number, generator=generator) < 0.5,
            "image": torch.randint(0, 255, (2, number), generator=generator, dtype=torch.uint8),
            "half": torch.randn(3, generator=generator).bfloat16(),
        },
        fields={"source": source, "number": number, "text": "caf\u00e9/\n"},
    )


def assert_same(left: TensorRecord, right: TensorRecord) -> None:
    assert dict(left.fields) == dict(right.fields) and set(left.tensors) == set(right.tensors)
    for name, tensor in left.tensors.items():
        other = right.tensors[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other)


def test_records_survive_encoding() -> None:
    records = [make_record(0, 5), make_record(1, 0), TensorRecord({}, {"only": "fields"})]
    for left, right in zip(records, decode_records(encode_records(records)), strict=True):
        assert_same(left, right)
    assert decode_records(encode_records([])) == []


def test_buffers_in_a_row_are_decoded_where_they_lie() -> None:
    records = [make_record(0, number) for number in range(1, 12)]
    buffers = [encode_records([record]) for record in records]
    flat = torch.cat(buffers)
    for record, buffer in zip(records, flat.split([len(buffer) for buffer in buffers]), strict=True):
        decoded = decode_records(buffer)[0]
        assert_same(record, decoded)
        assert all(tensor.untyped_storage().data_ptr() == flat.data_ptr() for tensor in decoded.tensors.values())
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), buffers[4]])
    assert_same(records[4], decode_records(shifted[3:])[0])


def test_shapes_and_strides_survive_and_strange_types_are_refused() -> None:
    turned = torch.ones(2, 3).cumsum(1).T
    record = TensorRecord({"scalar": torch.tensor(3.5), "none": torch.empty(2, 0), "turned": turned})
    assert_same(record, decode_records(encode_records([record]))[0])
    with pytest.raises(ValueError, match=r"complex64 \(0/x\)"):
        encode_records([TensorRecord({"x": torch.zeros(1, dtype=torch.complex64)})])


def outgoing(source: int, size: int, pattern: str) -> list[tuple[int, int]]:
    """(destination, number) of every record that a rank sends; in `hollow`, rank 0 neither gives nor gets any."""
    if pattern == "nothing":
        return []
    pairs = [((source + number) % size, number) for number in range(2 * source + 3)]
    if pattern == "hollow":
        return [(destination, number) for destination, number in pairs if 0 not in (source, destination)]
    return pairs


def exchange_on_rank(tp: int, pp: int, pattern: str) -> tuple[int, list[TensorRecord]]:
    from spear_megatron.parallel.state import initialize

    parallel = initialize(tp, pp, timeout_s=60)
    plan = outgoing(parallel.dp_rank, parallel.dp_size, pattern)
    payloads = [(destination, make_record(parallel.dp_rank, number)) for destination, number in plan]
    if not parallel.is_leader:
        payloads = []
    return parallel.dp_rank, exchange(payloads, parallel, phase="test", timeout_s=30)


@pytest.mark.parametrize("pattern", ["full", "hollow", "nothing"])
@pytest.mark.parametrize("world_size,tp,pp", [(1, 1, 1), (3, 1, 1), (4, 2, 1), (4, 1, 2)])
def test_every_record_arrives_once(world_size: int, tp: int, pp: int, pattern: str) -> None:
    dp_size = world_size // (tp * pp)
    for dp_rank, records in run_ranks(exchange_on_rank, world_size, tp, pp, pattern):
        expected = [
            make_record(source, number)
            for source in range(dp_size)
            for destination, number in outgoing(source, dp_size, pattern)
            if destination == dp_rank
        ]
        for left, right in zip(expected, records, strict=True):
            assert_same(left, right)


def late_exchange() -> tuple[str, float]:
    from spear_megatron.parallel.state import initialize

    parallel = initialize(timeout_s=60)
    start = time.monotonic()
    if parallel.rank == 1:
        time.sleep(8)
        return "", 0.0
    try:
        exchange([], parallel, phase="replay payloads", timeout_s=1)
    except TimeoutError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_a_missing_peer_is_reported_in_time_by_phase_and_rank() -> None:
    message, seconds = run_ranks(late_exchange, 2)[0]
    assert "Rank 0 (data-parallel 0) did not finish 'replay payloads (sizes)' within 1 s" in message
    assert 0.9 < seconds < 7.5


def refused(kind: str) -> str:
    from spear_megatron.parallel.state import initialize

    parallel = initialize(2, timeout_s=60)
    destination = 5 if kind == "destination" else 0
    payloads = [(destination, make_record(0, 1))] if parallel.is_leader == (kind == "destination") else []
    if not payloads:
        return ""
    try:
        exchange(payloads, parallel, phase="test", timeout_s=5)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "kind,text", [("destination", "names data-parallel rank 5"), ("leader", "not a data-parallel leader")]
)
def test_misuse_is_refused(kind: str, text: str) -> None:
    assert any(text in answer for answer in run_ranks(refused, 2, kind))


def make_row(task: int, segment: int) -> Row:
    n = 3 + task % 4
    mask = torch.arange(n) > 1
    values = torch.arange(n, dtype=torch.float32) + 100 * task
    old = values + 1 if task % 2 else None
    ids = torch.arange(n, dtype=torch.int32)
    return Row(TrajectoryId(2, task, 0), segment, ids, mask, values, values * 2, old, None)


def redistribute_on_rank(tp: int) -> tuple[int, list[Row]]:
    from spear_megatron.parallel.state import initialize

    parallel = initialize(tp, timeout_s=60)
    born = [make_row(task, s) for task in range(8) if task % parallel.dp_size == parallel.dp_rank for s in range(2)]
    destination = {(TrajectoryId(2, task, 0), s): (task // 3) % parallel.dp_size for task in range(8) for s in range(2)}
    rows = redistribute(born if parallel.is_leader else [], destination, parallel, timeout_s=30)
    return parallel.dp_rank, rows


def test_rows_reach_the_rank_that_trains_on_them() -> None:
    for dp_rank, rows in run_ranks(redistribute_on_rank, 4, 2):
        expected = [make_row(task, s) for task in range(8) if (task // 3) % 2 == dp_rank for s in range(2)]
        assert [row_key(row) for row in rows] == [row_key(row) for row in expected]
        for row, other in zip(rows, expected, strict=True):
            for name in ("ids", "response_mask", "rollout_log_probs", "advantages"):
                assert torch.equal(getattr(row, name), getattr(other, name))
            assert (row.old_log_probs is None) == (other.old_log_probs is None)
            assert row.old_log_probs is None or torch.equal(row.old_log_probs, other.old_log_probs)
