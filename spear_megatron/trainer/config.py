"""Keys of ``actor_rollout_ref.actor.*``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spear_megatron.algorithms.aggregation import AGGREGATION_MODES
from spear_megatron.algorithms.config import PolicyLossConfig
from spear_megatron.algorithms.kl import check_kl_kind
from spear_megatron.parallel.config import MegatronConfig
from spear_megatron.replay.config import ReplayConfig

_PREFIX = "actor_rollout_ref.actor"
_DECAY_STYLES = ("constant", "linear", "cosine")
_KERNELS = ("auto", "eager")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """``actor_rollout_ref.actor.optim.*``: AdamW and its learning-rate schedule, counted in optimizer steps.

    Attributes:
        lr: peak learning rate. weight_decay: decoupled, on matrices only. betas: of Adam.
        clip_grad: bound of the global gradient norm; 0 does not clip.
        lr_warmup_steps: linear rise from lr / lr_warmup_steps.
        lr_decay_style: constant, linear or cosine, down to ``min_lr`` at the last step of the run.
    """

    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    lr_warmup_steps: int = 0
    lr_decay_style: str = "constant"
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"{_PREFIX}.optim.lr must be positive, got {self.lr}.")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"{_PREFIX}.optim.min_lr must lie between 0 and lr, got {self.min_lr}.")
        if self.weight_decay < 0 or self.clip_grad < 0 or self.lr_warmup_steps < 0:
            raise ValueError(f"{_PREFIX}.optim.weight_decay, clip_grad and lr_warmup_steps must not be negative.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{_PREFIX}.optim.betas must be two numbers in [0, 1), got {list(self.betas)}.")
        if self.lr_decay_style not in _DECAY_STYLES:
            raise ValueError(
                f"{_PREFIX}.optim.lr_decay_style is {self.lr_decay_style!r}; use one of {', '.join(_DECAY_STYLES)}."
            )


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """``actor_rollout_ref.actor.*``: the policy update.

    Attributes:
        ppo_mini_batch_size: prompts of one optimizer step. ppo_epochs: passes over a step's rows.
        ppo_max_token_len_per_gpu: token budget of one packed micro-batch.
        clip_ratio: PPO clip range; ``clip_ratio_low`` and ``clip_ratio_high`` replace it on their side when set.
        clip_ratio_c: dual-clip bound for negative advantages.
        loss_agg_mode: a name of :data:`spear_megatron.algorithms.aggregation.AGGREGATION_MODES`; the seq-means are over
            trajectories, all segments of one together.
        entropy_coeff: weight of the entropy bonus, the mean over sampled tokens.
        use_kl_loss, kl_loss_coef, kl_loss_type: KL to the initial weights in the loss, aggregated like the surrogate.
        kernels: ``auto`` takes the compiled kernels where they serve, ``eager`` plain torch.
        max_logits_mb: the logits of a micro-batch's sampled tokens are kept for the backward pass up to so many MiB on
            each rank; beyond it, slices of the vocabulary are computed twice (a third more time in the LM head).
        loss_rows: what a row of the seq-means is: a whole trajectory, or one segment of it.
        sum_norm_denominator: rows divides seq-mean-token-sum-norm by rows * length; micro_batch_share weighs a row by
            the rows of its micro-batch over those of the mini-batch, as the released code does (depends on packing).
        old_log_prob: trainer computes the log-probs of the ratio's denominator before the update; rollout takes the
            engine's, and needs no pass.
        use_invalid_action_penalty: subtract invalid_action_penalty_coef for every turn without a usable action.
        invalid_action_penalty_coef: of that penalty.
        enable_trajectory_replay: self-imitation of replayed good trajectories (SPEAR).
        trajectory_buffer_size: N_D, trajectories of the replay buffer over all ranks.
        trajectory_score_threshold: only trajectories with an advantage above it enter the buffer.
        trajectory_tolerate_steps: trajectories older than this many training steps leave the buffer.
        replay_loss_coef: final coefficient c of the self-imitation term.
        max_replay_loss_steps: step T_w at which the self-imitation term has faded in to its full coefficient.
        weight_decay_trajectory_replay: w <= 0 or w > 1 recalibrates replayed advantages against P50; 0 < w <= 1
            multiplies the stored ones by w instead.
        baseline_buffer_size: latest group means of which P50 is the median.
    """

    ppo_mini_batch_size: int = 64
    ppo_epochs: int = 1
    ppo_max_token_len_per_gpu: int = 16384
    clip_ratio: float = 0.2
    clip_ratio_low: float | None = None
    """PPO clip range below 1; null takes clip_ratio."""
    clip_ratio_high: float | None = None
    """PPO clip range above 1; null takes clip_ratio."""
    clip_ratio_c: float = 3.0
    loss_agg_mode: str = "token-mean"
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    kernels: str = "auto"
    max_logits_mb: int = 2048
    loss_rows: Literal["trajectory", "segment"] = "trajectory"
    sum_norm_denominator: Literal["rows", "micro_batch_share"] = "rows"
    old_log_prob: Literal["trainer", "rollout"] = "trainer"
    use_invalid_action_penalty: bool = False
    invalid_action_penalty_coef: float = 0.1
    enable_trajectory_replay: bool = False
    trajectory_buffer_size: int = 2048
    trajectory_score_threshold: float = 0.0
    trajectory_tolerate_steps: int = 10
    replay_loss_coef: float = 1.0
    max_replay_loss_steps: int = 200
    weight_decay_trajectory_replay: float = -1.0
    baseline_buffer_size: int = 10240
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    def __post_init__(self) -> None:
        positive = ("trajectory_buffer_size", "max_replay_loss_steps", "baseline_buffer_size")
        for name in ("ppo_mini_batch_size", "ppo_epochs", "ppo_max_token_len_per_gpu", "max_logits_mb", *positive):
            if getattr(self, name) < 1:
                raise ValueError(f"{_PREFIX}.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{_PREFIX}.{name} must not be negative, got {value}.")
        if self.clip_ratio_c <= 1.0:
            raise ValueError(f"{_PREFIX}.clip_ratio_c must be larger than 1, got {self.clip_ratio_c}.")
        if self.loss_agg_mode not in AGGREGATION_MODES:
            raise ValueError(
                f"{_PREFIX}.loss_agg_mode is {self.loss_agg_mode!r}; use one of {', '.join(AGGREGATION_MODES)}."
            )
        for name in ("trajectory_tolerate_steps", "replay_loss_coef", "invalid_action_penalty_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_PREFIX}.{name} must not be negative, got {getattr(self, name)}.")
        if self.kl_loss_coef < 0:
            raise ValueError(f"{_PREFIX}.kl_loss_coef must not be negative, got {self.kl_loss_coef}.")
        check_kl_kind(f"{_PREFIX}.kl_loss_type", self.kl_loss_type)
        if self.kernels not in _KERNELS:
            raise ValueError(f"{_PREFIX}.kernels is {self.kernels!r}; use one of {', '.join(_KERNELS)}.")

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
        low = self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low
        high = self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
        return low, high
