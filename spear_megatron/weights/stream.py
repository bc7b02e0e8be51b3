"""Gathers the next bucket while the one before is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from spear_megatron.weights.gather import BucketGatherer
from spear_megatron.weights.memory import BufferPool
from spear_megatron.weights.plan import Bucket

Send = Callable[[Bucket, torch.Tensor], None]


def stream_buckets(gatherer: BucketGatherer, buckets: Iterable[Bucket], pool: BufferPool, send: Send) -> None:
    """Gather buckets in order and hand each to ``send`` in a thread of its own. Collective over a model copy.

    Only the calling thread takes part in collectives. At most one bucket is being sent while the next is gathered; a
    bucket beyond the limit waits until nothing is sent, so that two of them never exist at a time.

    Raises:
        Exception: the first error of ``send``, after all buckets were gathered: no peer of the gather is left waiting.
    """
    problem: BaseException | None = None
    pending: tuple[Future[None], torch.Tensor] | None = None

    def finish() -> None:
        nonlocal pending, problem
        if pending is None:
            return
        error = pending[0].exception()
        problem = problem or error
        pool.give_back(pending[1])
        pending = None

    with ThreadPoolExecutor(1, thread_name_prefix="send-weights") as threads:
        previous = 0
        for bucket in buckets:
            if max(bucket.num_bytes, previous) > gatherer.plan.limit_bytes:
                finish()
            previous = bucket.num_bytes
            flat = gatherer.gather(bucket)
            if flat is None:
                continue
            finish()
            if problem is not None:
                pool.give_back(flat)
                continue
            pending = threads.submit(send, bucket, flat), flat
        finish()
    if problem is not None:
        raise problem
