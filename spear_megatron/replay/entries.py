"""What every rank knows of a stored trajectory: one small row of the index."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spear_megatron.types import RewardParts, TrajectoryId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayEntry:
    """One trajectory of the buffer; its payload lies on the data-parallel leader ``shard``.

    Attributes:
        base, bonus: its reward is base + mu * bonus at any tool-call coefficient mu.
        parts: raw parts of the reward, kept apart.
        stored_reward: base + mu * bonus at the coefficient of its step, as the baseline of that step has it.
        advantage: in its group when it was pushed.
        num_tokens: of all segments, prompts included. longest: of one segment. num_sampled: sampled by the policy.
        num_bytes: of the payload, but for the length of its observation keys.
        temperature: of sampling; its log-probs mean something at this one alone.
    """

    id: TrajectoryId
    shard: int
    base: float
    bonus: float
    parts: RewardParts
    stored_reward: float
    advantage: float
    num_tokens: int
    num_sampled: int
    num_bytes: int
    temperature: float
    longest: int = 0

    @property
    def step(self) -> int:
        """1-based training step that sampled it."""
        return self.id.step

    def reward(self, mu: float | None) -> float:
        """Reward at ``mu``, or as stored for None."""
        return self.stored_reward if mu is None else self.base + mu * self.bonus

    def encode(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**dataclasses.asdict(self), "id": list(self.id), "parts": dataclasses.asdict(self.parts)}

    @classmethod
    def decode(cls, values: Mapping[str, Any]) -> ReplayEntry:
        """The inverse of :meth:`encode`. Raises KeyError or TypeError on a damaged object."""
        return cls(**{**values, "id": TrajectoryId(*values["id"]), "parts": RewardParts(**values["parts"])})
