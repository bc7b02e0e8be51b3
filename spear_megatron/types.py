"""The frozen dataclasses that carry everything from prompt to loss. Data moves one way through them.

Shapes: ``n`` is the number of tokens of one segment (prompt and response together).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class TrajectoryId(NamedTuple):
    """Names a trajectory by what it is, never by the rank that made it.

    ``step`` is the 1-based training step (0: before training), ``task`` the index of the prompt in the prompt stream,
    ``sample`` the index within the group. Ids sort in the order in which a step is recorded.
    """

    step: int
    task: int
    sample: int

    @property
    def group(self) -> tuple[int, int]:
        """Id of the task group: all samples of one prompt in one step."""
        return (self.step, self.task)

    def __str__(self) -> str:
        return f"{self.step}-{self.task}-{self.sample}"


class StopReason(str, enum.Enum):
    """Why an episode ended."""

    ANSWER = "answer"  # the model ended its turn without a tool call, with an answer
    TURN_LIMIT = "turn_limit"  # the last allowed turn still asked for a tool
    LENGTH = "length"  # the model hit the response or context limit inside a turn
    TOOL_OVERFLOW = "tool_overflow"  # the tool's output would not fit into the response limit
    VOID_TURN = "void_turn"  # a finished turn with neither a tool call nor an answer
    INFRASTRUCTURE = "infrastructure"  # engine or sandbox failed: excluded from loss and statistics, never scored 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task. ``messages`` is the opening conversation as chat dictionaries (``role``, ``content``)."""

    task_id: str
    messages: tuple[Mapping[str, Any], ...]
    answer: str | None = None
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that the policy saw as one sequence.

    Attributes:
        ids: int32 [n], prompt, model turns and inserted tokens, exactly as sampled.
        response_mask: bool [n], True on tokens that the policy sampled.
        rollout_log_probs: float32 [n], the engine's log-prob of ``ids[t]`` given ``ids[:t]``; 0 off the mask.
        observation_key: anchor of the observation that opened the segment (step-wise agents), else None.
        policy_versions: int32 [n], version of the weights that sampled ``ids[t]``, -1 off the mask; None if unknown.
        reward: the environment's own reward for the turns of this segment.
        num_invalid_actions: turns of this segment that held no usable action.
    """

    ids: torch.Tensor
    response_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    observation_key: str | None = None
    policy_versions: torch.Tensor | None = None
    reward: float = 0.0
    num_invalid_actions: int = 0

    @property
    def prompt_length(self) -> int:
        """Tokens before the first sampled one."""
        hits = torch.nonzero(self.response_mask)
        return int(hits[0]) if len(hits) else len(self.ids)


@dataclass(frozen=True, slots=True)
class RewardParts:
    """Parts of one trajectory's reward, kept apart for ever (method: S_i, n_i, p_i).

    ``num_tool_calls`` counts calls that were run, ``num_tool_turns`` model turns that asked for at least one,
    ``num_invalid_actions`` turns without a usable action. ``penalty`` is what the reward function itself subtracted.
    """

    outcome: float
    num_tool_calls: int = 0
    penalty: float = 0.0
    success: bool = False
    num_tool_turns: int = 0
    num_invalid_actions: int = 0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode: an ordered list of segments sharing id, group and reward."""

    id: TrajectoryId
    segments: tuple[Segment, ...]
    reward: RewardParts
    stop_reason: StopReason
    policy_version: int
    num_turns: int = 0
    num_tool_calls: int = 0
    num_tool_failures: int = 0
    messages: tuple[Mapping[str, Any], ...] = ()
    error: str | None = None
    num_tool_turns: int = 0

    @property
    def valid(self) -> bool:
        """False when infrastructure failed: such a trajectory enters neither loss nor statistics."""
        return self.stop_reason is not StopReason.INFRASTRUCTURE

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def num_invalid_actions(self) -> int:
        return sum(segment.num_invalid_actions for segment in self.segments)

    @property
    def num_response_tokens(self) -> int:
        return sum(int(segment.response_mask.sum()) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one prompt in one step, in sample order."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    @property
    def id(self) -> tuple[int, int]:
        return self.trajectories[0].id.group


@dataclass(frozen=True, slots=True)
class Row:
    """One segment on its way into the loss.

    Attributes:
        trajectory: id of the trajectory it belongs to; ``segment`` is its position there.
        ids: int32 [n]; response_mask: bool [n]; rollout_log_probs: float32 [n].
        advantages: float32 [n], 0 where the mask is False.
        old_log_probs, ref_log_probs: float32 [n] or None while not yet computed.
        policy_versions: int32 [n], version of the weights that sampled ``ids[t]``, -1 off the mask; None if unknown.
        first_turn: 1-based turn of its first sampled token within the trajectory.
    """

    trajectory: TrajectoryId
    segment: int
    ids: torch.Tensor
    response_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None
    policy_versions: torch.Tensor | None = None
    first_turn: int = 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows packed back to back into one THD sequence of ``T`` tokens, padded at the end by a zero-weight dummy.

    Under context parallelism a rank computes on its own part of the tokens; ``cu_seqlens`` stays that of all.

    Attributes:
        tokens, targets, position_ids: int64 [T]; ``targets[t]`` is the token that follows ``tokens[t]`` in its row.
        cu_seqlens: int32 [num_sequences + 1], offsets of the packed sequences; the last equals ``T``.
        loss_mask: bool [T], True where ``targets[t]`` was sampled by the policy.
        token_weight: float32 [T], 1 / normaliser times every other constant factor (1: unweighted; 0 off the mask).
        advantages, old_log_probs, rollout_log_probs, ref_log_probs: float32 [T], aligned with ``targets``.
        surrogate_weight: float32 [T], off-policy correction of the surrogate (1: none).
        replayed: bool [T], True on tokens of replayed trajectories.
        selected: bool [T], tokens that covariance regularisation acts on.
        token_keys: int64 [T], keys of the covariance draw where it happens inside the loss, else 0.
        rows: the (trajectory, segment) of each real sequence, in packed order.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    loss_mask: torch.Tensor
    token_weight: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor
    rollout_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    surrogate_weight: torch.Tensor
    replayed: torch.Tensor
    selected: torch.Tensor
    token_keys: torch.Tensor
    rows: tuple[tuple[TrajectoryId, int], ...]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One optimizer step's micro-batches on one data-parallel rank, all of one token length."""

    micro_batches: tuple[MicroBatch, ...]
    max_seqlen: int
    num_rows: int
    num_tokens: int
