"""Contract checks that a user's environment, reward or engine can be put through before a run."""

from spear_megatron.testing.contract import ContractError
from spear_megatron.testing.engine import check_engine
from spear_megatron.testing.environment import check_environment
from spear_megatron.testing.reward import check_reward

__all__ = ["ContractError", "check_engine", "check_environment", "check_reward"]
