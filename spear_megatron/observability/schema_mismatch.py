"""Metrics of the gate between rollouts and update: d is the trainer's minus the engine's log-prob of a sampled token.

Measured once per step, before any update of it. All but the lags are over tokens of the current policy version.
"""

from __future__ import annotations

from spear_megatron.observability.schema_types import Metric

MISMATCH: tuple[Metric, ...] = (
    Metric("mismatch/tokens", "sampled tokens of the current policy version that were compared", "tokens"),
    Metric("mismatch/abs_diff_mean", "|d|, mean; what the gate's warn and stop bound", "nats"),
    Metric("mismatch/abs_diff_max", "|d|, largest", "nats"),
    Metric("mismatch/k3", "KL(engine, trainer) per token by the k3 estimator, exp(d) - 1 - d", "nats"),
    Metric("mismatch/ratio_mean", "probability by trainer over that by engine, mean", "ratio"),
    Metric("mismatch/ratio_max", "probability by trainer over that by engine, largest", "ratio"),
    Metric("mismatch/over_bound", "tokens with |d| above the token bound", "fraction"),
    Metric("mismatch/warned", "1 where the mean of |d| was above the bound to warn at, else 0", "flag"),
    Metric("mismatch/turn_<turn>", "|d| of the trajectories' turn 1 to 8, or 9plus, mean", "nats"),
    Metric("mismatch/position_<range>", "|d| of tokens at these places after the segment's prompt, mean", "nats"),
    Metric("mismatch/lag_<lag>", "|d| of tokens sampled by weights so many versions old, 0 to 3plus, mean", "nats"),
)
