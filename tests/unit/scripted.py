"""An engine that says what a script tells it, and the tokenizer it speaks; for tests of what talks to an engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.data.tiny import build_tokenizer
from spear_megatron.rollout.engine import EngineError, GenerateRequest, GenerateResult


@functools.cache
def tiny_renderer() -> ChatRenderer:
    return ChatRenderer(build_tokenizer(seed=0))


def log_prob_of(position: int) -> float:
    """The log-prob the scripted engine reports for the token at an absolute position: tells positions apart."""
    return -0.001 * (position + 1)


class ScriptedEngine:
    """Answers the k-th request of a trajectory with the k-th text of its script, cut at ``max_new_tokens``.

    A script entry may also be an exception to raise, or a callable from the request to a result.
    """

    def __init__(self, script: Sequence[object], *, version: int = 3, delay_s: float = 0.0) -> None:
        self.script = list(script)
        self.version = version
        self.delay_s = delay_s
        self.requests: list[GenerateRequest] = []
        self.running = 0
        self.most_running = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.delay_s)
        self.running -= 1
        entry = self.script[int(request.request_id.rpartition("/")[2]) % len(self.script)]
        if isinstance(entry, BaseException):
            raise entry
        if isinstance(entry, Callable):
            return entry(request)
        assert isinstance(entry, str)
        return self.say(request, entry)

    def say(self, request: GenerateRequest, text: str, *, end: bool = True) -> GenerateResult:
        """The result of sampling ``text`` and, with ``end``, the end-of-turn token."""
        ids = tiny_renderer().tokenizer.encode(text + "<|im_end|>" * end, add_special_tokens=False)
        cut = ids[: request.sampling.max_new_tokens]
        stopped = cut[-1] in request.sampling.stop_token_ids if cut else False
        start = len(request.input_ids)
        return GenerateResult(
            output_ids=tuple(cut),
            log_probs=tuple(log_prob_of(start + offset) for offset in range(len(cut))),
            finish_reason="stop" if stopped else "length",
            policy_versions=(self.version,) * len(cut),
        )

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version

    async def close(self) -> None:
        self.script = [EngineError("closed")]
