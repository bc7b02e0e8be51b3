"""Keys of ``algorithm.*`` and ``actor_rollout_ref.actor.policy_loss.*``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spear_megatron.algorithms.kl import check_kl_kind

ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "gigpo")
_POLICY = "actor_rollout_ref.actor.policy_loss"
_MODES = {"vanilla": "vanilla", "gpg": "gpg", "clip-cov": "clip_cov", "kl-cov": "kl_cov"}
_MODES |= {name.replace("-", "_"): name.replace("-", "_") for name in _MODES}


@dataclass(frozen=True, kw_only=True)
class KlCtrlConfig:
    """``algorithm.kl_ctrl.*``: the coefficient of the KL penalty that ``use_kl_in_reward`` puts into the reward."""

    kl_coef: float = 0.001
    """Coefficient of the KL penalty that use_kl_in_reward puts into the reward."""

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"algorithm.kl_ctrl.kl_coef is {self.kl_coef}; use a coefficient of 0 or more.")


@dataclass(frozen=True, kw_only=True)
class GigpoConfig:
    """``algorithm.gigpo.*``: step-level advantages of ``adv_estimator: gigpo``.

    Attributes:
        step_advantage_w: weight of the step term next to the episode term.
        mode: mean_norm subtracts the mean of a step group, mean_std_norm divides by its standard deviation too.
    """

    step_advantage_w: float = 1.0
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm"

    def __post_init__(self) -> None:
        if self.step_advantage_w < 0:
            raise ValueError(f"algorithm.gigpo.step_advantage_w must not be negative, got {self.step_advantage_w}.")


@dataclass(frozen=True, kw_only=True)
class FilterGroupsConfig:
    """``algorithm.filter_groups.*``: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

    Attributes:
        enable: keep sampling prompts until a step has train_batch_size groups whose rewards differ.
        max_num_gen_batches: give up after this many batches of prompts and train on what there is.
    """

    enable: bool = False
    max_num_gen_batches: int = 10

    def __post_init__(self) -> None:
        if self.max_num_gen_batches < 1:
            raise ValueError(
                f"algorithm.filter_groups.max_num_gen_batches must be at least 1, got {self.max_num_gen_batches}."
            )


@dataclass(frozen=True, kw_only=True)
class RolloutCorrectionConfig:
    """``algorithm.rollout_correction.*``: engine and trainer do not compute the same log-probs.

    Attributes:
        mode: none; tis (truncated importance sampling) weighs a token by min(exp(old_logp - rollout_logp), cap); icepop
            weighs it by that ratio and drops tokens whose ratio leaves [low, high]; sequence_mask drops trajectories
            whose geometric mean ratio does.
        cap: of tis.
        low, high: bounds of icepop and sequence_mask.
    """

    mode: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    cap: float = 2.0
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.cap < 1 or not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                "algorithm.rollout_correction needs cap >= 1 and low <= 1 <= high, "
                f"got cap={self.cap}, low={self.low}, high={self.high}."
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """``algorithm.*``: how rewards become advantages.

    Attributes:
        adv_estimator: grpo, rloo, reinforce_plus_plus or gigpo.
        norm_adv_by_std_in_grpo: divide by the group's standard deviation (GRPO); False is the Dr. GRPO / Dr. BoT form.
        gamma: discount of step returns inside a trajectory (gigpo).
        use_kl_in_reward: subtract ``kl_ctrl.kl_coef`` times a trajectory's summed KL to the reference from its reward.
        kl_penalty: estimator of that KL, a name of :data:`spear_megatron.algorithms.kl.KL_KINDS`.
        use_toolcall_reward: intrinsic reward for tool calls: none, constant, or cosine, which fades out.
        max_toolcall_steps: step T_d at which the cosine tool-call reward has faded to 0.
        toolcall_reward_form: per_turn gives 0.1 for each turn with a call, per_call 0.1 for each call that was run,
            any_if_correct (the Qwen3 form) solved trajectories 1 for using the tool at all and others as per_turn.
        toolcall_reward_max: most that the tool calls of one trajectory can earn, before the schedule.
        format_reward: reward of a trajectory without an invalid action (the paper's figure has 0.1; 0 is off).
        filter_overlong_responses: trajectories that hit the length or turn limit carry no loss.
        filter_incomplete_responses: nor do those whose last turn has neither an answer nor a tool call (void turns).
        filter_repetitive_responses: nor those in which one 20-gram of sampled tokens occurs 10 times.
        filter_unreadable_responses: nor those whose sampled text holds undecodable characters.
        filtered_in_statistics: trajectories filtered so still count in group means, deviations and P50.
        singleton_advantage: advantage of the only valid member of its group: zero, or reward as in the released code.
    """

    adv_estimator: str = "grpo"
    norm_adv_by_std_in_grpo: bool = True
    gamma: float = 1.0
    gigpo: GigpoConfig = field(default_factory=GigpoConfig)
    use_kl_in_reward: bool = False
    kl_penalty: str = "kl"
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)
    use_toolcall_reward: Literal["none", "constant", "cosine"] = "none"
    max_toolcall_steps: int = 100
    toolcall_reward_form: Literal["per_turn", "per_call", "any_if_correct"] = "per_turn"
    toolcall_reward_max: float = 1.0
    format_reward: float = 0.0
    filter_overlong_responses: bool = False
    filter_incomplete_responses: bool = False
    filter_repetitive_responses: bool = False
    filter_unreadable_responses: bool = False
    filtered_in_statistics: bool = True
    singleton_advantage: Literal["zero", "reward"] = "zero"
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    def __post_init__(self) -> None:
        if self.adv_estimator not in ESTIMATORS:
            raise ValueError(
                f"algorithm.adv_estimator is {self.adv_estimator!r}; use one of {', '.join(ESTIMATORS)}."
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"algorithm.gamma is a discount between 0 and 1, got {self.gamma}.")
        if self.max_toolcall_steps < 1:
            raise ValueError(f"algorithm.max_toolcall_steps must be at least 1, got {self.max_toolcall_steps}.")
        for name in ("toolcall_reward_max", "format_reward"):
            if getattr(self, name) < 0:
                raise ValueError(f"algorithm.{name} must not be negative, got {getattr(self, name)}.")
        check_kl_kind("algorithm.kl_penalty", self.kl_penalty)


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """``actor_rollout_ref.actor.policy_loss.*``: the surrogate and its covariance regularisation (arXiv 2505.22617).

    Attributes:
        loss_mode: vanilla, clip-cov, kl-cov or gpg (underscores are read too).
        loss_mode_replay: the same for replayed trajectories; null takes loss_mode.
        clip_cov_ratio: share of all sampled tokens that lose their gradient (clip-cov).
        clip_cov_lb, clip_cov_ub: only tokens whose covariance lies between are candidates.
        kl_cov_ratio: share of all sampled tokens, those of largest covariance, that get the KL penalty (kl-cov).
        clip_cov_ratio_replay, clip_cov_lb_replay, clip_cov_ub_replay: clip-cov on replayed tokens.
        kl_cov_ratio_replay: kl-cov on replayed tokens.
        ppo_kl_coef: coefficient of the kl-cov penalty.
        cov_scope: mini_batch selects once per optimizer step, over all ranks; micro_batch inside the loss, per
            micro-batch and rank, as the released code does (the selection then depends on the packing).
        clip_cov_bounds: fixed takes the bounds as they are; quantile takes the quantiles below of the step's tokens.
        clip_cov_lb_quantile, clip_cov_ub_quantile: bounds as quantiles of the covariance.
    """

    loss_mode: str = "vanilla"
    loss_mode_replay: str | None = None
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    clip_cov_ratio_replay: float = 0.02
    clip_cov_lb_replay: float = 1.0
    clip_cov_ub_replay: float = 40.0
    kl_cov_ratio_replay: float = 0.02
    ppo_kl_coef: float = 0.1
    cov_scope: Literal["mini_batch", "micro_batch"] = "mini_batch"
    clip_cov_bounds: Literal["fixed", "quantile"] = "fixed"
    clip_cov_lb_quantile: float = 0.8
    clip_cov_ub_quantile: float = 0.9998

    def __post_init__(self) -> None:
        for name in ("loss_mode", "loss_mode_replay"):
            value = getattr(self, name)
            if value is None and name == "loss_mode_replay":
                continue
            if value not in _MODES:
                raise ValueError(f"{_POLICY}.{name} is {value!r}; use one of vanilla, clip-cov, kl-cov, gpg.")
            object.__setattr__(self, name, _MODES[value])
        for name in ("clip_cov_ratio", "kl_cov_ratio", "clip_cov_ratio_replay", "kl_cov_ratio_replay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{_POLICY}.{name} is a share between 0 and 1, got {getattr(self, name)}.")
        for suffix in ("", "_replay"):
            low, high = getattr(self, f"clip_cov_lb{suffix}"), getattr(self, f"clip_cov_ub{suffix}")
            if not low < high:
                raise ValueError(f"{_POLICY}.clip_cov_lb{suffix}={low} must be below clip_cov_ub{suffix}={high}.")
        if not 0 <= self.clip_cov_lb_quantile < self.clip_cov_ub_quantile <= 1:
            raise ValueError(
                f"{_POLICY}.clip_cov_lb_quantile={self.clip_cov_lb_quantile} and clip_cov_ub_quantile="
                f"{self.clip_cov_ub_quantile} must be ascending quantiles between 0 and 1."
            )
        if self.ppo_kl_coef < 0:
            raise ValueError(f"{_POLICY}.ppo_kl_coef must not be negative, got {self.ppo_kl_coef}.")

    def mode(self, *, replayed: bool) -> str:
        """vanilla, clip_cov, kl_cov or gpg, for on-policy or for replayed trajectories."""
        return (self.loss_mode_replay if replayed else None) or self.loss_mode
