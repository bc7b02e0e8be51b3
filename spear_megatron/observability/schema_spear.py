"""Metrics of SPEAR: coefficients, replay, covariance selection, filters, off-policy correction."""

from __future__ import annotations

from spear_megatron.observability.schema_types import Metric

_SCHEDULES = (
    Metric("spear/mu", "coefficient of the tool-call bonus in the reward", "ratio"),
    Metric("spear/gamma", "coefficient of the self-imitation term in the loss", "ratio"),
)

_BUFFER = (
    Metric("replay/stored", "trajectories in the buffer at the end of the step, all ranks", "trajectories"),
    Metric("replay/bytes", "what they take up, all ranks", "bytes"),
    Metric("replay/pushed", "trajectories that entered the buffer", "trajectories"),
    Metric(
        "replay/rejected/<rule>",
        "trajectories that this rule kept out of the buffer: advantage (not above the threshold) or requirement",
        "trajectories",
    ),
    Metric("replay/expired", "trajectories that left the buffer for their age", "trajectories"),
    Metric("replay/evicted", "trajectories that left the buffer for its capacity, the oldest first", "trajectories"),
)

_REPLAY = (
    Metric("replay/trigger", "trajectories that must be stored, or qualify, before replay starts", "trajectories"),
    Metric("replay/qualifying", "stored trajectories whose recalibrated advantage is positive", "trajectories"),
    Metric("replay/non_positive", "stored trajectories whose recalibrated advantage is not positive", "trajectories"),
    Metric("replay/p50", "baseline of the recalibration: median of the groups' mean rewards", "reward"),
    Metric("replay/p50_std", "median of the groups' standard deviations of the reward", "reward"),
    Metric("replay/replayed", "trajectories that the step replays", "trajectories"),
    Metric("replay/tokens", "sampled tokens of the replayed trajectories", "tokens"),
    Metric("replay/token_share", "replayed among all sampled tokens of the update", "fraction"),
    Metric("replay/age_mean", "steps since the replayed trajectories were sampled, mean", "steps"),
    Metric("replay/age_max", "steps since the replayed trajectories were sampled, largest", "steps"),
    Metric("replay/advantage_mean", "recalibrated advantage of the replayed trajectories, mean", "reward"),
    Metric("replay/pg_loss", "self-imitation part of the loss, before its coefficient gamma", "reward"),
    Metric("replay/grad_norm", "gradient norm of optimizer steps on replayed trajectories alone", "norm"),
    Metric("replay/clipfrac", "replayed tokens whose clipped surrogate was the active one", "fraction"),
    Metric("replay/ratio_mean", "probability now over that when sampled, of replayed tokens, mean", "ratio"),
    Metric("replay/ratio_max", "probability now over that when sampled, of replayed tokens, largest", "ratio"),
)


def _covariance(prefix: str, tokens: str) -> tuple[Metric, ...]:
    return (
        Metric(f"cov/{prefix}candidates", f"{tokens} whose covariance lies between the bounds", "tokens"),
        Metric(f"cov/{prefix}selected", f"{tokens} that the covariance rule took: clip-cov cuts their gradient, "
               "kl-cov adds a KL penalty", "tokens"),
        Metric(f"cov/{prefix}near_bound", f"{tokens} whose covariance lies within 1e-5 of a bound", "tokens"),
    )  # fmt: skip


_FILTERS = (
    Metric(
        "filter/<reason>",
        "trajectories that carry no loss for this reason: overlong, incomplete, repetitive, unreadable or mismatch",
        "fraction",
    ),
    Metric("filter/groups_dropped", "task groups left out of the update", "groups"),
    Metric("filter/gen_batches", "batches of prompts that dynamic sampling took for the step", "batches"),
    Metric("correction/weight_mean", "weight of the off-policy correction, mean over sampled tokens", "ratio"),
    Metric("correction/dropped", "sampled tokens that icepop or the sequence mask removed", "fraction"),
    Metric("advantage/step_mean_abs", "mean |step advantage| of gigpo over the segments", "reward"),
)

SPEAR: tuple[Metric, ...] = (
    *_SCHEDULES, *_BUFFER, *_REPLAY, *_covariance("", "on-policy tokens"), *_covariance("replay_", "replayed tokens"),
    *_FILTERS,
)  # fmt: skip
