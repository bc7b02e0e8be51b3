"""Keys of ``algorithm.*``."""

from __future__ import annotations

from dataclasses import dataclass, field

from spear_megatron.algorithms.kl import check_kl_kind


@dataclass(frozen=True, kw_only=True)
class KlCtrlConfig:
    """``algorithm.kl_ctrl.*``: the coefficient of the KL penalty that ``use_kl_in_reward`` puts into the reward."""

    kl_coef: float = 0.001
    """Coefficient of the KL penalty that use_kl_in_reward puts into the reward."""

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"algorithm.kl_ctrl.kl_coef is {self.kl_coef}; use a coefficient of 0 or more.")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """``algorithm.*``: how rewards become advantages.

    Attributes:
        adv_estimator: ``grpo``.
        norm_adv_by_std_in_grpo: divide by the group's standard deviation (GRPO); False is the Dr. GRPO / Dr. BoT form.
        use_kl_in_reward: subtract ``kl_ctrl.kl_coef`` times a trajectory's summed KL to the reference from its reward.
        kl_penalty: estimator of that KL, a name of :data:`spear_megatron.algorithms.kl.KL_KINDS`.
    """

    adv_estimator: str = "grpo"
    norm_adv_by_std_in_grpo: bool = True
    use_kl_in_reward: bool = False
    kl_penalty: str = "kl"
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)

    def __post_init__(self) -> None:
        if self.adv_estimator != "grpo":
            raise ValueError(f"algorithm.adv_estimator is {self.adv_estimator!r}; the supported value is 'grpo'.")
        check_kl_kind("algorithm.kl_penalty", self.kl_penalty)
