"""The evaluation report: what it computes, writes and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spear_megatron.evaluation.metrics import ProblemSamples
from spear_megatron.evaluation.report import evaluate_samples
from spear_megatron.observability.schema import check_names


def problems() -> list[ProblemSamples]:
    return [
        ProblemSamples("a", (True, True, False), ("1", "1", "2"), "easy"),
        ProblemSamples("b", (False, False, True), ("3", "3", "4"), "hard"),
        ProblemSamples("c", (True,), ("5",), "hard"),
    ]


def test_values_and_counts() -> None:
    report = evaluate_samples("model", problems(), ks=(1, 3), seed=0, num_excluded=2)
    assert (report.num_problems, report.num_samples, report.num_excluded) == (3, 7, 2)
    assert report.metrics["success_rate"].value == pytest.approx(4 / 7)
    assert report.metrics["avg@1"].value == pytest.approx(2 / 3)
    assert report.metrics["pass@3"].value == 1.0
    assert report.metrics["pass@3"].num_problems == 2
    assert report.metrics["maj@3"].value == pytest.approx(0.5)
    assert report.by_source["easy"]["maj@3"].value == 1.0
    assert report.scalars()["val/avg@1"] == report.metrics["avg@1"].value


def test_scalars_hold_every_set_and_are_in_the_record_schema() -> None:
    items = [*problems(), ProblemSamples("d", (True,), ("5",), "a b/c")]
    report = evaluate_samples("model", items, ks=(1,), seed=0, num_excluded=2)
    values = report.scalars()
    check_names(values)
    assert values["val/hard/success_rate"] == report.by_source["hard"]["success_rate"].value == 0.5
    assert values["val/a_b_c/success_rate_low"] < values["val/a_b_c/success_rate"] == 1.0
    assert (values["val/num_problems"], values["val/num_excluded"]) == (4.0, 2.0)


def test_json_round_trip(tmp_path: Path) -> None:
    report = evaluate_samples("model", problems(), ks=(1,), seed=0)
    path = tmp_path / "deep" / "evaluation.json"
    report.write_json(path)
    written = json.loads(path.read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert set(written["metrics"]["avg@1"]) == {"value", "low", "high", "num_problems"}
    assert list(path.parent.iterdir()) == [path]


def test_table_names_every_metric_and_source() -> None:
    table = evaluate_samples("step 40", problems(), ks=(1, 3), seed=0, num_excluded=1).to_table()
    lines = table.splitlines()
    assert lines[0] == "step 40: 3 problems, 7 samples, 1 excluded after infrastructure failures"
    assert sum(line.startswith("all") for line in lines) == 7
    assert any(line.startswith("hard") and "pass@3" in line and "100.0 %" in line for line in lines)


def test_one_source_gives_no_breakdown_and_the_result_is_reproducible() -> None:
    one = [ProblemSamples("a", (True, False), ("1", "2"), "easy")] * 5
    report = evaluate_samples("m", one, ks=(2,), seed=7)
    assert report.by_source == {}
    assert report == evaluate_samples("m", one, ks=(2,), seed=7)


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate_samples("m", [], ks=(1,), seed=0)
    with pytest.raises(ValueError, match="no problem has 4 valid samples"):
        evaluate_samples("m", problems(), ks=(4,), seed=0)
