"""Episodes that were stopped before their end: what they keep, so that a later step goes on with them.

Tokens, log-probs and policy versions stay as they were sampled. An episode goes on only in an environment that can be
restored (``environments.protocol.ResumableEnvironment``); in any other it starts again from the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from spear_megatron.types import Trajectory

Stage = Literal["turn", "step", "reward"]


@dataclass(frozen=True, slots=True)
class PartialEpisode:
    """An episode at the point where it was stopped.

    Attributes:
        trajectory: segments, counts and messages so far. Its stop reason holds only in the stage ``reward``.
        environment: the environment's state before the running stage.
        stage: what comes next: the rest of a model turn, the environment's reaction to a whole one, or the reward.
        turn_start: position in the last segment where the running turn begins.
    """

    trajectory: Trajectory
    environment: Mapping[str, Any]
    stage: Stage
    turn_start: int

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled so far."""
        return num_sampled(self.trajectory)


def num_sampled(trajectory: Trajectory) -> int:
    """Tokens of a trajectory that the policy sampled."""
    return sum(int(segment.response_mask.sum()) for segment in trajectory.segments)


class _Episode(Protocol):
    @property
    def num_sampled(self) -> int: ...

    def partial(self) -> PartialEpisode | None: ...


class EpisodeSlot:
    """What a running episode and its scheduler share: where it goes on from, and how far it is.

    Without ``resumable`` the episode keeps nothing to go on with later, and its environment is not asked for its state.
    """

    def __init__(self, resume: PartialEpisode | None = None, *, resumable: bool = True) -> None:
        self.resume = resume
        self.resumable = resumable
        self._episode: _Episode | None = None

    def bind(self, episode: _Episode) -> None:
        """The episode that runs; a second attempt takes the place of the first and starts from the beginning."""
        if self._episode is not None:
            self.resume = None
        self._episode = episode

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        if self._episode is not None:
            return self._episode.num_sampled
        return self.resume.num_sampled if self.resume is not None else 0

    def partial(self) -> PartialEpisode | None:
        """The episode as it stands, if it has sampled anything and its environment can be restored."""
        return self._episode.partial() if self._episode is not None else self.resume


@dataclass(frozen=True, slots=True)
class HeldGroup:
    """A task group that begins, or goes on from an earlier step.

    Attributes:
        born: the step whose number its ids carry.
        task: index of the prompt in the prompt stream.
        finished: episodes that ended, by sample. partial: those that were stopped.
    """

    born: int
    task: int
    finished: Mapping[int, Trajectory] = field(default_factory=dict)
    partial: Mapping[int, PartialEpisode] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of its longest segment."""
        members = [*self.finished.values(), *(partial.trajectory for partial in self.partial.values())]
        return max((len(segment.ids) for member in members for segment in member.segments), default=0)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens that the group brings along."""
        return sum(length for length, _ in self.episodes(1 + max([*self.finished, *self.partial], default=-1)))

    def episodes(self, num_samples: int) -> tuple[tuple[int, bool], ...]:
        """(tokens sampled so far, whether it ended) by sample."""
        lengths = {sample: num_sampled(trajectory) for sample, trajectory in self.finished.items()}
        lengths |= {sample: partial.num_sampled for sample, partial in self.partial.items()}
        return tuple((lengths.get(sample, 0), sample in self.finished) for sample in range(num_samples))
