"""The per-step record: every metric's name, meaning and unit. Names are verl's where verl has one.

A line of ``metrics.jsonl`` is one JSON object: ``schema_version``, ``step`` (1-based; 0 before training), ``unix_time``
(seconds), then metrics by name. A value that is not finite is written as null.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from spear_megatron.observability.schema_mismatch import MISMATCH
from spear_megatron.observability.schema_rollout import ASYNC, OVERSAMPLING
from spear_megatron.observability.schema_spear import SPEAR
from spear_megatron.observability.schema_types import Metric, spread

SCHEMA_VERSION = 1
HEADER_KEYS = ("schema_version", "step", "unix_time")


_ACTOR = (
    Metric("actor/loss", "total loss of the update: policy, entropy and KL terms", "nats"),
    Metric("actor/pg_loss", "policy-gradient part of the loss", "reward"),
    Metric("actor/pg_clipfrac", "tokens whose clipped surrogate was the active one", "fraction"),
    Metric("actor/pg_clipfrac_lower", "tokens cut by the dual clip (negative advantage)", "fraction"),
    Metric("actor/ppo_kl", "mean of old_logp - logp over response tokens", "nats"),
    Metric("actor/entropy", "mean entropy of the policy over response tokens, before the update", "nats"),
    Metric("actor/kl_loss", "mean KL estimate to the reference policy in the loss", "nats"),
    Metric("actor/reward_kl_penalty", "KL penalty per trajectory: coefficient times its KL over all tokens", "reward"),
    Metric("actor/grad_norm", "global norm of the gradient before clipping, mean over optimizer steps", "norm"),
    Metric("actor/lr", "learning rate, mean over optimizer steps", "ratio"),
    Metric("actor/ref_kl", "mean KL estimate to the reference policy over response tokens", "nats"),
    Metric("actor/tokens", "response tokens of one optimizer step", "tokens"),
    Metric("sft/loss", "mean cross-entropy over trained tokens", "nats"),
    Metric("sft/grad_norm", "global norm of the gradient before clipping", "norm"),
    Metric("sft/lr", "learning rate of the step", "ratio"),
    Metric("sft/tokens", "trained tokens of the step", "tokens"),
)

_ROLLOUT = (
    *spread("critic/rewards", "composed reward per trajectory", "reward"),
    *spread("critic/score", "outcome reward per trajectory, without bonus or penalty", "reward"),
    *spread("critic/advantages", "advantage per trajectory", "reward"),
    Metric("reward/outcome_mean", "outcome reward per trajectory, before bonus and penalties", "reward"),
    Metric("reward/bonus_mean", "tool-call bonus per trajectory, times its coefficient mu", "reward"),
    Metric("reward/invalid_mean", "turns without a usable action per trajectory", "turns"),
    Metric("reward/penalty_mean", "penalties (format, invalid action) per trajectory", "reward"),
    Metric("success/mean", "trajectories that solved their task", "fraction"),
    Metric("groups/zero_variance", "task groups whose rewards are all equal: no learning signal", "fraction"),
    *spread("response_length", "sampled tokens per trajectory", "tokens"),
    Metric("response_length/clip_ratio", "trajectories that used up the response budget", "fraction"),
    *spread("prompt_length", "tokens of the opening prompt", "tokens"),
    *spread("num_turns", "model turns per trajectory", "turns"),
    Metric("tools/calls_mean", "tool calls per trajectory", "calls"),
    Metric("tools/turns_mean", "model turns with at least one tool call per trajectory", "turns"),
    Metric("tools/failures_mean", "tool calls that failed (error, time-out, bad arguments) per trajectory", "calls"),
    Metric("stop/<reason>", "trajectories that ended for this reason", "fraction"),
)

_TRAINING = (
    Metric("training/rollout_probs_diff/mean", "mean |probability by engine - by trainer| of sampled tokens", "ratio"),
    Metric("training/rollout_logp_abs_diff/mean", "mean |log-prob by engine - by trainer| of sampled tokens", "nats"),
    Metric("training/rollout_logp_abs_diff/max", "largest |log-prob by engine - by trainer| of sampled tokens", "nats"),
    Metric("training/num_trajectories", "trajectories that count, without infrastructure failures", "trajectories"),
    Metric("training/num_groups", "task groups with at least one trajectory that counts", "groups"),
    Metric("training/num_optimizer_steps", "optimizer steps taken in this step", "steps"),
    Metric("training/skipped_steps", "optimizer steps skipped so far because nothing was left to learn from", "steps"),
    Metric("training/nonfinite_steps", "optimizer steps skipped so far for a non-finite loss or gradient", "steps"),
    Metric("training/loss_spikes", "optimizer steps so far above trainer.loss_spike.factor times the usual", "steps"),
    Metric("training/spike_ratio", "largest trainer.loss_spike.metric of the step over its running median", "ratio"),
    Metric("training/trajectories_lost", "ranks whose trajectories of the step could not be written", "ranks"),
    Metric("training/policy_version", "version of the weights that sampled this step", "version"),
)

_TIMING = (
    Metric("timing_s/gen", "rollouts, tools and rewards included; with trainer.async=1 the wait for them", "s"),
    Metric("timing_s/old_log_prob", "trainer log-probs before the update", "s"),
    Metric("timing_s/ref", "reference log-probs", "s"),
    Metric("timing_s/adv", "advantages", "s"),
    Metric("timing_s/filter", "sample and group filters", "s"),
    Metric("timing_s/replay", "replay before the update: expiry, recalibration, choice, moving trajectories", "s"),
    Metric("timing_s/push", "replay after the update: choice and storage of good trajectories", "s"),
    Metric("timing_s/pack", "packing and balancing over ranks", "s"),
    Metric("timing_s/update_actor", "forward, backward and optimizer", "s"),
    Metric("timing_s/publish", "weights from trainer to engine", "s"),
    Metric("timing_s/save", "checkpoints since the previous record: a record stands before its step's save", "s"),
    Metric("timing_s/testing", "evaluation", "s"),
    Metric("timing_s/step", "the whole step, all phases and what lies between", "s"),
)

_PERF = (
    Metric("perf/total_num_tokens", "tokens of the step, prompts and responses", "tokens"),
    Metric("perf/response_tokens", "sampled tokens of the step", "tokens"),
    Metric("perf/throughput", "tokens of the step per second and rank", "tokens/s"),
    Metric("perf/gen_throughput", "sampled tokens per second of rollouts, all ranks", "tokens/s"),
    Metric("perf/update_throughput", "tokens per second of the update, all ranks", "tokens/s"),
    Metric("perf/imbalance", "largest load of a data-parallel rank over the mean, minus 1", "ratio"),
    Metric("perf/straggler/<phase>", "own seconds of the slowest rank over the median rank, without waits", "ratio"),
    Metric("perf/slowest_rank/<phase>", "the rank with the most seconds of its own in the phase", "rank"),
    Metric("perf/memory/<phase>", "largest peak of a rank: CUDA allocator, or resident set without a device", "MiB"),
)

_FIGURES = (
    ("attempts", "requests sent to a server, repeated ones included", "requests"),
    ("sampled_tokens", "tokens of complete answers", "tokens"),
    ("prompt_tokens", "prompt tokens of complete answers", "tokens"),
    ("cached_tokens", "prompt tokens found in a server's prefix cache", "tokens"),
    ("aborted", "requests that were aborted", "requests"),
    ("lost", "attempts without an answer that could be used", "requests"),
)

_ENGINE = (
    Metric("engine/requests", "requests of the agent loop to SGLang servers", "requests"),
    Metric("engine/retries", "requests sent again after a server failed", "requests"),
    Metric("engine/moved_sessions", "conversations that went to another server than before", "trajectories"),
    Metric("engine/servers_down", "servers that do not answer, summed over the leaders that see it", "servers"),
    Metric("weights/servers", "servers that took the weights of the step, checked", "servers"),
    Metric("weights/stale_servers", "servers without them, from which nothing is sampled", "servers"),
    Metric("weights/resends", "transfers after the first one, because weights arrived wrong", "transfers"),
    Metric("weights/peak_gathered_mb", "most gathered weights alive on one rank so far", "MiB"),
    Metric("weights/probe_difference", "largest log-prob difference of a fixed prompt, servers to trainer", "nats"),
    *(Metric(f"engine/{name}", f"{meaning}, all servers", unit) for name, meaning, unit in _FIGURES),
    *(Metric(f"engine_server/<server>/{name}", f"{meaning}, one server", unit) for name, meaning, unit in _FIGURES),
)

_SERVERS = (
    Metric("sglang/servers", "servers of the run's own that serve the published weights", "servers"),
    Metric("sglang/restarts", "servers replaced since the start of the run", "servers"),
    Metric("sglang/hangs", "servers replaced because they did not answer, since the start of the run", "servers"),
    Metric("sglang/unavailable_s", "time that servers were out of service, summed, since the start of the run", "s"),
)

_HELD_OUT = (
    ("success_rate", "held-out success rate", "fraction"),
    ("success_rate_low", "lower end of the 95 % interval of the success rate", "fraction"),
    ("success_rate_high", "upper end of the 95 % interval of the success rate", "fraction"),
    ("avg@<k>", "mean success of k samples per held-out problem", "fraction"),
    ("pass@<k>", "held-out problems solved by at least one of k samples", "fraction"),
    ("maj@<k>", "held-out problems solved by the majority answer of k samples", "fraction"),
)

_VALIDATION = (
    *(Metric(f"val/{name}", meaning, unit) for name, meaning, unit in _HELD_OUT),
    *(Metric(f"val/<set>/{name}", f"{meaning}, of one of several sets", unit) for name, meaning, unit in _HELD_OUT),
    Metric("val/num_problems", "held-out problems evaluated", "problems"),
    Metric("val/num_excluded", "held-out trajectories lost to infrastructure failures", "trajectories"),
    Metric("env/<name>", "whatever a custom environment or reward reports, mean over trajectories", "any"),
)

METRICS: tuple[Metric, ...] = (
    *_ACTOR, *_ROLLOUT, *OVERSAMPLING, *ASYNC, *SPEAR, *_TRAINING, *MISMATCH, *_TIMING, *_PERF, *_ENGINE,
    *_SERVERS, *_VALIDATION,
)  # fmt: skip


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(re.escape("<k>"), r"\d+")
    return re.compile(re.sub(r"<\w+>", r"[\\w.\\-]+", text))


_BY_NAME = {metric.name: metric for metric in METRICS if "<" not in metric.name}
_FAMILIES = tuple((_pattern(metric.name), metric) for metric in METRICS if "<" in metric.name)


def lookup(name: str) -> Metric | None:
    """The metric called ``name``, or the family it belongs to; None when the schema has neither."""
    known = _BY_NAME.get(name)
    return known or next((metric for pattern, metric in _FAMILIES if pattern.fullmatch(name)), None)


def check_names(names: Iterable[str]) -> None:
    """Refuse metrics that the schema does not describe.

    Raises:
        ValueError: naming them; add the metric to ``observability/schema.py`` or call it ``env/<name>``.
    """
    unknown = sorted(name for name in names if lookup(name) is None)
    if unknown:
        raise ValueError(
            f"metrics {', '.join(unknown)} are not in the record's schema; describe them in observability/schema.py, "
            "or name figures of a custom environment env/<name>"
        )


def describe() -> str:
    """The whole schema as a Markdown table."""
    rows = ["| `{}` | {} | {} |".format(*(text.replace("|", r"\|") for text in metric)) for metric in METRICS]
    return "\n".join(["| metric | meaning | unit |", "| --- | --- | --- |", *rows]) + "\n"
