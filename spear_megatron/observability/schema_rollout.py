"""Metrics of over-sampled and asynchronous rollouts."""

from __future__ import annotations

from spear_megatron.observability.schema_types import Metric

OVERSAMPLING = (
    Metric("oversampling/groups_started", "task groups that were started for the step", "groups"),
    Metric("oversampling/groups_complete", "task groups that were complete when the leaders stopped", "groups"),
    Metric("oversampling/groups_unfinished", "started groups that were stopped before their end", "groups"),
    Metric("oversampling/groups_surplus", "complete groups that the step did not need", "groups"),
    Metric("oversampling/prompts_returned", "prompts that come first in the next step, unstarted ones too", "prompts"),
    Metric("oversampling/tokens_dropped", "sampled tokens of the step that belong to no accepted group", "fraction"),
    Metric(
        "oversampling/response_length_started",
        "sampled tokens per started trajectory, stopped ones as far as they got: stopping early favours short ones",
        "tokens",
    ),
    Metric("oversampling/response_length_accepted", "sampled tokens per accepted trajectory", "tokens"),
    *(
        Metric(
            f"oversampling/finished_share_q{quarter}",
            f"started trajectories that ended, among those in quarter {quarter} of the response budget",
            "fraction",
        )
        for quarter in range(1, 5)
    ),
    Metric("partial/groups_held", "stopped or surplus groups that go on in a later step with what they have", "groups"),
    Metric("partial/groups_expired", "such groups that start anew: they were carried over often enough", "groups"),
    Metric("partial/episodes_resumed", "episodes that went on from where an earlier step stopped them", "episodes"),
    Metric("partial/episodes_restarted", "episodes whose tokens were thrown away: they start again", "episodes"),
    Metric("partial/tokens_carried", "sampled tokens of accepted groups that come from earlier steps", "fraction"),
)

ASYNC = (
    Metric("staleness/mean", "updates between the weights that sampled a token and those that train on it", "steps"),
    Metric("staleness/max", "the same, of the oldest token of the step", "steps"),
    Metric("staleness/mixed_trajectories", "trajectories whose tokens come from several versions", "fraction"),
    Metric("timing_s/gen_ahead", "rollouts of this step, which went on while the step before trained", "s"),
)
