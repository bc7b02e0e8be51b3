"""Learning curves as PNG and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spear_megatron.observability.plots import (
    Curve,
    curve,
    held_out_names,
    save_learning_curve,
    text_chart,
)


def record(count: int = 20) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        line = {"step": step, "success/mean": step / count, "training/num_trajectories": 64, "actor/entropy": 1 / step}
        line |= {"critic/rewards/mean": step / 10, "response_length/mean": 50.0, "response_length/max": 90.0}
        if step % 5 == 0:
            line |= {"val/success_rate": 0.5, "val/success_rate_low": 0.4, "val/success_rate_high": 0.6}
        lines.append(line)
    return lines


def test_curve_skips_missing_and_null_values() -> None:
    lines = [{"step": 1, "actor/lr": 1.0}, {"step": 2}, {"step": 3, "actor/lr": None}, {"step": 4, "actor/lr": 4}]
    assert curve(lines, "actor/lr") == Curve([1, 4], [1.0, 4.0], [], [])


def test_bands() -> None:
    success = curve(record(), "success/mean")
    assert all(low <= value <= high for low, value, high in zip(success.low, success.values, success.high))
    held_out = curve(record(), "val/success_rate")
    assert (held_out.steps, held_out.low, held_out.high) == ([5, 10, 15, 20], [0.4] * 4, [0.6] * 4)
    assert held_out_names(record()) == ["val/success_rate"]


def test_png(tmp_path: Path) -> None:
    path = save_learning_curve(record(), tmp_path / "plots" / "curve.png", "toy")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    save_learning_curve([{"step": 0}], tmp_path / "empty.png")
    with pytest.raises(ValueError, match="holds no steps"):
        save_learning_curve([], tmp_path / "none.png")


def test_text_chart_has_its_size_and_rises() -> None:
    lines = text_chart(curve(record(), "success/mean"), "success", width=30, height=6, limits=(0, 1)).split("\n")
    assert lines[0] == "success" and len(lines) == 1 + 6 + 2
    body = [line.partition("┤")[2] for line in lines[1:7]]
    assert all(len(row) == 30 for row in body)
    inked = [[column for column, cell in enumerate(row) if ord(cell) > 0x2800] for row in body]
    assert inked[0][-1] == 29 and inked[-1][0] == 0 and inked[0][0] > inked[-1][-1]
    assert lines[-1].split() == ["1", "step", "20"]
    assert lines[1].strip().startswith("1 ┤") and lines[6].strip().startswith("0 ┤")


def test_text_chart_of_one_value_and_of_none() -> None:
    assert "1" in text_chart(Curve([3], [1.0], [], []), "x")
    assert text_chart(Curve([], [], [], []), "x") == "x: no values"
