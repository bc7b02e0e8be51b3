"""From reward parts to the one number that advantages compare (method: R_i = S_i + mu(t) * u_i + p_i).

The bonus for tool calls is SPEAR's intrinsic reward (arXiv 2509.22601); 0.1 per call is its constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from spear_megatron.types import RewardParts

_PER_TOOL_CALL = 0.1


@dataclass(frozen=True, slots=True)
class RewardRule:
    """How parts become a reward.

    Attributes:
        form: per_turn counts model turns with a tool call, per_call the calls that were run; any_if_correct gives a
            solved trajectory 1 for using the tool at all, whatever the cap, and others the per_turn bonus.
        cap: most that counted calls can earn, before the schedule.
        format_reward: for a trajectory without an invalid action.
        invalid_action_penalty: subtracted per invalid action; 0 is off.
    """

    form: str
    cap: float
    format_reward: float
    invalid_action_penalty: float


def base_reward(parts: RewardParts, rule: RewardRule) -> float:
    """What does not depend on the step: outcome, penalty, format reward and the price of invalid actions."""
    well_formed = rule.format_reward if parts.num_invalid_actions == 0 else 0.0
    return parts.outcome + parts.penalty + well_formed - rule.invalid_action_penalty * parts.num_invalid_actions


def tool_bonus(parts: RewardParts, rule: RewardRule) -> float:
    """Bonus u for tool calls, at full coefficient.

    Raises:
        ValueError: unknown ``rule.form``.
    """
    if rule.form == "per_call":
        return min(rule.cap, _PER_TOOL_CALL * parts.num_tool_calls)
    if rule.form == "any_if_correct" and parts.success:
        return 1.0 if parts.num_tool_turns >= 1 else 0.0
    if rule.form in ("per_turn", "any_if_correct"):
        return min(rule.cap, _PER_TOOL_CALL * parts.num_tool_turns)
    raise ValueError(
        f"algorithm.toolcall_reward_form is {rule.form!r}; use one of per_turn, per_call, any_if_correct."
    )


def shaped_reward(parts: RewardParts, rule: RewardRule, coefficient: float) -> float:
    """Reward at today's ``coefficient`` mu of the tool bonus; the parts themselves stay as they are.

    Linear in the coefficient by construction, so that replay can recompose a stored reward for any later step.
    """
    return base_reward(parts, rule) + coefficient * tool_bonus(parts, rule)
