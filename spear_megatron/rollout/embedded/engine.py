"""The embedded engine: generates inside the trainer's process, bit-exactly reproducible."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from spear_megatron.kernels.decoder import Decoder
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.embedded.pages import PagePool
from spear_megatron.rollout.embedded.scheduler import ActiveSequence, Chunk, Scheduler, pages_for
from spear_megatron.rollout.embedded.weights import load_weights
from spear_megatron.rollout.engine import EngineError, GenerateRequest, GenerateResult
from spear_megatron.rollout.validate import check_request


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_sampled_tokens: int = 0


class EmbeddedEngine:
    """Continuous batching over a paged cache on the CPU, in float32. Implements ``rollout.engine.Engine``.

    A request's tokens and log-probs depend only on the weights, its ids, its noise key and its sampling settings: bit
    for bit the same alone or among others, in any order of admission, with or without a cached prefix, on any number of
    threads. ``generate`` runs in the caller's asyncio loop; a background task computes one step for all running
    requests and then lets the loop go on, so that tools work between the steps.

    When the weights change while requests run, these recompute their cache and continue with the new weights;
    ``GenerateResult.policy_versions`` says which token came from which version.

    Args:
        shape: the model.
        max_num_seqs: most requests in one step; further ones wait in order of arrival.
        max_model_len: most tokens of prompt and completion together.
        max_step_tokens: most tokens of one step, decoded ones and prompt chunks together.
        num_cache_tokens: size of the key/value cache; default: every running request at ``max_model_len``.
        prefix_cache: keep the cache entries of earlier requests for prompts that begin alike.
        num_threads: threads of a step, default ``torch.get_num_threads()``.
        isa: instruction set of the kernels: ``auto``, ``generic``, ``avx2`` or ``avx512``.

    Raises:
        ValueError: sizes that are not positive or do not fit together.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_step_tokens: int | None = None,
        num_cache_tokens: int | None = None,
        prefix_cache: bool = True,
        num_threads: int | None = None,
        isa: str = "auto",
    ) -> None:
        if max_num_seqs < 1 or max_model_len < 2:
            raise ValueError(f"max_num_seqs={max_num_seqs} must be positive and max_model_len={max_model_len} above 1")
        step_tokens = max(512, 2 * max_num_seqs) if max_step_tokens is None else max_step_tokens
        if step_tokens <= max_num_seqs:
            raise ValueError(f"max_step_tokens={step_tokens} must exceed max_num_seqs={max_num_seqs}")
        num_pages = max_num_seqs * pages_for(max_model_len)
        if num_cache_tokens is not None:
            num_pages = pages_for(num_cache_tokens)
            if num_pages < pages_for(max_model_len):
                raise ValueError(f"num_cache_tokens={num_cache_tokens} must hold max_model_len={max_model_len} tokens")
        self._shape, self._max_model_len = shape, max_model_len
        self._decoder = _decoder(shape, max_num_seqs, max_model_len, step_tokens, num_pages, num_threads, isa)
        self._scheduler = Scheduler(
            PagePool(num_pages, prefix_cache=prefix_cache),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_step_tokens=step_tokens,
        )
        self._stats = EngineStats()
        self._version: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def stats(self) -> EngineStats:
        """Running counts; a live object."""
        self._stats.num_cached_tokens = self._scheduler.num_cached_tokens
        return self._stats

    @property
    def version(self) -> int | None:
        """Version of the weights, None before the first update and after a failed one."""
        return self._version

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Complete one request. Cancelling the call drops the request.

        Raises:
            ValueError: the request can never be served (names the field).
            EngineError: the engine has no weights, was closed, or met logits that are not finite.
        """
        check_request(request, vocab_size=self._shape.vocab_size, max_model_len=self._max_model_len)
        self._require_ready(request)
        loop = asyncio.get_running_loop()
        sequence = ActiveSequence.of(request, loop.create_future())
        self._scheduler.waiting.append(sequence)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="embedded-engine")
        try:
            return await sequence.future
        except asyncio.CancelledError:
            if sequence.slot >= 0 or sequence in self._scheduler.waiting:
                self._scheduler.remove(sequence)
            raise

    async def abort(self, request_ids: Collection[str]) -> None:
        """End these requests at once: their slots are free, their calls return what was sampled so far."""
        wanted = set(request_ids)
        for sequence in [*self._scheduler.running.values(), *self._scheduler.waiting]:
            if sequence.request.request_id in wanted:
                self._scheduler.remove(sequence)
                self._finish(sequence, "abort")

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight in place (Hugging Face names, full tensors of any floating dtype).

        Raises:
            ValueError: a name is missing, unknown or double, or a shape does not fit; names it. The engine then
                refuses to generate until an update succeeds.
            EngineError: the engine was closed.
        """
        if self._closed:
            raise EngineError("the engine was closed: weights cannot be updated")
        self._version = None
        load_weights(self._decoder, self._shape, named_tensors)
        self._scheduler.restart_all()
        self._version = version

    async def close(self) -> None:
        """Stop; pending requests fail with EngineError. Closing twice is harmless."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._fail_all("the engine was closed while request {} was pending")

    def _require_ready(self, request: GenerateRequest) -> None:
        if self._closed:
            raise EngineError(f"the engine was closed: request {request.request_id!r} cannot run")
        if self._version is None:
            raise EngineError(f"the engine has no complete weights: request {request.request_id!r} cannot run")

    async def _run(self) -> None:
        try:
            while self._scheduler.has_work:
                if self._version is None:
                    self._fail_all("a weight update failed while request {} was pending")
                    return
                self._step()
                await asyncio.sleep(0)
        except Exception as error:
            self._fail_all(f"the engine failed ({type(error).__name__}: {error}) while request {{}} was pending", error)
            self._scheduler.restart_all()  # the step's pages can be found by prefix, but were never computed

    def _step(self) -> None:
        chunks = self._scheduler.next_chunks()
        done = [chunk for chunk in chunks if chunk.sequence.computed == len(chunk.sequence.ids)]
        tokens, log_probs = self._forward(chunks, done)
        self._stats.num_steps += 1
        self._stats.num_computed_tokens += sum(chunk.count for chunk in chunks)
        self._stats.num_sampled_tokens += len(done)
        for chunk, token, log_prob in zip(done, tokens, log_probs, strict=True):
            self._accept(chunk.sequence, token, log_prob)

    def _forward(self, chunks: list[Chunk], done: list[Chunk]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        output_rows: list[int] = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            ids += sequence.ids[chunk.start : end]
            slots += [sequence.slot] * chunk.count
            positions += range(chunk.start, end)
            if end == len(sequence.ids):
                output_rows.append(len(ids) - 1)
        sampling = [chunk.sequence.request.sampling for chunk in done]
        tokens, log_probs = self._decoder.forward(
            np.array(ids, dtype=np.int32),
            np.array(slots, dtype=np.int32),
            np.array(positions, dtype=np.int32),
            self._scheduler.block_table,
            np.array(output_rows, dtype=np.int32),
            np.array([s.temperature for s in sampling], dtype=np.float32),
            np.array([s.top_k for s in sampling], dtype=np.int32),
            np.array([s.top_p for s in sampling], dtype=np.float32),
            np.array([chunk.sequence.request.noise_key for chunk in done], dtype=np.uint64),
        )
        return tokens.tolist(), log_probs.tolist()

    def _accept(self, sequence: ActiveSequence, token: int, log_prob: float) -> None:
        """Append one sampled token and finish the request where it ends."""
        request = sequence.request
        if token < 0:
            self._scheduler.remove(sequence)
            where = f"request {request.request_id!r}, position {len(sequence.ids)}"
            self._fail(sequence, f"{where}: logits that are not finite")
            return
        assert self._version is not None
        sequence.ids.append(token)
        sequence.log_probs.append(log_prob)
        sequence.versions.append(self._version)
        stopped = token in sequence.stop_token_ids
        if stopped or len(sequence.log_probs) == request.sampling.max_new_tokens:
            self._scheduler.remove(sequence)
            self._finish(sequence, "stop" if stopped else "length")

    @staticmethod
    def _finish(sequence: ActiveSequence, reason: Literal["stop", "length", "abort"]) -> None:
        result = GenerateResult(
            output_ids=tuple(sequence.ids[sequence.num_prompt :]),
            log_probs=tuple(sequence.log_probs),
            finish_reason=reason,
            policy_versions=tuple(sequence.versions),
        )
        if not sequence.future.done():
            sequence.future.set_result(result)

    def _fail_all(self, message: str, cause: BaseException | None = None) -> None:
        for sequence in [*self._scheduler.running.values(), *self._scheduler.waiting]:
            self._scheduler.remove(sequence)
            self._fail(sequence, message.format(repr(sequence.request.request_id)), cause)

    @staticmethod
    def _fail(sequence: ActiveSequence, message: str, cause: BaseException | None = None) -> None:
        error = EngineError(message)
        error.__cause__ = cause
        if not sequence.future.done():
            sequence.future.set_exception(error)


def _decoder(
    shape: ModelShape,
    max_num_seqs: int,
    max_model_len: int,
    step_tokens: int,
    num_pages: int,
    num_threads: int | None,
    isa: str,
) -> Decoder:
    return Decoder(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        qkv_bias=shape.qkv_bias,
        qk_norm=shape.qk_norm,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        max_model_len=max_model_len,
        num_pages=num_pages,
        max_rows=step_tokens,
        max_outputs=max_num_seqs,
        num_threads=torch.get_num_threads() if num_threads is None else num_threads,
        isa=isa,
    )
