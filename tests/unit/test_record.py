"""The per-step record: schema, durable lines, resume, console line, timings."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from spear_megatron.observability.console import ConsoleLog, step_line
from spear_megatron.observability.record import NullRecorder, RunRecorder, read_record
from spear_megatron.observability import schema
from spear_megatron.observability.schema import METRICS, SCHEMA_VERSION, check_names, describe, lookup
from spear_megatron.observability.timing import PhaseTimer
from spear_megatron.types import StopReason

METRIC_LINE = {"actor/pg_loss": 0.25, "success/mean": 0.5, "stop/answer": 1.0, "val/math/pass@16": 0.75}


def recorder(run_dir: Path, resume_step: int | None = None) -> RunRecorder:
    return RunRecorder(run_dir, loggers=("jsonl",), resume_step=resume_step)


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_record(run_dir)]


def test_schema_names_are_unique_and_documented() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.meaning and metric.unit for metric in METRICS)
    assert all(f"`{name}`" in describe() for name in names)


def test_every_metric_is_recorded_somewhere() -> None:
    """Its name, or what it is a statistic or the seconds of, stands in the code that records it."""
    package = Path(schema.__file__).parents[1]
    readers = Path(schema.__file__).parent  # describes metrics and shows them, records none
    code = "".join(path.read_text() for path in sorted(package.rglob("*.py")) if path.parent != readers)
    families = ("stop/", "val/", "env/", "replay/rejected/", "filter/<")
    families += tuple(f"perf/{figure}/<" for figure in ("straggler", "slowest_rank", "memory"))
    families += tuple(f"mismatch/{bucket}_<" for bucket in ("turn", "position", "lag"))
    unknown = []
    for name in (metric.name for metric in METRICS if not metric.name.startswith(families)):
        recorded = (f'"{name}"', f'_spread("{name.rpartition("/")[0]}"', f'phase("{name.removeprefix("timing_s/")}")')
        of_tokens = re.fullmatch("(cov/(?:replay_)?)(.*)", name)  # on-policy and replayed ones, told by a prefix
        composed = of_tokens and f'"{of_tokens[1]}"' in code and f'{{prefix}}{of_tokens[2]}"' in code
        if not composed and not any(text in code for text in recorded):
            unknown.append(name)
    assert unknown == []


def test_every_stop_reason_is_in_the_schema() -> None:
    check_names(f"stop/{reason.value}" for reason in StopReason)


BAD_NAMES = ["actor/pg_los", "val/math/pass@x", "stop/", "success", "actor/pg_loss/mean", "val//pass@1"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_unknown_names_are_refused(tmp_path: Path, name: str) -> None:
    assert lookup(name) is None
    for target in (recorder(tmp_path), NullRecorder()):
        with pytest.raises(ValueError, match=f"{re.escape(name)} are not in the record's schema"):
            target.write(1, {"actor/pg_loss": 1.0, name: 1.0})
    assert steps(tmp_path) == []


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    run.write(1, METRIC_LINE)
    (line,) = read_record(tmp_path)
    assert line["schema_version"] == SCHEMA_VERSION and line["step"] == 1 and line["unix_time"] > 1e9
    assert {name: line[name] for name in METRIC_LINE} == METRIC_LINE
    run.write(2, METRIC_LINE)
    assert steps(tmp_path) == [1, 2]
    run.close()
    run.close()


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    recorder(tmp_path).write(1, {"actor/grad_norm": math.inf, "actor/lr": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text)["actor/grad_norm"] is None and "NaN" not in text and "Infinity" not in text


def test_a_step_is_recorded_once(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    run.write(3, METRIC_LINE)
    for step in (3, 2):
        with pytest.raises(ValueError, match="already recorded"):
            run.write(step, METRIC_LINE)


@pytest.mark.parametrize("cut", ["", '{"step": 6, "sch', "\x00\x00"])
def test_resume_drops_later_lines_and_a_cut_one(tmp_path: Path, cut: str) -> None:
    run = recorder(tmp_path)
    for step in range(6):
        run.write(step, {"actor/lr": float(step)})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(cut)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    resumed = recorder(tmp_path, resume_step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    resumed.write(4, {"actor/lr": 40.0})
    assert steps(tmp_path) == [0, 1, 2, 3, 4] and read_record(tmp_path)[-1]["actor/lr"] == 40.0


def test_a_new_start_moves_the_old_record_aside(tmp_path: Path) -> None:
    for _ in range(3):
        run = recorder(tmp_path)
        run.write(1, METRIC_LINE)
        run.close()
    assert steps(tmp_path) == [1]
    assert sorted(path.name for path in tmp_path.glob("metrics.previous*")) == [
        "metrics.previous-1.jsonl",
        "metrics.previous-2.jsonl",
    ]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_record(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "schema_version": 99}\n')
    with pytest.raises(ValueError, match="schema version 99"):
        read_record(tmp_path)
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        read_record(tmp_path / "nowhere")


def test_unknown_logger(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer.logger contains 'wandbb'"):
        RunRecorder(tmp_path, loggers=("wandbb",))


def test_tensorboard_holds_the_resumed_values(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, base in ((None, 0.0), (2, 100.0)):
        run = RunRecorder(tmp_path, loggers=("tensorboard",), resume_step=resume_step)
        for step in range((resume_step or 0) + 1, 5):
            run.write(step, {"actor/lr": base + step})
        run.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("actor/lr")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0)]


def test_console_line_is_one_compact_line() -> None:
    metrics = {"success/mean": 0.375, "actor/entropy": 1.23456, "val/math/success_rate": 0.5, "perf/imbalance": 0.1}
    line = step_line(7, metrics)
    assert line == "step    7  success 38%  entropy 1.235  val/math/success_rate 50%"


def test_console_line_of_a_step_without_an_update_says_why() -> None:
    idle = {"success/mean": 0.0, "training/num_optimizer_steps": 0.0}
    assert step_line(2, idle) == "step    2  success 0%  no update: nothing to train on"
    cut = step_line(2, {**idle, "filter/overlong": 0.75, "filter/incomplete": 0.25, "filter/repetitive": 0.0})
    assert cut.endswith("no update: 75% of the trajectories overlong, 25% of the trajectories incomplete")
    assert "no update" not in step_line(2, {**idle, "training/num_optimizer_steps": 1.0})
    assert step_line(1, {"stop/infrastructure": 0.25}) == "step    1  lost to failures 25%"


def test_console_off_a_terminal_prints_plain_unwrapped_lines() -> None:
    out = io.StringIO()
    log = ConsoleLog(10, -1, Console(file=out, width=20))
    log.step(1, {"success/mean": 1.0, "actor/entropy": 0.5, "actor/grad_norm": 0.25})
    log.message("[bold]not markup[/bold]")
    log.close()
    assert out.getvalue() == "step    1  success 100%  entropy 0.500  grad 0.25\n[bold]not markup[/bold]\n"


def test_console_on_a_terminal_keeps_a_bar_below() -> None:
    out = io.StringIO()
    log = ConsoleLog(10, 0, Console(file=out, width=100, force_terminal=True))
    log.step(1, {"success/mean": 1.0})
    log.close()
    assert "step    1  success 100%" in out.getvalue() and "1/10" in out.getvalue()


def test_phase_timer_adds_up_and_resets() -> None:
    now = [0.0]
    timer = PhaseTimer(clock=lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    for seconds in (1.0, 2.0):
        with timer.phase("gen"):
            spend(seconds)
    spend(0.5)
    with pytest.raises(RuntimeError), timer.phase("adv"):
        spend(4.0)
        raise RuntimeError
    taken = timer.take()
    assert taken == {"timing_s/gen": 3.0, "timing_s/adv": 4.0, "timing_s/step": 7.5}
    check_names(taken)
    spend(1.0)
    assert timer.take() == {"timing_s/step": 1.0}


def test_phase_timer_waits_for_the_device_at_the_borders() -> None:
    calls: list[str] = []
    timer = PhaseTimer(synchronize=lambda: calls.append("sync"))
    with timer.phase("gen"):
        calls.append("work")
    timer.take()
    assert calls == ["sync", "work", "sync", "sync"]
