"""Commands that roll out with a running server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SIZES = (
    "data.generator.levels=[1]", "data.generator.num_val=6", "data.max_prompt_length=128",
    "data.max_response_length=64", "env.sandbox.preload=[]", "trainer.num_threads=1",
)  # fmt: skip


def evaluate(folder: Path, out: Path, *engine: str) -> list[dict[str, Any]]:
    """Trajectories of a greedy evaluation."""
    command = ["evaluate", "--model", str(folder), "--out", str(out), "--temperature", "0", "--n", "1"]
    assert main([*command, *SIZES, *engine]) == 0
    (file,) = (out / "trajectories" / "val").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_greedy_evaluation_with_a_server_is_that_of_the_embedded_engine(
    sglang_server: str, tiny_folder: Path, tmp_path: Path
) -> None:
    key = "actor_rollout_ref.rollout"
    known = evaluate(tiny_folder, tmp_path / "embedded")
    found = evaluate(
        tiny_folder, tmp_path / "sglang", f"{key}.name=sglang", f"{key}.sglang.servers=[{sglang_server}]"
    )
    assert len(found) == 6
    for one, other in zip(found, known, strict=True):
        assert one["error"] is None and one["id"] == other["id"] and one["stop_reason"] == other["stop_reason"]
        assert [part["ids"] for part in one["segments"]] == [part["ids"] for part in other["segments"]]
        assert {version for part in one["segments"] for version in part["policy_versions"]} == {-1, 0}


def test_the_benchmark_runs(
    sglang_server: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import bench_sglang

    sizes = ["--episodes", "4", "--concurrency", "4", "--turns", "2", "--new", "32", "--period", "16", "--rounds", "1"]
    where = ["--server", sglang_server, "--model", str(tiny_folder), "--out", str(tmp_path / "report.json")]
    bench_sglang.main([*where, *sizes])
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(rate > 0 for rates in report["tokens_per_s"].values() for rate in rates) and report["ratio"] > 0
