"""An engine that is wrong on purpose: what must be noticed when engine and trainer disagree."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import torch

from spear_megatron.rollout.engine import Engine, GenerateRequest, GenerateResult


class PerturbedEngine:
    """Wraps an engine; its tokens stay what they are.

    Args:
        engine: the engine that does the work.
        noise: standard deviation of what is added to log-probs, nats; log-probs stay at most 0. It is drawn from
            request and position.
        turn: 1-based turn of the agent loop that the noise is added to; None for every turn.
        frozen_from: weights of this version and later ones are thrown away, and the old ones pass for them.
    """

    def __init__(
        self, engine: Engine, *, noise: float = 0.0, turn: int | None = None, frozen_from: int | None = None
    ) -> None:
        self._engine, self._noise, self._turn, self._frozen_from = engine, noise, turn, frozen_from
        self._claimed: int | None = None

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The engine's answer, with noise on its log-probs and the version that the weights should have."""
        result = await self._engine.generate(request)
        if self._claimed is not None:
            result = replace(result, policy_versions=(self._claimed,) * len(result.output_ids))
        # The agent loop ends a request's name with the number of turns before it.
        turn = int(request.request_id.rpartition("/")[2]) + 1
        if not self._noise or self._turn not in (None, turn):
            return result
        draw = random.Random(f"{request.request_id}/{request.noise_key}")
        noisy = tuple(min(value + draw.gauss(0.0, self._noise), 0.0) for value in result.log_probs)
        return replace(result, log_probs=noisy)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hand the weights on, unless the engine is frozen from this version on."""
        if self._frozen_from is not None and version >= self._frozen_from:
            for _ in named_tensors:
                pass
            self._claimed = version
            return
        self._engine.update_weights(named_tensors, version)

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()
