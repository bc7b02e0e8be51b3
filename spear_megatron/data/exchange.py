"""One payload exchange among data-parallel ranks: ragged tensors move from where they were born to where they are used.

Leaders trade flat byte buffers in one all-to-all (gloo); the owner then broadcasts what it received to the ranks that
share its model copy. Rows of the training batch and whole replayed trajectories travel the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spear_megatron.data.packing import RowKey, row_key
from spear_megatron.parallel.errors import RunTimeout
from spear_megatron.parallel.state import ParallelState
from spear_megatron.types import Row, TrajectoryId


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Something that can travel: named CPU tensors of any shape and dtype, and JSON-serialisable ``fields``."""

    tensors: Mapping[str, torch.Tensor]
    fields: Mapping[str, Any] = field(default_factory=dict)


def encode_records(records: Sequence[TensorRecord]) -> torch.Tensor:
    """Records as one uint8 [bytes] buffer, laid out as a safetensors file; empty for no record.

    The length is a multiple of 8, so that the tensors of several buffers in a row are aligned.

    Raises:
        ValueError: a tensor's dtype has no name in the format.
    """
    return _concatenated(_encoded(records))


def _encoded(records: Sequence[TensorRecord]) -> list[torch.Tensor]:
    """The buffer of :func:`encode_records` in pieces: so it is copied once, to where it leaves from."""
    if not records:
        return []
    named = [(f"{i}/{name}", tensor) for i, record in enumerate(records) for name, tensor in record.tensors.items()]
    # Wide types first, as the format asks: then every tensor lies aligned.
    named.sort(key=lambda item: (-item[1].element_size(), item[0]))
    fields = json.dumps([dict(record.fields) for record in records])
    header: dict[str, Any] = {"__metadata__": {"records": fields}}
    offset = 0
    for key, tensor in named:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"a tensor of {tensor.dtype} ({key}) cannot travel")
        end = offset + tensor.element_size() * tensor.numel()
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    prefix = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    padding = torch.zeros(-offset % 8, dtype=torch.uint8)
    return [prefix, *(tensor.reshape(-1).view(torch.uint8) for _, tensor in named), padding]


def _concatenated(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces)) if pieces else torch.empty(0, dtype=torch.uint8)


def decode_records(buffer: torch.Tensor) -> list[TensorRecord]:
    """Inverse of :func:`encode_records`; the records lie in the memory of ``buffer``, which must stay as it is."""
    if len(buffer) == 0:
        return []
    start = 8 + int.from_bytes(buffer[:8].numpy().tobytes(), "little")
    header = json.loads(buffer[8:start].numpy().tobytes())
    fields = json.loads(header.pop("__metadata__")["records"])
    content = buffer[start:]
    if content.storage_offset() % 8:
        content = content.clone()
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in fields]
    for key, entry in header.items():
        position, name = key.split("/", 1)
        first, end = entry["data_offsets"]
        tensors[int(position)][name] = content[first:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return [TensorRecord(tensors=part, fields=values) for part, values in zip(tensors, fields, strict=True)]


def exchange(
    payloads: Sequence[tuple[int, TensorRecord]], parallel: ParallelState, *, phase: str, timeout_s: float
) -> list[TensorRecord]:
    """Send every record to a data-parallel rank; collective over all ranks, called by the main thread.

    Args:
        payloads: (destination data-parallel rank, record); only leaders may have any, and a leader may have none.
        parallel: coordinates and groups of this rank.
        phase: what is being exchanged, for error messages.
        timeout_s: deadline of the whole exchange.

    Returns:
        What was sent to this data-parallel rank, equal on all ranks that share its model copy; ordered by sender, then
        as sent. A record that stays where it was, on a rank that shares its model copy with none, is itself: nobody may
        change the tensors of a record, neither before nor after.

    Raises:
        ValueError: a destination does not exist, or a rank that is not a leader has payloads.
        RunTimeout: peers did not take part in time; names phase and rank.
    """
    if payloads and not parallel.is_leader:
        raise ValueError(f"Rank {parallel.rank} is not a data-parallel leader: it must send nothing in '{phase}'.")
    outgoing: list[list[TensorRecord]] = [[] for _ in range(parallel.dp_size)]
    for destination, record in payloads:
        if not 0 <= destination < parallel.dp_size:
            raise ValueError(f"'{phase}' names data-parallel rank {destination}, but there are {parallel.dp_size}.")
        outgoing[destination].append(record)
    deadline = timedelta(seconds=timeout_s)
    staying: list[TensorRecord] = []
    if parallel.model_size == 1:
        staying, outgoing[parallel.dp_rank] = outgoing[parallel.dp_rank], staying
    received: list[torch.Tensor] = []
    if parallel.is_leader:
        buffers = [_encoded(records) for records in outgoing]
        if parallel.dp_size > 1:
            received = _all_to_all(buffers, parallel, phase, deadline)
        else:
            received = [_concatenated(buffers[0])]
    if parallel.model_size > 1:
        received = _broadcast(received, parallel, phase, deadline)
    arrived = [decode_records(buffer) for buffer in received]
    arrived[parallel.dp_rank] += staying
    return [record for part in arrived for record in part]


def _all_to_all(
    buffers: Sequence[Sequence[torch.Tensor]], parallel: ParallelState, phase: str, deadline: timedelta
) -> list[torch.Tensor]:
    """Trade one buffer, in pieces, with every leader."""
    group = parallel.leader_group
    sent = torch.tensor([sum(len(piece) for piece in buffer) for buffer in buffers], dtype=torch.int64)
    incoming = torch.empty_like(sent)
    _wait(dist.all_to_all_single(incoming, sent, group=group, async_op=True), parallel, f"{phase} (sizes)", deadline)
    sizes = [int(size) for size in incoming]
    result = torch.empty(sum(sizes), dtype=torch.uint8)
    flat = _concatenated([piece for buffer in buffers for piece in buffer])
    work = dist.all_to_all_single(result, flat, sizes, sent.tolist(), group=group, async_op=True)
    _wait(work, parallel, f"{phase} (payload)", deadline)
    return list(result.split(sizes))


def _broadcast(
    buffers: Sequence[torch.Tensor], parallel: ParallelState, phase: str, deadline: timedelta
) -> list[torch.Tensor]:
    # The model group may be NCCL, which moves device memory only.
    device = parallel.platform.device
    sizes = torch.zeros(parallel.dp_size, dtype=torch.int64, device=device)
    if parallel.is_leader:
        sizes.copy_(torch.tensor([len(buffer) for buffer in buffers], dtype=torch.int64))
    source, group = parallel.leader_rank, parallel.model_group
    _wait(dist.broadcast(sizes, source, group=group, async_op=True), parallel, f"{phase} (peer sizes)", deadline)
    lengths = [int(size) for size in sizes]
    flat = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    if parallel.is_leader:
        flat.copy_(torch.cat(list(buffers)))
    _wait(dist.broadcast(flat, source, group=group, async_op=True), parallel, f"{phase} (peer payload)", deadline)
    return list(flat.cpu().split(lengths))


def _wait(work: Any, parallel: ParallelState, phase: str, deadline: timedelta) -> None:
    try:
        work.wait(deadline)
    except RuntimeError as error:
        raise RunTimeout(
            f"Rank {parallel.rank} (data-parallel {parallel.dp_rank}) did not finish '{phase}' within "
            f"{deadline.total_seconds():.0f} s: {error}"
        ) from error


_ROW_TENSORS = (
    "ids", "response_mask", "rollout_log_probs", "advantages", "old_log_probs", "ref_log_probs", "policy_versions",
)  # fmt: skip


def row_to_record(row: Row) -> TensorRecord:
    """A row as a record; log-probs that are not there yet, and unknown versions, stay away."""
    tensors = {name: getattr(row, name) for name in _ROW_TENSORS if getattr(row, name) is not None}
    fields = {"trajectory": list(row.trajectory), "segment": row.segment, "first_turn": row.first_turn}
    return TensorRecord(tensors=tensors, fields=fields)


def record_to_row(record: TensorRecord) -> Row:
    """Inverse of :func:`row_to_record`."""
    return Row(
        trajectory=TrajectoryId(*record.fields["trajectory"]),
        segment=record.fields["segment"],
        first_turn=record.fields["first_turn"],
        **dict(record.tensors),
    )


def redistribute(
    rows: Sequence[Row], destination: Mapping[RowKey, int], parallel: ParallelState, *, timeout_s: float
) -> list[Row]:
    """Bring every row of the step to the data-parallel rank that trains on it.

    Args:
        rows: rows born on this rank (none on ranks that are not leaders).
        destination: data-parallel rank of every row of the step, by (trajectory, segment).
        parallel, timeout_s: as in :func:`exchange`.

    Returns:
        This data-parallel rank's rows sorted by id, equal on all ranks that share its model copy.
    """
    payloads = [(destination[row_key(row)], row_to_record(row)) for row in rows]
    records = exchange(payloads, parallel, phase="balance rows", timeout_s=timeout_s)
    return sorted((record_to_row(record) for record in records), key=row_key)
