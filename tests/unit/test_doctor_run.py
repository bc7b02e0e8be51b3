"""Every failure pattern is found in a synthetic record that shows it, and in no other; healthy runs are silent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.__main__ import main
from spear_megatron.observability.doctor import diagnose_record, diagnose_run
from spear_megatron.observability.schema import check_names

Line = dict[str, Any]
NUM_STEPS = 30
TIMINGS = {"timing_s/gen": 6.0, "timing_s/old_log_prob": 1.0, "timing_s/update_actor": 3.0, "timing_s/step": 10.5}


def healthy(num_steps: int = NUM_STEPS, final: float = 0.95, seed: int = 0) -> list[Line]:
    """A run that learns: success rises to ``final``, entropy falls slowly, everything else moves a little."""
    rng = random.Random(seed)
    lines: list[Line] = [{"schema_version": 1, "step": 0, "unix_time": 1.0, "val/success_rate": 0.3}]
    for step in range(1, num_steps + 1):
        progress = (step - 1) / max(num_steps - 1, 1)
        noise = rng.uniform(0.95, 1.05)
        success = min((0.3 + (final - 0.3) * progress) * rng.uniform(0.98, 1.02), 1.0)
        line: Line = {
            "step": step,
            "success/mean": success,
            "critic/rewards/mean": success,
            "actor/entropy": (0.8 - 0.5 * progress) * noise,
            "actor/grad_norm": 0.5 * noise,
            "actor/ppo_kl": 0.002 * noise,
            "actor/pg_clipfrac": 0.05 * noise,
            "tools/calls_mean": 1.2 * noise,
            "tools/failures_mean": 0.05 * noise,
            "response_length/mean": 200 * noise,
            "response_length/clip_ratio": 0.02 * noise,
            "groups/zero_variance": progress * final,
            "training/rollout_logp_abs_diff/mean": 1e-3 * noise,
            "training/nonfinite_steps": 0.0,
            "training/skipped_steps": 0.0,
            "stop/answer": 0.97,
            "stop/turn_limit": 0.03,
            "stop/infrastructure": 0.0,
            **TIMINGS,
        }
        lines.append(line)
    return lines


def changed(**series: Callable[[int, float], float]) -> list[Line]:
    """A run that stays at half success, with some metrics replaced by f(step, healthy value)."""
    lines = healthy(final=0.5)
    for line in lines[1:]:
        for name, function in series.items():
            key = name.replace("__", "/")
            line[key] = function(line["step"], line.get(key, 0.0))
    return lines


def ramp(first: float, last: float) -> Callable[[int, float], float]:
    return lambda step, _: first + (last - first) * (step - 1) / (NUM_STEPS - 1)


def spear(**series: Callable[[int, float], float]) -> list[Line]:
    """The same run with replay from step 6 on and covariance selection, some metrics replaced."""
    lines = changed()
    for line in lines[1:]:
        step = line["step"]
        line |= {
            "spear/mu": max(1 - step / 20, 0.0),
            "spear/gamma": min(step / 20, 1.0),
            "replay/pushed": 12.0,
            "replay/rejected/advantage": 80.0,
            "replay/rejected/requirement": 4.0,
            "replay/stored": min(12.0 * step, 96.0),
            "replay/expired": 12.0 if step > 8 else 0.0,
            "replay/trigger": 64.0,
            "replay/qualifying": min(10.0 * step, 80.0),
            "replay/replayed": 16.0 if step > 5 else 0.0,
            "replay/p50": 0.4,
            "replay/p50_std": 0.3,
            "cov/candidates": 40.0,
            "cov/replay_candidates": 30.0 if step > 5 else 0.0,
        }
        for name, function in series.items():
            key = name.replace("__", "/")
            line[key] = function(step, line.get(key, 0.0))
    return lines


def constant(value: float) -> Callable[[int, float], float]:
    return lambda step, _: value


PATTERNS: dict[str, tuple[list[Line], str, str]] = {
    "entropy collapse": (changed(actor__entropy=ramp(0.8, 0.01)), "actor/entropy", "entropy_coeff"),
    "entropy explosion": (changed(actor__entropy=ramp(0.8, 3.0)), "over steps 26-30", "entropy_coeff"),
    "tool calls without success": (
        changed(success__mean=lambda step, _: 0.01 + 0.001 * step),
        "tools/calls_mean",
        "data.generator.levels",
    ),
    "no tool calls": (
        changed(tools__calls_mean=ramp(1.0, -0.2), success__mean=ramp(0.1, 0.45)),
        "after",
        "data.instruction",
    ),
    "tool calls fail": (changed(tools__failures_mean=constant(0.8)), "% of the tool calls fail", "env.sandbox"),
    "train/rollout drift": (changed(training__rollout_logp_abs_diff__mean=ramp(0.001, 0.2)), "nats", "model.dtype"),
    "engine and trainer disagree": (
        changed(
            mismatch__warned=lambda step, _: float(10 <= step < 13),
            mismatch__abs_diff_mean=lambda step, _: 0.3 if step == 11 else 0.1 if step in (10, 12) else 1e-3,
            mismatch__turn_1=constant(1e-3), mismatch__turn_2=constant(0.6),
        ),
        "in 3 steps, first at step 10, last at 12; the largest is 0.3 nats at step 11, worst in turn 2 (0.6)",
        "mismatch.stop",
    ),  # fmt: skip
    "many trajectories are masked for mismatch": (
        changed(filter__mismatch=constant(0.4)), "filter/mismatch is 0.4", "mismatch.mask",
    ),  # fmt: skip
    "engine and trainer cannot be compared": (
        changed(mismatch__tokens=constant(0), mismatch__lag_1=constant(0.01)), "mismatch/tokens is 0 over steps 26-30",
        "rollout_correction.mode",
    ),  # fmt: skip
    "responses are cut": (changed(response_length__clip_ratio=constant(0.5)), "0.5", "data.max_response_length"),
    "length explosion": (
        changed(response_length__mean=ramp(100, 900), success__mean=lambda s, v: 0.4 + 0.001 * s),
        "grew from",
        "loss_agg_mode",
    ),
    "groups without variance": (changed(groups__zero_variance=constant(0.95)), "zero advantages", "rollout.n"),
    "grad-norm spikes": (
        changed(actor__grad_norm=lambda step, value: 100.0 if step in (9, 17, 25) else value),
        "3 steps",
        "optim.clip_grad",
    ),
    "non-finite steps": (
        changed(training__nonfinite_steps=lambda step, _: float((step >= 7) + (step >= 9))),
        "rose 2 times, first at step 7, last at step 9",
        "optim.lr",
    ),
    "steps without an update": (changed(training__skipped_steps=lambda s, _: s // 2), "15 optimizer", "rollout.n"),
    "no progress": (changed(success__mean=lambda step, _: 0.4), "0.4 over steps", "optim.lr"),
    "success fell": (changed(success__mean=lambda s, _: 0.05 * s if s <= 15 else 0.2 + 0.006 * s), "fell", "optim.lr"),
    "updates too large": (changed(actor__ppo_kl=constant(0.3)), "actor/ppo_kl is 0.3", "ppo_epochs"),
    "trajectories are lost to infrastructure failures": (
        changed(stop__infrastructure=constant(0.1)),
        "stop/infrastructure is 0.1",
        "env.sandbox.workers",
    ),
    "episodes end at the turn limit": (changed(stop__turn_limit=constant(0.7)), "0.7", "max_assistant_turns"),
    "tool output does not fit": (changed(stop__tool_overflow=constant(0.4)), "0.4", "max_tool_response_length"),
    "turns hold neither a tool call nor an answer": (changed(stop__void_turn=constant(0.4)), "0.4", "data.instruction"),
    "replay never triggered": (
        spear(replay__replayed=constant(0), replay__trigger=constant(512)),
        "reached 96 at step 8, replay/trigger is 512, replay/qualifying at most 80; as many leave by age (12 over",
        "trajectory_tolerate_steps",
    ),
    "replay without weight": (spear(spear__gamma=constant(0)), "replay/replayed is 16 over", "replay_loss_coef"),
    "covariance selection finds no token": (spear(cov__candidates=constant(0)), "all 30 steps", "clip_cov_lb"),
    "covariance selection finds no replayed token": (
        spear(cov__replay_candidates=constant(0)),
        "all 25 steps from 6 to 30",
        "clip_cov_ub_replay",
    ),
    "replay baseline not finite": (
        spear(replay__p50=lambda step, value: None if step in (7, 9) else value),  # type: ignore[arg-type,return-value]
        "in 2 steps, first at step 7, last at 9",
        "weight_decay_trajectory_replay",
    ),
    "one rule rejects every push": (
        spear(replay__pushed=constant(0), replay__rejected__requirement=constant(1)),
        "replay/rejected/advantage is 800 and replay/pushed 0 over steps 21-30",
        "trajectory_score_threshold",
    ),
    "one phase dominates": (changed(timing_s__gen=constant(100), timing_s__step=constant(105)), "95%", "max_num_seqs"),
}
ALSO = {"length explosion": {"no progress"}, "tool calls without success": {"no progress"}}


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_is_found_alone(name: str) -> None:
    record, evidence, remedy = PATTERNS[name]
    found = {finding.name: finding for finding in diagnose_record(record)}
    assert name in found, list(found)
    assert set(found) - {name} <= ALSO.get(name, set()), list(found)
    finding = found[name]
    assert evidence in finding.evidence and remedy in finding.remedy and finding.level != "ok"
    assert finding.keys and all(key in finding.remedy for key in finding.keys)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("final", [0.5, 0.75, 0.97, 1.0])
def test_healthy_runs_are_silent(seed: int, final: float) -> None:
    assert diagnose_record(healthy(final=final, seed=seed)) == []


def test_healthy_replay_is_silent() -> None:
    assert diagnose_record(spear()) == []


def test_why_replay_never_triggered() -> None:
    growing = spear(
        replay__replayed=constant(0), replay__expired=constant(0), replay__stored=lambda step, _: 12.0 * step,
        replay__trigger=constant(512),
    )  # fmt: skip
    (finding,) = diagnose_record(growing)
    assert "reached 360 at step 30" in finding.evidence and "by age" not in finding.evidence
    assert "trajectory_buffer_size" in finding.remedy and "tolerate" not in finding.remedy
    (finding,) = diagnose_record(spear(replay__replayed=constant(0), replay__qualifying=constant(0)))
    assert "replay/qualifying at most 0" in finding.evidence and "above the baseline replay/p50" in finding.remedy
    assert diagnose_record(growing[:20]) == []  # 19 steps


def test_a_gate_that_warns_to_the_end_is_an_error_and_says_it_alone() -> None:
    drift = ramp(0.001, 0.2)
    record = changed(
        training__rollout_logp_abs_diff__mean=drift, mismatch__abs_diff_mean=drift,
        mismatch__warned=lambda step, _: float(drift(step, 0) > 0.05),
    )  # fmt: skip
    (finding,) = diagnose_record(record)
    assert finding.name == "engine and trainer disagree" and finding.level == "error"
    assert diagnose_record(changed(mismatch__abs_diff_mean=constant(2e-7), mismatch__warned=constant(0.0))) == []


def test_rejections_are_no_pattern_when_rules_share_them_or_all_is_solved() -> None:
    none_pushed = {"replay__pushed": constant(0), "replay__rejected__requirement": constant(1)}
    assert diagnose_record(spear(**(none_pushed | {"replay__rejected__requirement": constant(30)}))) == []
    solved = spear(**none_pushed, success__mean=constant(0.97))
    assert "one rule rejects every push" not in [finding.name for finding in diagnose_record(solved)]


def test_a_solved_run_may_have_low_entropy_and_equal_rewards() -> None:
    record = healthy(60, final=1.0)
    for line in record[40:]:
        line |= {"actor/entropy": 0.005, "groups/zero_variance": 1.0, "success/mean": 0.99}
    assert diagnose_record(record) == []


@pytest.mark.parametrize("length", range(5))
def test_too_short_to_judge(length: int) -> None:
    for record, _, _ in PATTERNS.values():
        assert [finding.name for finding in diagnose_record(record[: length + 1])] == []


def test_missing_and_null_metrics_are_no_pattern() -> None:
    bare = [{"step": step, "actor/grad_norm": None} for step in range(40)]
    assert diagnose_record(bare) == [] and diagnose_record([]) == []


def test_the_records_use_names_of_the_schema() -> None:
    for record, _, _ in PATTERNS.values():
        for line in record:
            check_names(set(line) - {"schema_version", "step", "unix_time"})


def test_errors_come_first_and_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = changed(actor__entropy=ramp(0.8, 0.01), training__nonfinite_steps=constant(1.0))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    assert [finding.level for finding in diagnose_run(tmp_path)] == ["error", "warning"]
    assert main(["doctor", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.index("non-finite") < text.index("entropy collapse") and "entropy_coeff" in text


def test_doctor_says_when_a_record_is_too_short_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in healthy()[:2]))
    assert main(["doctor", str(tmp_path)]) == 0
    steps = sum(line["step"] > 0 for line in healthy()[:2])
    assert f"no failure pattern found in {steps} steps; most patterns take 5 or more" in capsys.readouterr().out


def test_doctor_command_on_healthy_and_missing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in healthy()))
    assert main(["doctor", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no failure pattern found\n"
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
