"""Settings of the rollout: which engine, how to sample, how long a conversation may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from spear_megatron.rollout.sglang.config import SGLangConfig

LOWEST_TEMPERATURE = 1e-3  # below it scaled logits leave the range of float32; 0 itself is greedy
_PREFIX = "actor_rollout_ref.rollout"


@dataclass(frozen=True, kw_only=True)
class MultiTurnConfig:
    """Limits of one conversation.

    Attributes:
        max_assistant_turns: model turns of one episode; the last may not ask for a tool.
        max_tool_response_length: characters of one tool message; a longer one is cut in the middle.
    """

    max_assistant_turns: int = 4
    max_tool_response_length: int = 256

    def __post_init__(self) -> None:
        for name in ("max_assistant_turns", "max_tool_response_length"):
            _require_positive(f"{_PREFIX}.multi_turn.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ValKwargsConfig:
    """Sampling of evaluations: ``n`` samples per task; temperature 0 is greedy; top_p and top_k may restrict."""

    n: int = 1
    """Samples per held-out task."""
    temperature: float = 1.0
    """Sampling temperature of evaluations; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of evaluations; 1 is off."""
    top_k: int = -1
    """Most likely tokens that evaluations sample from; -1 is off."""

    def __post_init__(self) -> None:
        prefix = f"{_PREFIX}.val_kwargs"
        _require_positive(f"{prefix}.n", self.n)
        _require_temperature(f"{prefix}.temperature", self.temperature)
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"{prefix}.n={self.n}: greedy samples are all equal, set n=1 or temperature above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{prefix}.top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"{prefix}.top_k must be -1 (off) or a positive integer, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class MismatchConfig:
    """Bounds on the difference d between the trainer's and the engine's log-probs of sampled tokens, in nats.

    Only tokens of the current weights count. Means of |d| to expect: 2e-7 with the embedded engine and an fp32 trainer,
    3e-3 to 1e-2 with a bf16 trainer, about 1e-2 where bf16 engine and trainer use different kernels; wrong weights,
    templates or temperatures give 0.1 and more. So the default of ``warn`` lies in between; to mask and to stop are
    choices, because one bound does not fit every engine.

    Attributes:
        warn: warn in every step whose mean |d| is above it; null never does.
        stop: stop the run at a step whose mean |d| is above it; null never does.
        mask: trajectories whose mean, by ``mask_by``, is above it leave the loss like filtered ones; needs the pass for
            old log-probs, also in steps of a single update. null masks none.
        mask_by: what ``mask`` bounds: the mean of |d|, or the k3 estimate of KL(engine, trainer) per token.
        token_bound: |d| from which on a token counts in the share mismatch/over_bound.
        keep_batches: newest batches of mismatches, and newest of non-finite steps, that stay in the run directory.
    """

    warn: float | None = 0.05
    stop: float | None = None
    mask: float | None = None
    mask_by: Literal["abs_diff", "k3"] = "abs_diff"
    token_bound: float = 0.1
    keep_batches: int = 5

    def __post_init__(self) -> None:
        prefix = f"{_PREFIX}.mismatch"
        for name in ("warn", "stop", "mask", "token_bound"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{prefix}.{name} must be a positive number of nats, got {value}")
        _require_positive(f"{prefix}.keep_batches", self.keep_batches)
        if self.warn is not None and self.stop is not None and self.stop < self.warn:
            raise ValueError(f"{prefix}.stop={self.stop} lies below warn={self.warn}: raise it, or lower warn")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How trajectories are sampled for training.

    Attributes:
        name: the engine; ``embedded`` runs inside the data-parallel leaders, ``sglang`` asks servers.
        n: trajectories per prompt.
        temperature: sampling temperature of training; the trainer's log-probs use it too.
        top_p, top_k: only off (1.0 and -1) in training, where the policy gradient is that of the whole distribution.
        max_num_seqs: requests that one embedded engine computes together, or that all leaders keep at one server.
        rollout_filter_ratio: share of a step's task groups that is trained on, chosen by the spread of their rewards.
        rollout_filter_type: std keeps the groups of largest standard deviation, std_rev those of smallest.
        over_sampling: task groups started per group that a step needs; above 1 the step takes the first to be complete
            and stops the others, whose prompts come first in the next step.
        partial_rollout: groups that over-sampling stopped go on in the next step with what they have, under its weights
            (episodes of environments that cannot be restored start again); False starts them anew.
        partial_rollout_max_age: steps that such a group may be carried over before it starts anew.
        max_model_len: tokens of prompt and response together; None takes data.max_prompt_length + max_response_length.
    """

    name: Literal["embedded", "sglang"] = "embedded"
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_num_seqs: int = 64
    max_model_len: int | None = None
    over_sampling: float = 1.0
    partial_rollout: bool = False
    partial_rollout_max_age: int = 2
    rollout_filter_ratio: float = 1.0
    rollout_filter_type: Literal["std", "std_rev"] = "std"
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    sglang: SGLangConfig = field(default_factory=SGLangConfig)

    def __post_init__(self) -> None:
        self._check_engine()
        _require_positive(f"{_PREFIX}.n", self.n)
        _require_positive(f"{_PREFIX}.max_num_seqs", self.max_num_seqs)
        if self.max_model_len is not None:
            _require_positive(f"{_PREFIX}.max_model_len", self.max_model_len)
        if not 0 < self.rollout_filter_ratio <= 1:
            raise ValueError(f"{_PREFIX}.rollout_filter_ratio must lie in (0, 1], got {self.rollout_filter_ratio}")
        if not 1 <= self.over_sampling < math.inf:
            raise ValueError(f"{_PREFIX}.over_sampling must be finite and at least 1, got {self.over_sampling}")
        _require_positive(f"{_PREFIX}.partial_rollout_max_age", self.partial_rollout_max_age)
        if self.partial_rollout and self.over_sampling == 1:
            raise ValueError(
                f"{_PREFIX}.partial_rollout=true goes on with what over-sampling stopped, but nothing is stopped by "
                f"{_PREFIX}.over_sampling=1: raise it, or set partial_rollout=false"
            )
        _require_temperature(f"{_PREFIX}.temperature", self.temperature)
        if self.temperature == 0:
            raise ValueError(f"{_PREFIX}.temperature=0 (greedy) makes a group's trajectories equal: set it above 0")
        for name, off in (("top_p", 1.0), ("top_k", -1)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{_PREFIX}.{name}={getattr(self, name)} would train on a restricted distribution whose log-probs "
                    f"the loss does not see: set it to {off} (val_kwargs.{name} may restrict evaluation)"
                )

    def _check_engine(self) -> None:
        if self.name not in ("embedded", "sglang"):
            raise ValueError(f"{_PREFIX}.name={self.name!r} is not an engine, use 'embedded' or 'sglang'")
        if self.name == "embedded":
            given = [key for key in ("servers", "router", "colocated") if getattr(self.sglang, key)]
            if given:
                raise ValueError(
                    f"{_PREFIX}.sglang.{given[0]} is set, but {_PREFIX}.name=embedded asks no server: "
                    "set name=sglang, or remove it"
                )


def _require_positive(key: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")


def _require_temperature(key: str, value: float) -> None:
    if value != 0 and not LOWEST_TEMPERATURE <= value < math.inf:
        raise ValueError(f"{key} must be 0 (greedy) or finite and at least {LOWEST_TEMPERATURE}, got {value}")
