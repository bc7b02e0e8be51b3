"""Sampled trajectories of a run: a bounded number per step, token ids and masks included, and reading them back.

Layout: ``<run directory>/trajectories/<kind>/step_<step>.<shard>.jsonl``, one trajectory a line; ``kind`` is ``train``
or ``val``, ``shard`` the data-parallel rank whose leader wrote the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from spear_megatron.observability.files import sync_path, write_atomically
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId

SCHEMA_VERSION = 1
Kind = Literal["train", "val"]
Decode = Callable[[Sequence[int]], str]
_FILE_NAME = re.compile(r"step_(\d+)\.(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one kind: ``trained`` (sampled by the policy) or inserted. ``text`` is their decoded text."""

    text: str
    trained: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KeptTrajectory:
    """A trajectory read back, with its prompt; ``spans`` holds the decoded text of each segment, in order."""

    trajectory: Trajectory
    prompt: Prompt
    reward: float
    spans: tuple[tuple[Span, ...], ...]


class TrajectoryStore:
    """Keeps up to ``per_step`` trajectories of each step, and as many again of those that the caller asks for.

    Writing a step again replaces its file as a whole.
    """

    def __init__(
        self,
        run_dir: str | Path,
        per_step: int,
        decode: Decode,
        shard: int = 0,
        resume_step: int | None = None,
        num_shards: int | None = None,
    ) -> None:
        """Open the folder and remove this shard's steps after ``resume_step`` (None: all of them).

        Args:
            decode: turns token ids into text.
            num_shards: how many shards write now; the first one also removes those steps of shards that are no more.
        """
        if per_step < 0:
            raise ValueError(f"trainer.num_logged_trajectories must be 0 or more, got {per_step}")
        self._root = Path(run_dir) / "trajectories"
        self._per_step = per_step
        self._decode = decode
        self._shard = shard
        self._num_shards = num_shards
        self._drop_after(-1 if resume_step is None else resume_step)

    def write(
        self,
        step: int,
        groups: Iterable[Group],
        rewards: Mapping[TrajectoryId, float],
        kind: Kind = "train",
        keep_ids: Collection[TrajectoryId] = (),
    ) -> int:
        """Keep a selection of ``groups`` for ``step``; returns how many were kept.

        Args:
            rewards: composed reward per trajectory; where it is missing, the outcome stands for it.
            keep_ids: trajectories to keep besides, such as those that entered the replay buffer: at most ``per_step``
                more, those of largest reward first.
        """
        pairs = [(trajectory, group.prompt) for group in groups for trajectory in group.trajectories]
        pairs.sort(key=lambda pair: pair[0].id)
        values = [rewards.get(trajectory.id, trajectory.reward.outcome) for trajectory, _ in pairs]
        if kind == "val":  # the same problems at every evaluation, so that they can be compared
            chosen = evenly_spaced(len(pairs), self._per_step)
        else:
            chosen = select(values, self._per_step)
        wanted = set(keep_ids) - {pairs[index][0].id for index in chosen}
        more = [index for index, (trajectory, _) in enumerate(pairs) if trajectory.id in wanted]
        more.sort(key=lambda index: (-values[index], index))
        chosen = sorted([*chosen, *more[: self._per_step]])
        if not chosen:
            return 0
        lines = [json.dumps(encode(*pairs[index], values[index], self._decode)) for index in chosen]
        folder = self._root / kind
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step:06d}.{self._shard}.jsonl"
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        return len(chosen)

    def _drop_after(self, step: int) -> None:
        for path in self._root.glob("*/step_*.jsonl"):
            match = _FILE_NAME.fullmatch(path.name)
            if match and self._drops(int(match[2])) and int(match[1]) > step:
                path.unlink()
                sync_path(path.parent)

    def _drops(self, shard: int) -> bool:
        gone = self._shard == 0 and self._num_shards is not None and shard >= self._num_shards
        return gone or shard == self._shard


def write_kept(run_dir: str | Path, lines: Sequence[Mapping[str, Any]], step: int = 0, kind: Kind = "val") -> None:
    """Write objects of :func:`encode` as what is kept of ``step``; without any, nothing is written."""
    if lines:
        path = Path(run_dir) / "trajectories" / kind / f"step_{step:06d}.0.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices below ``count``, evenly spread from the first on, ascending."""
    if limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def select(rewards: Sequence[float], limit: int) -> list[int]:
    """At most ``limit`` indices, ascending: the worst and the best reward, and others evenly spread."""
    if limit >= len(rewards) or limit < 3:
        return evenly_spaced(len(rewards), limit)
    extremes = {min(range(len(rewards)), key=rewards.__getitem__), max(range(len(rewards)), key=rewards.__getitem__)}
    others = [index for index in range(len(rewards)) if index not in extremes]
    return sorted(extremes | {others[place] for place in evenly_spaced(len(others), limit - len(extremes))})


def recorded_steps(run_dir: str | Path, kind: Kind = "train") -> list[int]:
    """Steps of which ``run_dir`` holds trajectories, ascending."""
    folder = Path(run_dir) / "trajectories" / kind
    matches = (_FILE_NAME.fullmatch(path.name) for path in folder.glob("step_*.jsonl"))
    return sorted({int(match[1]) for match in matches if match})


def read_trajectories(run_dir: str | Path, step: int, kind: Kind = "train") -> list[KeptTrajectory]:
    """Everything kept of ``step``, by id.

    Raises:
        FileNotFoundError: nothing is kept of that step; names the steps that are.
        ValueError: a line is damaged.
    """
    folder = Path(run_dir) / "trajectories" / kind
    paths = sorted(folder.glob(f"step_{step:06d}.*.jsonl"))
    if not paths:
        steps = recorded_steps(run_dir, kind)
        there = f"kept steps: {_ranges(steps)}" if steps else "none are kept at all"
        raise FileNotFoundError(f"{run_dir} keeps no {kind} trajectories of step {step}; {there}")
    kept = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                kept.append(decode_line(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} is damaged: {type(error).__name__} {error}") from error
    if not kept:
        raise ValueError(f"{paths[0]} is empty: the run ended before it wrote a trajectory; give another --step")
    return sorted(kept, key=lambda item: item.trajectory.id)


def encode(trajectory: Trajectory, prompt: Prompt, reward: float, decode: Decode) -> dict[str, Any]:
    """One trajectory as a JSON object; :func:`decode_line` reads it back exactly."""
    parts = trajectory.reward
    return {
        "schema_version": SCHEMA_VERSION,
        "id": list(trajectory.id),
        "prompt": {
            "task_id": prompt.task_id,
            "messages": [dict(message) for message in prompt.messages],
            "answer": prompt.answer,
            "data_source": prompt.data_source,
        },
        "reward": reward if math.isfinite(reward) else None,
        "reward_parts": {
            "outcome": parts.outcome,
            "num_tool_calls": parts.num_tool_calls,
            "penalty": parts.penalty,
            "success": parts.success,
            "num_tool_turns": parts.num_tool_turns,
            "num_invalid_actions": parts.num_invalid_actions,
        },
        "stop_reason": trajectory.stop_reason.value,
        "policy_version": trajectory.policy_version,
        "num_turns": trajectory.num_turns,
        "num_tool_calls": trajectory.num_tool_calls,
        "num_tool_failures": trajectory.num_tool_failures,
        "num_tool_turns": trajectory.num_tool_turns,
        "error": trajectory.error,
        "messages": [dict(message) for message in trajectory.messages],
        "segments": [_encode_segment(segment, decode) for segment in trajectory.segments],
    }


def decode_line(line: Mapping[str, Any]) -> KeptTrajectory:
    """The inverse of :func:`encode`. Raises KeyError, TypeError or ValueError on a damaged object."""
    prompt = line["prompt"]
    trajectory = Trajectory(
        id=TrajectoryId(*line["id"]),
        segments=tuple(_decode_segment(segment) for segment in line["segments"]),
        reward=RewardParts(**line["reward_parts"]),
        stop_reason=StopReason(line["stop_reason"]),
        policy_version=line["policy_version"],
        num_turns=line["num_turns"],
        num_tool_calls=line["num_tool_calls"],
        num_tool_failures=line["num_tool_failures"],
        num_tool_turns=line.get("num_tool_turns", 0),
        messages=tuple(line["messages"]),
        error=line["error"],
    )
    return KeptTrajectory(
        trajectory=trajectory,
        prompt=Prompt(prompt["task_id"], tuple(prompt["messages"]), prompt["answer"], prompt["data_source"]),
        reward=math.nan if line["reward"] is None else float(line["reward"]),
        spans=tuple(tuple(Span(**span) for span in segment["spans"]) for segment in line["segments"]),
    )


def _encode_segment(segment: Segment, decode: Decode) -> dict[str, Any]:
    ids, mask = segment.ids.tolist(), segment.response_mask.tolist()
    spans = []
    for trained, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        spans.append({"text": decode(tokens), "trained": trained, "num_tokens": len(tokens)})
    log_probs = segment.rollout_log_probs.detach().cpu().numpy().astype(np.float32)
    return {
        "ids": ids,
        "response_mask": [int(value) for value in mask],
        "rollout_log_probs": [float(str(value)) for value in log_probs],  # the shortest text that reads back exactly
        "observation_key": segment.observation_key,
        "policy_versions": None if segment.policy_versions is None else segment.policy_versions.tolist(),
        "reward": segment.reward,
        "num_invalid_actions": segment.num_invalid_actions,
        "spans": spans,
    }


def _decode_segment(segment: Mapping[str, Any]) -> Segment:
    versions = segment.get("policy_versions")
    return Segment(
        ids=torch.tensor(segment["ids"], dtype=torch.int32),
        response_mask=torch.tensor(segment["response_mask"], dtype=torch.bool),
        rollout_log_probs=torch.tensor(segment["rollout_log_probs"], dtype=torch.float32),
        observation_key=segment["observation_key"],
        policy_versions=None if versions is None else torch.tensor(versions, dtype=torch.int32),
        reward=segment.get("reward", 0.0),
        num_invalid_actions=segment.get("num_invalid_actions", 0),
    )


def _ranges(steps: Sequence[int]) -> str:
    """``1-4, 8``: ascending numbers with runs folded."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
