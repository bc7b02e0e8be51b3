"""The plot command: seeds form one curve, panels without data are left out, PNG and text are written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.__main__ import main
from spear_megatron.observability.arms import Arm, arm_curve, arm_names, load_arms, smoothed
from spear_megatron.observability.draw import curves_note, panels_text, save_panels, sparkline
from spear_megatron.observability.panels import Panel, build_panels
from spear_megatron.observability.plots import Curve

Line = dict[str, Any]


def plain(count: int = 12, shift: float = 0.0) -> list[Line]:
    """A run of GRPO."""
    lines: list[Line] = [{"schema_version": 1, "step": 0, "val/success_rate": 0.1}]
    for step in range(1, count + 1):
        line = {"step": step, "success/mean": step / count * 0.5 + shift, "training/num_trajectories": 64}
        line |= {"actor/entropy": 1.0 / step, "tools/calls_mean": 1.5, "critic/rewards/mean": step / 10}
        if step % 4 == 0:
            line |= {"val/success_rate": 0.5, "val/success_rate_low": 0.4, "val/success_rate_high": 0.6}
        lines.append(line)
    return lines


def spear(count: int = 12) -> list[Line]:
    """The same with replay."""
    lines = plain(count)
    for line in lines[1:]:
        line |= {"spear/mu": 0.5, "spear/gamma": 0.2, "replay/stored": 10.0 * line["step"], "replay/pushed": 9.0}
        line |= {"replay/rejected/advantage": 3.0, "replay/rejected/requirement": 0.0, "replay/expired": 0.0}
        line |= {"replay/replayed": 4.0, "replay/p50": 0.3, "cov/selected": 0.0}
    return lines


def save(folder: Path, lines: list[Line]) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def shown(panels: list[Panel]) -> dict[str, list[tuple[str, str]]]:
    return {panel.title: [(line.arm, line.quantity) for line in panel.lines] for panel in panels}


def test_names_without_seeds() -> None:
    names = ("grpo/seed_1", "grpo/seed-22", "spear-s1", "spear_seed3", "run.s4", "plain")
    assert arm_names([Path("/x") / name for name in names]) == ["grpo", "grpo", "spear", "spear", "run", "plain"]
    different = [Path("/a/first/run-s1"), Path("/a/second/run-s1"), Path("/a/second/run-s2"), Path("/a/models-s")]
    assert arm_names(different) == ["first/run", "second/run", "second/run", "models-s"]


def test_labels_make_curves(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, plain()) for name in ("a", "b", "c")]
    arms = load_arms(folders, ["x", "y", "x"])
    assert [(arm.label, len(arm.records)) for arm in arms] == [("x", 2), ("y", 1)]
    with pytest.raises(ValueError, match="1 --label for 3"):
        load_arms(folders, ["x"])
    with pytest.raises(ValueError, match="holds no steps"):
        load_arms([save(tmp_path / "empty", [])])


def test_seeds_are_averaged_up_to_the_last_common_step() -> None:
    arm = Arm("x", (plain(4), plain(4, shift=0.3), plain(2, shift=0.5)))
    points = arm_curve(arm, "success/mean")
    assert points.steps == [1, 2]
    for index, step in enumerate(points.steps):
        values = [step / 4 * 0.5, step / 4 * 0.5 + 0.3, step / 2 * 0.5 + 0.5]
        assert points.values[index] == pytest.approx(sum(values) / 3)
        assert (points.low[index], points.high[index]) == pytest.approx((min(values), max(values)))


def test_a_single_run_keeps_its_interval_and_loses_it_by_smoothing() -> None:
    arm = Arm("x", (plain(),))
    assert arm_curve(arm, "success/mean").low and not arm_curve(arm, "success/mean", 3).low
    assert smoothed(Curve([1, 2, 3, 4], [1.0, 2.0, 6.0, 1.0], [], []), 3).values == [1.0, 1.5, 3.0, 3.0]


def test_panels_without_data_are_left_out() -> None:
    names = ["Success", "Reward", "Entropy of the policy", "Tool calls"]
    assert list(shown(build_panels([Arm("grpo", (plain(),))]))) == names
    panels = shown(build_panels([Arm("spear", (spear(),))]))
    flow = [("spear", name) for name in ("pushed", "replayed", "rejected: advantage")]  # what stays zero is not drawn
    assert panels["Flow of the replay buffer"] == flow
    assert panels["Success"] == [("spear", "training rollouts"), ("spear", "held-out")]
    assert panels["Replay buffer"] == [("spear", "stored")]
    assert "Tokens selected by covariance" in panels  # that it selects nothing is worth seeing
    assert list(panels)[:4] == names and len(panels) == 8


def test_schedules_and_buffer_that_are_off_are_left_out() -> None:
    lines = plain()
    for line in lines[1:]:
        line |= {"spear/mu": 0.0, "spear/gamma": 0.0, "replay/stored": 0.0, "replay/pushed": 0.0}
    assert len(build_panels([Arm("x", (lines,))])) == 4


def test_panels_of_several_arms_and_sets() -> None:
    lines = plain()
    for line in lines[1:]:
        line |= {"val/aime/success_rate": 0.25, "val/math/success_rate": 0.5}
    panels = shown(build_panels([Arm("grpo", (lines,)), Arm("spear", (spear(), spear()))], smooth=3))
    assert panels["Held-out success: math"] == [("grpo", "held-out")]
    assert panels["Entropy of the policy"] == [("grpo", "entropy"), ("spear", "entropy")]
    assert "Flow of the replay buffer: spear" in panels and "Flow of the replay buffer: grpo" not in panels


def test_notes_say_what_bands_are() -> None:
    one, three = Arm("a", (plain(),)), Arm("b", (plain(), plain(), plain()))
    assert curves_note([one]) == "95 % intervals" and curves_note([three], 5) == (
        "mean and range of 3 seeds, averages over 5 steps"
    )
    assert curves_note([one, three]) == "mean and range of 3 seeds, 95 % intervals of single runs"


def test_png_is_1200_pixels_wide(tmp_path: Path) -> None:
    arms = [Arm("grpo", (plain(),)), Arm("spear", (spear(), spear()))]
    data = save_panels(build_panels(arms, 2), arms, tmp_path / "new" / "plot.png", "two arms").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width == 1200 and height > 1000 and len(data) > 50_000
    with pytest.raises(ValueError, match="nothing to draw"):
        save_panels([], arms, tmp_path / "none.png")


def test_text() -> None:
    assert sparkline(Curve([1, 2, 3], [0.0, 1.0, 7.0], [], []), 10) == "▁▂█"
    assert sparkline(Curve(list(range(8)), [0.0] * 4 + [1.0] * 4, [], []), 4) == "▁▁██"
    assert sparkline(Curve([1, 2], [2.0, 2.0], [], []), 4) == "▁▁"
    arms = [Arm("grpo", (plain(),)), Arm("spear", (spear(),))]
    text = panels_text(build_panels(arms), arms)
    (row,) = [line for line in text.splitlines() if line.strip().startswith("spear: γ")]
    assert row.split()[-5:] == ["0.2", "to", "0.2,", "steps", "1-12"]
    assert "┤" not in text and "┤" in panels_text(build_panels(arms[:1]), arms[:1])


def test_plot_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [save(tmp_path / "grpo" / f"seed_{seed}", plain()) for seed in (1, 2)]
    assert main(["plot", folders[0]]) == 0
    assert (tmp_path / "grpo" / "seed_1" / "plot.png").is_file() and "4 panels of 1 curve:" in capsys.readouterr().out
    out = tmp_path / "out.png"
    assert main(["plot", *folders, "--text"]) == 0
    assert "Tool calls (calls per trajectory)" in capsys.readouterr().out and not out.exists()
    assert main(["plot", *folders, "--text", "--out", str(out), "--smooth", "3"]) == 0 and out.is_file()
    for options, part in ((["--smooth", "0"], "--smooth"), (["--out", "x.pdf"], ".png"), (["--label", "a"], "--label")):
        assert main(["plot", *folders, *options]) == 2
        assert part in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none")]) == 2
