"""Which tokens the next forward pass computes: continuous admission, chunked prompts, shared prefixes."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from spear_megatron.kernels.decoder import PAGE_TOKENS
from spear_megatron.rollout.embedded.pages import ROOT, PagePool
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """One request on its way: prompt and sampled tokens in ``ids``, of which ``computed`` have their cache entries."""

    request: GenerateRequest
    future: asyncio.Future[GenerateResult]
    ids: list[int]
    stop_token_ids: frozenset[int]
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    parent: int = ROOT  # id of the content up to the last page that was registered or found
    num_registered: int = 0
    promised: int = 0

    @classmethod
    def of(cls, request: GenerateRequest, future: asyncio.Future[GenerateResult]) -> ActiveSequence:
        """A sequence that has computed nothing yet."""
        return cls(request, future, list(request.input_ids), frozenset(request.sampling.stop_token_ids))

    @property
    def num_prompt(self) -> int:
        return len(self.request.input_ids)

    @property
    def most_pages(self) -> int:
        """Pages it can ever need: the last token of all is sampled, never computed."""
        return pages_for(self.num_prompt + self.request.sampling.max_new_tokens - 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of a sequence from position ``start`` on."""

    sequence: ActiveSequence
    start: int
    count: int


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class Scheduler:
    """First come, first served: a request waits only for a slot, for pages, or for the token budget of a step.

    ``max_step_tokens`` must exceed ``max_num_seqs``, so that every step leaves room for a prompt that is being read.
    """

    def __init__(self, pool: PagePool, *, max_num_seqs: int, max_model_len: int, max_step_tokens: int) -> None:
        assert max_step_tokens > max_num_seqs
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.block_table = np.zeros((max_num_seqs, pages_for(max_model_len)), dtype=np.int32)
        self.waiting: deque[ActiveSequence] = deque()
        self.running: dict[int, ActiveSequence] = {}
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    def next_chunks(self) -> list[Chunk]:
        """Plan one step and allocate its pages: every decoding sequence, then prompts in order of arrival."""
        chunks: list[Chunk] = []
        reading: list[ActiveSequence] = []
        for sequence in list(self.running.values()):
            if len(sequence.ids) - sequence.computed == 1:
                chunks.append(self._advance(sequence, 1))
            else:
                reading.append(sequence)
        budget = self._max_step_tokens - len(chunks)
        while budget > 0:
            prompt = reading.pop(0) if reading else self._admit()
            if prompt is None:
                break
            self._find_prefix(prompt)
            chunks.append(self._advance(prompt, min(budget, len(prompt.ids) - prompt.computed)))
            budget -= chunks[-1].count
        return chunks

    def remove(self, sequence: ActiveSequence) -> None:
        """Forget a finished, failed or cancelled sequence; its full pages stay findable."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self._evict(sequence)

    def restart_all(self) -> None:
        """The weights changed: nothing cached is valid, and running sequences recompute what they have so far."""
        for sequence in reversed(self.running.values()):
            self.waiting.appendleft(sequence)
        for sequence in list(self.running.values()):
            self._evict(sequence)
        self._pool.forget_all()

    def _evict(self, sequence: ActiveSequence) -> None:
        del self.running[sequence.slot]
        self._free_slots.append(sequence.slot)
        self._pool.release(sequence.pages)
        self._pool.withdraw(sequence.promised)
        sequence.slot, sequence.computed, sequence.promised = -1, 0, 0
        sequence.pages, sequence.parent, sequence.num_registered = [], ROOT, 0

    def _admit(self) -> ActiveSequence | None:
        if not self.waiting or not self._free_slots or not self._pool.promise(self.waiting[0].most_pages):
            return None
        sequence = self.waiting.popleft()
        sequence.promised = sequence.most_pages
        sequence.slot = self._free_slots.pop()
        self.running[sequence.slot] = sequence
        return sequence

    def _find_prefix(self, sequence: ActiveSequence) -> None:
        """Adopt pages that hold the next tokens; the last token is always computed, because its logits are wanted."""
        while sequence.computed % PAGE_TOKENS == 0 and sequence.num_registered == len(sequence.pages):
            end = sequence.computed + PAGE_TOKENS
            if end > len(sequence.ids) - 1:
                return
            found = self._pool.find(sequence.parent, tuple(sequence.ids[sequence.computed : end]))
            if found is None:
                return
            page, sequence.parent = found
            sequence.promised -= 1
            self._append_page(sequence, page)
            sequence.computed = end
            sequence.num_registered += 1
            self.num_cached_tokens += PAGE_TOKENS

    def _advance(self, sequence: ActiveSequence, count: int) -> Chunk:
        """Allocate pages for ``count`` more tokens and register the pages that they fill.

        Registration precedes the computation: a later sequence of the same step may share such a page, because a
        forward pass writes all its keys and values of a layer before any row reads them.
        """
        start = sequence.computed
        sequence.computed = start + count
        while len(sequence.pages) * PAGE_TOKENS < sequence.computed:
            sequence.promised -= 1
            self._append_page(sequence, self._pool.take())
        while (sequence.num_registered + 1) * PAGE_TOKENS <= sequence.computed:
            first = sequence.num_registered * PAGE_TOKENS
            tokens = tuple(sequence.ids[first : first + PAGE_TOKENS])
            sequence.parent = self._pool.register(sequence.parent, tokens, sequence.pages[sequence.num_registered])
            sequence.num_registered += 1
        return Chunk(sequence, start, count)

    def _append_page(self, sequence: ActiveSequence, page: int) -> None:
        self.block_table[sequence.slot, len(sequence.pages)] = page
        sequence.pages.append(page)
