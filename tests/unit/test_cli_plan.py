"""The command ``plan``: tables, files, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qwen_sizes import QWEN3_32B_CONFIG

from spear_megatron.__main__ import main

MEGATRON = "actor_rollout_ref.actor.megatron"
LAYOUT = [
    f"{MEGATRON}.tensor_model_parallel_size=8",
    f"{MEGATRON}.pipeline_model_parallel_size=4",
    f"{MEGATRON}.sequence_parallel=true",
    "data.max_response_length=16384",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=18432",
]


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "qwen3-32b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B_CONFIG))
    return f"actor_rollout_ref.model.path={folder}"


def test_a_plan_is_shown_written_and_drawn(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "plan" / "plan.json", tmp_path / "plan" / "plan.png"
    arguments = ["--nodes", "16", "--top", "0", "--json", str(out), "--picture", str(picture)]
    assert main(["plan", *arguments, model, *LAYOUT]) == 0
    shown = capsys.readouterr().out
    for text in ("TP8 PP4 DP4 SP", "activations", "checkpoint staging", "estimated step", "assumed:"):
        assert text in shown
    plan = json.loads(out.read_text())
    assert plan["fits"] and plan["layout"]["data_parallel_size"] == 4 and plan["proposals"] == []
    assert plan["ranks"]["leader"]["update"]["main gradients"] == 2 * plan["ranks"]["leader"]["update"]["parameters"]
    assert plan["time"]["total"] == pytest.approx(
        sum(plan["time"][name] for name in ("rollout", "old_log_prob", "ref", "update", "publish", "save"))
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_named_and_fails(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--nodes", "16", "--gpu-memory-gb", "40", "--top", "0", model, *LAYOUT]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the plan does not fit") and "activations" in error and error.count("\n") == 1


def test_ranks_that_cannot_hold_the_layout_are_told_one_that_they_can(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", "1", "--gpu-memory-gb", "180", "--host-memory-gb", "2048"]
    assert main(["plan", *arguments, model, *LAYOUT]) == 2
    shown = capsys.readouterr()
    assert "8 ranks cannot hold model replicas of 32 ranks" in shown.err and shown.err.count("\n") == 1
    assert "TP8 PP1 DP1" in shown.out
    assert main(["plan", "--nodes", "1", model, *LAYOUT]) == 2
    assert "None fits, of " in capsys.readouterr().out
    # Another layout would not help here, and nobody asked there.
    assert main(["plan", *arguments, model, *LAYOUT, "data.train_batch_size=3"]) == 2
    assert main(["plan", *arguments, "--top", "0", model, *LAYOUT]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--picture", "plan.jpg"], "--picture"),
        (["--top", "-1"], "--top"),
        (["--nodes", "3"], "24 ranks"),
        (["--engine", "separate"], "engine_nodes"),
        (["--gpu-memory-gb", "0"], "gpu_memory_gb"),
    ],
)
def test_bad_options_are_refused(
    model: str, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, model, *LAYOUT]) == 2
    assert named in capsys.readouterr().err


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--top", "0"]) == 2
    assert "actor_rollout_ref.model.path" in capsys.readouterr().err
