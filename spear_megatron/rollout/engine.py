"""The engine protocol: token in, token out. Every engine (embedded, SGLang) speaks exactly this."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings. ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1.0 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """``noise_key`` (64 bit, from the trajectory id) and the absolute token position decide the sampling noise."""

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams
    noise_key: int


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Sampled tokens with the log-probs of the distribution log_softmax(logits / temperature), unfiltered.

    A matched stop token is the last of ``output_ids`` and has its log-prob. Greedy requests report log_softmax(logits).
    """

    output_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "abort"]
    policy_versions: tuple[int, ...] = field(default=())


class EngineError(RuntimeError):
    """The engine could not serve a request: infrastructure, never the policy's fault."""


class RequestStopped(Exception):
    """A request was ended because the collection it belongs to is over; ``result`` holds the tokens so far."""

    def __init__(self, result: GenerateResult) -> None:
        super().__init__("the collection is over")
        self.result = result


@runtime_checkable
class Engine(Protocol):
    """What the agent loop and the weight publisher need of an engine. Calls come from one asyncio loop.

    ``update_weights`` is called by the main thread while no request is pending. An engine that samples with the
    trainer's own tensors has an attribute ``colocated`` that is True (see :func:`is_colocated`).
    """

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Complete one request. Raises ValueError for a request it can never serve, EngineError when it failed."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace every weight (Hugging Face names, full tensors). Missing, unknown or misshapen names are errors."""
        ...

    async def close(self) -> None:
        """Release what the engine holds; pending requests fail with EngineError."""
        ...


@runtime_checkable
class AbortableEngine(Protocol):
    """What an engine may offer besides: ending requests early without losing what they sampled."""

    async def abort(self, request_ids: Collection[str]) -> None:
        """End these requests where they are; unknown and finished ones are ignored.

        Each pending ``generate`` call returns soon with ``finish_reason`` "abort" and the tokens sampled so far.
        """
        ...


def is_colocated(engine: Engine) -> bool:
    """Whether the engine has no copy of the weights of its own, so that it cannot sample while the trainer updates."""
    return bool(getattr(engine, "colocated", False))
