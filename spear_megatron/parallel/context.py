"""How packed sequences are cut over context-parallel ranks: which tokens each of them holds.

Every sequence is cut into 2 * size chunks and rank r takes chunks r and 2 * size - 1 - r, so that causal attention
costs every rank the same (as in Megatron's and Transformer Engine's context parallelism: Megatron's rotary embeddings
expect it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """A run of queries of this rank, and the keys they may attend to.

    Attributes:
        queries: rows of the rank's own tokens.
        first_key: position in the whole packed sequence where its sequence begins.
        end_key: position behind its last query, so also behind the last key it sees.
    """

    queries: slice
    first_key: int
    end_key: int


def context_multiple(size: int) -> int:
    """What the length of a packed sequence must be a multiple of."""
    return 1 if size == 1 else 2 * size


def context_positions(offsets: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Positions of the tokens that a rank holds, int64 [T / size], in the order it holds them.

    Args:
        offsets: of the packed sequences, the last is their total length T.
        rank, size: of context parallelism.

    Raises:
        ValueError: the length of a sequence is not a multiple of :func:`context_multiple`.
    """
    chunks = context_chunks(tuple(offsets), rank, size)
    return torch.cat([torch.arange(c.end_key - (c.queries.stop - c.queries.start), c.end_key) for c in chunks])


@lru_cache(maxsize=64)
def context_chunks(offsets: tuple[int, ...], rank: int, size: int) -> tuple[ContextChunk, ...]:
    """The chunks that a rank holds, in order; arguments and errors as in :func:`context_positions`."""
    chunks, row = [], 0
    for start, end in zip(offsets, offsets[1:], strict=False):
        length, rest = divmod(end - start, context_multiple(size))
        if rest:
            raise ValueError(
                f"a packed sequence of {end - start} tokens cannot be cut over {size} context-parallel ranks: "
                f"pad it to a multiple of {context_multiple(size)}"
            )
        for number in (rank, 2 * size - 1 - rank) if size > 1 else (0,):
            chunks.append(ContextChunk(slice(row, row + length), start, start + (number + 1) * length))
            row += length
    return tuple(chunk for chunk in chunks if chunk.queries.stop > chunk.queries.start)


@lru_cache(maxsize=64)
def gathered_order(offsets: tuple[int, ...], size: int) -> torch.Tensor:
    """Rows that put the tokens of all ranks, joined in rank order, back in place: int64 [T]."""
    return torch.cat([context_positions(offsets, rank, size) for rank in range(size)]).argsort()
