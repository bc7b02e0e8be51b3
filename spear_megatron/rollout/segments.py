"""A segment while its conversation goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spear_megatron.rollout.engine import GenerateResult
from spear_megatron.types import Segment


class SegmentBuilder:
    """Ids, mask, log-probs and versions of one segment, always of equal length."""

    def __init__(self, prompt_ids: Sequence[int], observation_key: str | None) -> None:
        self.ids = list(prompt_ids)
        self._mask = [False] * len(self.ids)
        self._log_probs = [0.0] * len(self.ids)
        self._versions = [-1] * len(self.ids)
        self._versions_known = True
        self._prompt_length = len(self.ids)
        self._observation_key = observation_key
        self.reward = 0.0
        self.num_invalid_actions = 0

    @classmethod
    def of(cls, segment: Segment) -> SegmentBuilder:
        """Go on with a segment that was built."""
        builder = cls(segment.ids.tolist(), segment.observation_key)
        builder._mask = segment.response_mask.tolist()
        builder._log_probs = segment.rollout_log_probs.tolist()
        known = segment.policy_versions
        builder._versions = [-1] * len(builder.ids) if known is None else known.tolist()
        builder._versions_known = known is not None
        builder._prompt_length = segment.prompt_length
        builder.reward, builder.num_invalid_actions = segment.reward, segment.num_invalid_actions
        return builder

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self._mask)

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, sampled or inserted."""
        return len(self.ids) - self._prompt_length

    def append_sampled(self, result: GenerateResult) -> None:
        """Add what the policy sampled."""
        known = len(result.policy_versions) == len(result.output_ids)
        self._versions_known &= known
        versions = result.policy_versions if known else [-1] * len(result.output_ids)
        self._append(result.output_ids, True, result.log_probs, versions)

    def append_inserted(self, ids: Sequence[int]) -> None:
        """Add what stands between two turns."""
        self._append(ids, False, [0.0] * len(ids), [-1] * len(ids))

    def _append(
        self, ids: Sequence[int], sampled: bool, log_probs: Sequence[float], versions: Sequence[int]
    ) -> None:
        self.ids.extend(ids)
        self._mask.extend([sampled] * len(ids))
        self._log_probs.extend(log_probs)
        self._versions.extend(versions)

    def build(self) -> Segment:
        """The segment as it is."""
        return Segment(
            ids=torch.tensor(self.ids, dtype=torch.int32),
            response_mask=torch.tensor(self._mask, dtype=torch.bool),
            rollout_log_probs=torch.tensor(self._log_probs, dtype=torch.float32),
            observation_key=self._observation_key,
            policy_versions=torch.tensor(self._versions, dtype=torch.int32) if self._versions_known else None,
            reward=self.reward,
            num_invalid_actions=self.num_invalid_actions,
        )
