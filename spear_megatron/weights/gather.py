"""One bucket of Hugging Face tensors from the shards of a model copy, as flat bytes on its leader.

Per bucket there is one gather over the tensor ranks of each pipeline stage (the stages work at the same time), and one
message per run of consecutive tensors from a stage to the first one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from spear_megatron.model.hf_io import owning_stages
from spear_megatron.model.shape import ModelShape
from spear_megatron.model.weight_map import Piece, Run, local_pieces
from spear_megatron.parallel.state import ParallelState
from spear_megatron.weights.memory import BufferPool, Ledger
from spear_megatron.weights.plan import Bucket, Entry, SyncPlan

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class _Window(NamedTuple):
    """Rows ``low`` to ``high`` of what every tensor rank has of a tensor, at byte ``start`` of its message.

    Of a tensor cut by columns they are rows of the whole tensor; cut by rows, rows of a rank's packed runs.
    """

    entry: Entry
    piece: Piece
    low: int
    high: int
    start: int


class BucketGatherer:
    """Gathers buckets of one plan. Collective over the ranks of a model copy, which ask for the same ones in order.

    Args:
        plan: made for this model's shapes and dtype.
        pool: buffers of finished buckets on the leader, and of a stage's part of one elsewhere.
        ledger: counts what is alive on this rank: finished buckets, and messages while they are taken apart.
    """

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        shape: ModelShape,
        parallel: ParallelState,
        plan: SyncPlan,
        pool: BufferPool,
        ledger: Ledger,
    ) -> None:
        self.plan = plan
        self._parallel = parallel
        self._pool = pool
        self._ledger = ledger
        self._pieces = local_pieces(model_chunks, shape, parallel.tp_size)
        self._stages = owning_stages(self._pieces, parallel)

    def gather(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes (uint8, from the pool: give them back) on the leader, None on the other ranks."""
        parallel = self._parallel
        if parallel.cp_rank:  # the ranks of every other part of the sequences hold the same weights and gather them
            return None
        runs = [list(run) for _, run in itertools.groupby(bucket.entries, key=lambda entry: self._stages[entry.name])]
        own = [entry for entry in bucket.entries if self._stages[entry.name] == parallel.pp_rank]
        if parallel.tp_rank:
            self._gather_stage(own, None)
            return None
        if parallel.is_leader:
            flat = self._pool.take(bucket.num_bytes)
            self._gather_stage(own, flat)
            for run in runs:
                stage = self._stages[run[0].name]
                if stage:
                    dist.recv(_span(flat, run), group=parallel.pp_group, group_src=stage)
            return flat
        if own:
            self._send_stage(own, runs)
        return None

    def _send_stage(self, own: Sequence[Entry], runs: Sequence[Sequence[Entry]]) -> None:
        """Gather this later stage's tensors back to back, and send every run of consecutive ones."""
        starts = list(itertools.accumulate((entry.num_bytes for entry in own), initial=0))
        placed = {entry.name: replace(entry, start=start) for entry, start in zip(own, starts, strict=False)}
        part = self._pool.take(starts[-1])
        self._gather_stage(list(placed.values()), part)
        for run in runs:
            if run[0].name in placed:
                span = _span(part, [placed[entry.name] for entry in run])
                dist.send(span, group=self._parallel.pp_group, group_dst=0)
        self._pool.give_back(part)

    def _gather_stage(self, entries: Sequence[Entry], target: torch.Tensor | None) -> None:
        """Collective over the tensor ranks of a stage: fill ``target`` (tp_rank 0) at the entries' places."""
        cut = []
        for entry in entries:
            piece = self._pieces[entry.name][0]
            if self._parallel.tp_size > 1 and not piece.replicated:
                cut.append((entry, piece))
            elif target is not None:
                whole = entry.view(target, self.plan.dtype)
                _scatter(piece.parameter.data, piece, 0, whole, 0, whole.shape[0], packed=False)
        for windows in self._rounds(cut):
            self._exchange(windows, target)

    def _exchange(self, windows: Sequence[_Window], target: torch.Tensor | None) -> None:
        """One gather of the tensor ranks' messages for these windows."""
        parallel, dtype, tp_size = self._parallel, self.plan.dtype, self._parallel.tp_size
        last = windows[-1]
        num_bytes = last.start + self._message_bytes(last)
        held = num_bytes * (tp_size if target is not None else 1)
        self._ledger.hold(held)
        shape = (tp_size if target is not None else 1, num_bytes)
        received = torch.empty(shape, dtype=torch.uint8, device=parallel.platform.device)
        for window in windows:
            _pack(window, received[0], parallel.tp_rank, dtype)
        parts = list(received) if target is not None else None  # rank 0's own message is already in its place
        dist.gather(received[0], parts, group=parallel.tp_group, group_dst=0)
        if target is not None:
            for window in windows:
                whole = window.entry.view(target, dtype)
                for rank, message in enumerate(received):
                    _scatter(_rows(window, message, dtype), window.piece, rank, whole, window.low, window.high)
        self._ledger.release(held)

    def _rounds(self, cut: Sequence[tuple[Entry, Piece]]) -> Iterator[list[_Window]]:
        """Windows of every message: a bucket's worth of bytes over all ranks at a time, but for single rows."""
        limit = max(self.plan.limit_bytes // self._parallel.tp_size, 1)
        windows: list[_Window] = []
        used = 0
        for entry, piece in cut:
            num_rows, row_bytes = self._rows_of(entry, piece)
            low = 0
            while low < num_rows:
                high = min(num_rows, low + (limit - used) // row_bytes)
                if high == low and windows:
                    yield windows
                    windows, used = [], 0
                    continue
                high = max(high, low + 1)
                windows.append(_Window(entry, piece, low, high, used))
                used += (high - low) * row_bytes
                low = high
        if windows:
            yield windows

    def _rows_of(self, entry: Entry, piece: Piece) -> tuple[int, int]:
        """(rows, bytes of a row) of a rank's part of a tensor; of the largest part where they differ."""
        if piece.dim == 1:
            return entry.shape[0], piece.runs[0][0].length * self.plan.dtype.itemsize
        rows = max(sum(run.length for run in runs) for runs in piece.runs)
        return rows, entry.num_bytes // entry.shape[0]

    def _message_bytes(self, window: _Window) -> int:
        return (window.high - window.low) * self._rows_of(window.entry, window.piece)[1]


def _span(flat: torch.Tensor, run: Sequence[Entry]) -> torch.Tensor:
    return flat[run[0].start : run[-1].start + run[-1].num_bytes]


def _rows(window: _Window, message: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The window's part of a message as rows."""
    piece, count = window.piece, window.high - window.low
    tail = (piece.runs[0][0].length,) if piece.dim == 1 else window.entry.shape[1:]
    num_values = count
    for size in tail:
        num_values *= size
    return message[window.start : window.start + num_values * dtype.itemsize].view(dtype).view(count, *tail)


def _pack(window: _Window, message: torch.Tensor, rank: int, dtype: torch.dtype) -> None:
    """Copy this rank's part of a window from its parameter into its message."""
    rows, local = _rows(window, message, dtype), window.piece.parameter.data
    if window.piece.dim == 1:
        run = window.piece.runs[rank][0]
        rows.copy_(local[window.low : window.high].narrow(1, run.local_start, run.length))
        return
    for run, offset in _inside(window.piece.runs[rank], window.low, window.high):
        rows[offset : offset + run.length].copy_(local[run.local_start : run.local_start + run.length])


def _scatter(
    rows: torch.Tensor, piece: Piece, rank: int, whole: torch.Tensor, low: int, high: int, *, packed: bool = True
) -> None:
    """Copy one rank's rows of a window to their places in the whole tensor; not ``packed``: rows of its parameter."""
    if piece.dim == 1:
        run = piece.runs[rank][0]
        source = rows if packed else rows.narrow(1, run.local_start, run.length)
        whole[low:high].narrow(1, run.hf_start, run.length).copy_(source)
        return
    for run, offset in _inside(piece.runs[rank], low, high):
        start = offset if packed else run.local_start
        whole[run.hf_start : run.hf_start + run.length].copy_(rows[start : start + run.length])


def _inside(runs: Sequence[Run], low: int, high: int) -> Iterator[tuple[Run, int]]:
    """The parts of runs that lie in rows ``low`` to ``high`` of their packed order, and their places in the window."""
    start = 0
    for run in runs:
        first, last = max(start, low), min(start + run.length, high)
        if first < last:
            skipped = first - start
            yield Run(run.hf_start + skipped, run.local_start + skipped, last - first), first - low
        start += run.length
