"""Commands that roll out with a running server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spear_megatron.__main__ import main
from spear_megatron.rollout.sglang.control import ControlClient

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
    fresh_server: str, tiny_folder: Path, tmp_path: Path
) -> None:
    key = "actor_rollout_ref.rollout"
    known = evaluate(tiny_folder, tmp_path / "embedded")
    found = evaluate(
        tiny_folder, tmp_path / "sglang", f"{key}.name=sglang", f"{key}.sglang.servers=[{fresh_server}]"
    )
    assert len(found) == 6
    for one, other in zip(found, known, strict=True):
        assert one["error"] is None and one["id"] == other["id"] and one["stop_reason"] == other["stop_reason"]
        assert [part["ids"] for part in one["segments"]] == [part["ids"] for part in other["segments"]]
        assert all(part["policy_versions"] is None for part in one["segments"])  # nobody numbered the weights


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


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_a_run_trains_with_a_server_that_always_has_its_weights(
    way: str, sglang_server: str, tiny_folder: Path, tmp_path: Path
) -> None:
    key = "actor_rollout_ref.rollout"
    arguments = [
        "train", f"actor_rollout_ref.model.path={tiny_folder}", f"trainer.default_local_dir={tmp_path / 'run'}",
        "actor_rollout_ref.model.dtype=fp32", "trainer.total_training_steps=2", "trainer.save_freq=-1",
        "trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.save_hf=false", "data.train_batch_size=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2", f"{key}.n=2", "data.generator.num_train=8",
        "actor_rollout_ref.actor.optim.lr=1e-2", f"{key}.name=sglang", f"{key}.sglang.servers=[{sglang_server}]",
        f"{key}.sglang.weights.way={way}", *SIZES,
    ]  # fmt: skip
    assert main(arguments) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "weights/servers" in step]
    assert len(steps) == 2
    for step in steps:
        assert step["weights/servers"] == 1 and step["weights/stale_servers"] == step["weights/resends"] == 0
        assert 0 < step["weights/probe_difference"] < 1e-3
        assert step["training/rollout_logp_abs_diff/max"] < 1e-3
    client = ControlClient(sglang_server)
    assert client.server_info().weight_version == "2"
    client.update_from_disk(str(tiny_folder), "default", flush=False)
    client.flush_cache()
    client.close()
