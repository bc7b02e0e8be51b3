"""The root of the configuration: every component's own dataclass under the key names of verl and SPEAR."""

from __future__ import annotations

from dataclasses import dataclass, field

from spear_megatron.algorithms.config import AlgorithmConfig
from spear_megatron.data.prompts import DataConfig
from spear_megatron.environments.config import EnvironmentConfig
from spear_megatron.model.config import ModelConfig
from spear_megatron.rewards.registry import RewardConfig
from spear_megatron.rollout.config import RolloutConfig
from spear_megatron.trainer.config import ActorConfig
from spear_megatron.trainer.run_config import SFTConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ActorRolloutRefConfig:
    """``actor_rollout_ref.*``: the model, how it is updated and how it is sampled."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
