"""The page pool and the scheduler: nothing leaks, promises hold, shared prefixes are the right ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from spear_megatron.rollout.embedded.pages import ROOT, PagePool
from spear_megatron.rollout.embedded.scheduler import ActiveSequence, Scheduler
from spear_megatron.rollout.engine import GenerateRequest, SamplingParams


def test_promises_are_bounded_and_taking_never_fails() -> None:
    pool = PagePool(4, prefix_cache=True)
    assert pool.promise(3) and not pool.promise(2) and pool.promise(1)
    pages = [pool.take() for _ in range(4)]
    assert sorted(pages) == [0, 1, 2, 3] and pool.num_available == 0
    pool.release(pages)
    assert pool.num_available == 4


def test_a_prefix_is_found_under_its_parent_only() -> None:
    pool = PagePool(8, prefix_cache=True)
    pool.promise(8)
    a, b = pool.take(), pool.take()
    first = pool.register(ROOT, (1, 2), a)
    second = pool.register(first, (3, 4), b)
    pool.release([a, b])
    assert pool.find(ROOT, (3, 4)) is None and pool.find(second, (3, 4)) is None
    assert pool.find(ROOT, (1, 2)) == (a, first) and pool.find(first, (3, 4)) == (b, second)


def test_ends_are_forgotten_before_their_prefixes() -> None:
    pool = PagePool(3, prefix_cache=True)
    pool.promise(3)
    pages = [pool.take() for _ in range(3)]
    parent = ROOT
    for index, page in enumerate(pages):
        parent = pool.register(parent, (index,), page)
    pool.release(pages)
    pool.promise(1)
    assert pool.take() == pages[2]


def test_equal_content_is_registered_once() -> None:
    pool = PagePool(2, prefix_cache=True)
    pool.promise(2)
    a, b = pool.take(), pool.take()
    assert pool.register(ROOT, (1,), a) == pool.register(ROOT, (1,), b)
    pool.release([b])
    pool.promise(1)
    assert pool.find(ROOT, (1,))[0] == a  # type: ignore[index]


def simulate(
    scheduler: Scheduler, sequences: list[ActiveSequence], rng: random.Random, written: dict[Any, Any]
) -> None:
    """Play the engine: every chunk writes its tokens into its pages; a reader finds its own ids in all its pages."""
    pending = list(sequences)
    steps = 0
    while pending or scheduler.has_work:
        steps += 1
        assert steps < 5000
        while pending and rng.random() < 0.4:
            scheduler.waiting.append(pending.pop())
        if rng.random() < 0.02:
            scheduler.restart_all()
            written.clear()
        chunks = scheduler.next_chunks()
        for chunk in chunks:
            table = scheduler.block_table[chunk.sequence.slot]
            for position in range(chunk.start, chunk.start + chunk.count):
                written[int(table[position // 16]), position % 16] = chunk.sequence.ids[: position + 1]
        for chunk in chunks:
            table = scheduler.block_table[chunk.sequence.slot]
            for position in range(chunk.start + chunk.count):
                assert written[int(table[position // 16]), position % 16] == chunk.sequence.ids[: position + 1]
            finish(scheduler, chunk.sequence, rng)


def finish(scheduler: Scheduler, sequence: ActiveSequence, rng: random.Random) -> None:
    if sequence.computed < len(sequence.ids):
        return
    sequence.ids.append(rng.randrange(3))
    sequence.log_probs.append(0.0)
    if len(sequence.log_probs) == sequence.request.sampling.max_new_tokens:
        scheduler.remove(sequence)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_reads_what_it_wrote_and_leaks_nothing(prefix_cache: bool, seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(rng.randrange(8, 30), prefix_cache=prefix_cache)
    scheduler = Scheduler(pool, max_num_seqs=6, max_model_len=128, max_step_tokens=rng.choice([7, 20, 200]))
    sequences = []
    for index in range(60):
        prompt = tuple(rng.randrange(2) if position > 40 else 1 for position in range(rng.randrange(1, 90)))
        request = GenerateRequest(str(index), prompt, SamplingParams(rng.randrange(1, 38)), index)
        sequences.append(ActiveSequence.of(request, None))  # type: ignore[arg-type]
    simulate(scheduler, sequences, rng, {})
    assert pool.num_available == pool.num_pages and not scheduler.running
    assert (scheduler.num_cached_tokens > 0) == prefix_cache
