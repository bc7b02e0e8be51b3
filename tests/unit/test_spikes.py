"""Optimizer steps far above the usual: against a plain reference, over restarts, and with every action."""

from __future__ import annotations

import math
from random import Random

import pytest

from spear_megatron.trainer.parts import Progress
from spear_megatron.trainer.spikes import SpikeRule
from spear_megatron.trainer.watch_config import LossSpikeConfig, ProfileConfig


def reference(values: list[float], factor: float, window: int, patience: int) -> list[bool]:
    """Whether the rule acts at each value: sorted middle of the values before, counted by hand."""
    acts, run = [], 0
    for position, value in enumerate(values):
        before = sorted(values[max(0, position - window) : position])
        if len(before) < max(4, window // 4):
            acts.append(False)
            continue
        half = len(before) // 2
        median = before[half] if len(before) % 2 else (before[half - 1] + before[half]) / 2
        run = run + 1 if value > factor * median else 0
        acts.append(run >= patience)
    return acts


@pytest.mark.parametrize("seed", range(8))
def test_the_rule_agrees_with_a_plain_reference_also_when_interrupted(seed: int) -> None:
    random = Random(seed)
    values = [random.lognormvariate(0, 1.5) for _ in range(120)]
    factor, window, patience = random.choice([2.0, 5.0]), random.choice([4, 9, 32]), random.choice([1, 2])
    config = LossSpikeConfig(action="skip", factor=factor, window=window, patience=patience)
    progress, acts = Progress(), []
    for value in values:
        progress = Progress(**vars(progress))  # what a checkpoint carries
        acts.append(not SpikeRule(config, progress).judge(1, 0.0, value).apply)
    assert acts == reference(values, factor, window, patience) and any(acts)


@pytest.mark.parametrize("action", ["off", "warn", "skip", "stop"])
def test_actions(action: str) -> None:
    progress = Progress()
    rule = SpikeRule(LossSpikeConfig(action=action, window=4), progress)  # type: ignore[arg-type]
    for _ in range(4):
        assert rule.judge(1, 0.1, 1.0).text is None
    verdict = rule.judge(5, 0.1, 30.0)
    assert verdict.apply == (action in ("off", "warn")) and (verdict.text is None) == (action == "off")
    assert progress.loss_spikes == (action != "off")
    if verdict.text is not None:
        assert "step 5: grad_norm 30 is above 10 times its running median 1" in verdict.text


def test_what_stays_high_becomes_the_usual() -> None:
    rule = SpikeRule(LossSpikeConfig(action="skip", window=8), Progress())
    applied = [rule.judge(1, 0.0, 1.0).apply for _ in range(8)] + [rule.judge(1, 0.0, 50.0).apply for _ in range(8)]
    assert applied == [True] * 8 + [False] * 4 + [True] * 4


def test_the_loss_counts_by_its_size_and_a_median_of_zero_divides_nothing() -> None:
    rule = SpikeRule(LossSpikeConfig(action="skip", metric="loss", window=4), Progress())
    for _ in range(4):
        rule.judge(1, 0.0, 1.0)
    assert rule.judge(1, 0.0, 1.0).apply
    verdict = rule.judge(1, -5.0, 1.0)
    assert not verdict.apply and verdict.ratio == math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"factor": 1.0}, "factor"), ({"window": 3}, "window"), ({"patience": 0}, "patience")],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.loss_spike.{message}"):
        LossSpikeConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [(1,), (0, 2), (3, 3), (1, 2, 3)])
def test_bad_profile_windows_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="trainer.profile.steps"):
        ProfileConfig(steps=steps)
