"""Settings of the rollout: training samples the whole distribution, evaluation may restrict it."""

from __future__ import annotations

from typing import Any

import pytest

from spear_megatron.rollout.config import MultiTurnConfig, RolloutConfig, ValKwargsConfig


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (RolloutConfig, {"top_p": 0.9}, r"rollout\.top_p=0\.9 .*val_kwargs\.top_p"),
        (RolloutConfig, {"top_k": 50}, r"rollout\.top_k=50"),
        (RolloutConfig, {"temperature": 0.0}, "greedy"),
        (RolloutConfig, {"temperature": float("nan")}, r"rollout\.temperature"),
        (RolloutConfig, {"name": "vllm"}, "'vllm' is not an engine"),
        (RolloutConfig, {"n": 0}, r"rollout\.n must"),
        (RolloutConfig, {"max_num_seqs": True}, "max_num_seqs"),
        (RolloutConfig, {"max_model_len": -1}, "max_model_len"),
        (MultiTurnConfig, {"max_assistant_turns": 0}, r"multi_turn\.max_assistant_turns"),
        (MultiTurnConfig, {"max_tool_response_length": 0}, r"multi_turn\.max_tool_response_length"),
        (ValKwargsConfig, {"top_p": 0.0}, r"val_kwargs\.top_p"),
        (ValKwargsConfig, {"top_k": 0}, r"val_kwargs\.top_k"),
        (ValKwargsConfig, {"n": 4, "temperature": 0.0}, "all equal"),
        (ValKwargsConfig, {"temperature": -1.0}, r"val_kwargs\.temperature"),
    ],
)
def test_errors_name_the_key(kind: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**values)


def test_evaluation_may_restrict() -> None:
    config = RolloutConfig(val_kwargs=ValKwargsConfig(n=4, temperature=0.6, top_p=0.95, top_k=20))
    assert (config.top_p, config.top_k, config.val_kwargs.top_k) == (1.0, -1, 20)
