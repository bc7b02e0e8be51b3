"""Slow ranks, waits that are not work, and peak memory by phase."""

from __future__ import annotations

import mmap
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spear_megatron.observability.doctor import diagnose_record
from spear_megatron.observability.memory import MemoryMeter
from spear_megatron.observability.stragglers import straggler_metrics
from spear_megatron.parallel.waits import WaitClock


@pytest.mark.parametrize("seed", range(5))
def test_the_slowest_rank_is_compared_with_the_median_one(seed: int) -> None:
    random = Random(seed)
    busy = [{"update_actor": random.uniform(1, 2), "adv": 1e-4} for _ in range(7)]
    busy[3]["update_actor"] = 9.0
    metrics = straggler_metrics(busy, 20.0)
    median = statistics.median(part["update_actor"] for part in busy)
    assert metrics == {
        "perf/straggler/update_actor": pytest.approx(9.0 / median), "perf/slowest_rank/update_actor": 3.0
    }  # fmt: skip


def test_of_two_ranks_the_faster_one_is_the_measure() -> None:
    assert straggler_metrics([{"gen": 1.0}, {"gen": 3.0}], 4.0)["perf/straggler/gen"] == 3.0


def test_ranks_without_a_part_in_a_phase_do_not_count() -> None:
    assert straggler_metrics([{"gen": 4.0}, {}, {}], 4.0) == {}


def test_waits_inside_waits_count_once() -> None:
    now = iter([0.0, 1.0, 3.0])
    clock = WaitClock(lambda: next(now))
    with clock.waiting(), clock.waiting():
        pass
    assert clock.seconds == 3.0


def test_the_peak_of_a_phase_is_its_own() -> None:
    meter = MemoryMeter(cuda=False)
    if not meter.available:
        pytest.skip("the kernel does not let the peak be reset")
    with meter.phase("large"):
        with mmap.mmap(-1, 128 << 20) as block:  # given back at its end, whatever the allocator keeps
            block[:: 1 << 12] = b"x" * len(range(0, 128 << 20, 1 << 12))
    with meter.phase("small"):
        time.sleep(0)
    peaks = meter.take()
    assert peaks["large"] - peaks["small"] > 100 and meter.take() == {}


def test_without_a_way_to_reset_the_peak_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    meter = MemoryMeter(cuda=False)
    with meter.phase("gen"):
        pass
    assert meter.take() == {}


def lines(**figures: Any) -> list[dict[str, Any]]:
    """Ten steps of a record that all have these figures."""
    return [{"step": step, **{name.replace("__", "/"): value for name, value in figures.items()}} for step in range(10)]


def test_the_doctor_names_a_rank_that_is_slow_again_and_again() -> None:
    slow = lines(perf__straggler__gen=2.5, perf__slowest_rank__gen=6.0)
    [finding] = diagnose_record(slow)
    assert "rank 6 takes 2.5 times" in finding.evidence and "heartbeat/rank_6.json" in finding.remedy
    taking_turns = [{**line, "perf/slowest_rank/gen": float(line["step"] % 3)} for line in slow]
    assert diagnose_record(taking_turns) == []
    assert diagnose_record(lines(perf__straggler__gen=1.2, perf__slowest_rank__gen=6.0)) == []


def test_the_doctor_tells_of_spikes() -> None:
    [finding] = diagnose_record([{**line, "training/loss_spikes": float(line["step"] // 4)} for line in lines()])
    assert finding.name == "loss spikes" and "2 optimizer steps, the first in step 4" in finding.evidence
