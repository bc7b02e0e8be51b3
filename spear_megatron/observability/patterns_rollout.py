"""Failure patterns of the episodes: tools, lengths, stop reasons, time.

Every check takes a record and returns a finding with figures, steps and the keys to change, or None.
"""

from __future__ import annotations

from spear_megatron.observability.findings import Finding
from spear_megatron.observability.trends import WINDOW, Record, head, series, tail

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"


def tools_without_success(record: Record) -> Finding | None:
    """The agent calls tools, and hardly any task gets solved."""
    calls, success = tail(record, "tools/calls_mean"), tail(record, "success/mean")
    if calls is None or success is None or calls.value < 0.5 or success.value > 0.05:
        return None
    keys = ("data.generator.levels", f"{_ROLLOUT}.multi_turn.max_assistant_turns")
    return Finding(
        "warning",
        "tool calls without success",
        f"tools/calls_mean is {calls}, success/mean {success}",
        "look at trajectories with 'view RUN_DIR --worst'; start with easier tasks (of the built-in ones "
        f"{keys[0]}) or a longer cold start, and leave turns for an answer after the calls ({keys[1]})",
        keys,
    )


def no_tool_calls(record: Record) -> Finding | None:
    """The agent does without tools, or stopped using them, and does not solve its tasks."""
    first, last = head(record, "tools/calls_mean"), tail(record, "tools/calls_mean")
    success = tail(record, "success/mean")
    if last is None or success is None or last.value >= 0.05 or success.value >= 0.5:
        return None
    before = f", after {first}" if first is not None and first.value >= 0.05 else ""
    keys = ("data.instruction", "env.name")
    return Finding(
        "warning",
        "no tool calls",
        f"tools/calls_mean is {last}{before}; success/mean is {success}",
        f"if the environment offers tools, say so in the prompt ({keys[0]}) and check {keys[1]}, or run sft on "
        "conversations with tool calls first",
        keys,
    )


def tool_failures(record: Record) -> Finding | None:
    """A large share of the tool calls fails."""
    calls, failures = tail(record, "tools/calls_mean"), tail(record, "tools/failures_mean")
    if calls is None or failures is None or calls.value < 0.1 or failures.value < 0.3 * calls.value:
        return None
    keys = ("env.sandbox.cpu_s", "env.sandbox.memory_mb")
    return Finding(
        "warning",
        "tool calls fail",
        f"{failures.value / calls.value:.0%} of the tool calls fail over steps {failures.first}-{failures.last}",
        f"read the tool responses with 'view RUN_DIR'; for time-outs or memory raise {keys[0]} or {keys[1]}",
        keys,
    )


def length_clip(record: Record) -> Finding | None:
    """Many responses end at the length limit."""
    clipped = tail(record, "response_length/clip_ratio")
    if clipped is None or clipped.value < 0.3:
        return None
    key = "data.max_response_length"
    return Finding(
        "warning",
        "responses are cut",
        f"response_length/clip_ratio is {clipped}",
        f"raise {key}, or look at what fills the responses with 'view RUN_DIR --worst'",
        (key,),
    )


def length_explosion(record: Record) -> Finding | None:
    """Responses grow while success does not."""
    first, last = head(record, "response_length/mean"), tail(record, "response_length/mean")
    before, after = head(record, "success/mean"), tail(record, "success/mean")
    if first is None or last is None or before is None or after is None:
        return None
    if last.value < 2 * first.value or after.value > before.value + 0.05:
        return None
    keys = (f"{_ACTOR}.loss_agg_mode", "data.max_response_length")
    return Finding(
        "warning",
        "length explosion",
        f"response_length/mean grew from {first} to {last} tokens while success/mean went from {before} to {after}",
        f"use {keys[0]}=token-mean or seq-mean-token-sum-norm, or lower {keys[1]}",
        keys,
    )


_STOPS = {
    "infrastructure": (0.02, "trajectories are lost to infrastructure failures", "env.sandbox.workers"),
    "turn_limit": (0.5, "episodes end at the turn limit", f"{_ROLLOUT}.multi_turn.max_assistant_turns"),
    "tool_overflow": (0.2, "tool output does not fit", f"{_ROLLOUT}.multi_turn.max_tool_response_length"),
    "void_turn": (0.3, "turns hold neither a tool call nor an answer", "data.instruction"),
}

_SLOW = {
    "gen": f"{_ROLLOUT}.max_num_seqs",
    "old_log_prob": f"{_ACTOR}.ppo_max_token_len_per_gpu",
    "ref": f"{_ACTOR}.ppo_max_token_len_per_gpu",
    "update_actor": f"{_ACTOR}.ppo_max_token_len_per_gpu",
    "publish": "data.train_batch_size",
    "save": "trainer.save_freq",
    "testing": "trainer.test_freq",
}


def bad_stops(record: Record) -> list[Finding]:
    """Episodes end for reasons that have nothing to do with the task: one finding per reason."""
    found = []
    for reason, (limit, meaning, key) in _STOPS.items():
        share = tail(record, f"stop/{reason}")
        if share is not None and share.value > limit:
            remedy = f"look at such trajectories with 'view RUN_DIR --all' and adjust {key}"
            found.append(Finding("warning", meaning, f"stop/{reason} is {share}", remedy, (key,)))
    return found


def dominant_phase(record: Record) -> Finding | None:
    """One phase takes nearly all of the time."""
    total = sum(value for _, value in series(record, "timing_s/step"))
    if len(series(record, "timing_s/step")) < WINDOW or total <= 0:
        return None
    seconds = {phase: sum(value for _, value in series(record, f"timing_s/{phase}")) for phase in _SLOW}
    phase = max(seconds, key=seconds.__getitem__)
    if seconds[phase] < 0.8 * total:
        return None
    return Finding(
        "info",
        "one phase dominates",
        f"timing_s/{phase} takes {seconds[phase] / total:.0%} of {total:.0f} s",
        f"try a larger {_SLOW[phase]}",
        (_SLOW[phase],),
    )
