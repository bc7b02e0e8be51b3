"""Evaluation with a real server: killed in the middle and resumed, through SGLang's own and OpenAI's API, and AIME."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from spear_megatron.__main__ import main
from spear_megatron.observability.trajectories import read_trajectories

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
NUM_PROBLEMS, NUM_SAMPLES = 6, 8
SIZES = (
    "data.generator.levels=[1]", f"data.generator.num_val={NUM_PROBLEMS}", "data.max_prompt_length=128",
    "data.max_response_length=96", "env.sandbox.preload=[]", "trainer.num_threads=1",
    "actor_rollout_ref.rollout.max_num_seqs=2",
)  # fmt: skip


def lines(out: Path) -> list[str]:
    """Whole lines of the samples on disk."""
    paths = sorted((out / "samples").glob("*.jsonl"))
    return [line for path in paths for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_an_evaluation_killed_in_the_middle_goes_on_with_the_same_command(
    fresh_server: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = NUM_PROBLEMS * NUM_SAMPLES
    command = ["evaluate", "--model", str(tiny_folder), "--out", str(tmp_path), "--n", str(NUM_SAMPLES)]
    command += ["--top-p", "0.6", "--engine", "sglang", "--server", fresh_server, *SIZES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", "spear_megatron", *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240.0
        while len(lines(tmp_path)) < 5:
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or took nothing within 240 s"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait(30.0)
    before = lines(tmp_path)
    assert 5 <= len(before) < total and not (tmp_path / "report.json").exists()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"{len(before)} samples are in {tmp_path}, {total - len(before)} are missing" in shown
    assert "no weights are sent" in shown
    after = lines(tmp_path)
    assert after[: len(before)] == before and len(after) == total
    rows = [json.loads(line) for line in after]
    assert len({(row["task"], row["sample"]) for row in rows}) == total and not any(row["error"] for row in rows)
    report, page = ((tmp_path / name).read_bytes() for name in ("report.json", "report.html"))
    assert main(command) == 0 and "0 are missing" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in ("report.json", "report.html")] == [report, page]
    assert json.loads(report)["num_samples"] == total and {"pass@4", "maj@8"} <= json.loads(report)["metrics"].keys()


def greedy(folder: Path, out: Path, *engine: str) -> list[tuple[Any, ...]]:
    """(stop reason, token ids) of one greedy sample per problem."""
    command = ["evaluate", "--model", str(folder), "--out", str(out), "--temperature", "0", "--n", "1", *engine]
    assert main([*command, *SIZES]) == 0
    kept = [item.trajectory for item in read_trajectories(out, 0, "val")]
    return [(item.stop_reason, *(segment.ids.tolist() for segment in item.segments)) for item in kept]


def test_the_same_server_is_the_same_model_by_either_api(
    fresh_server: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server_version: tuple[int, ...],
) -> None:
    known = greedy(tiny_folder, tmp_path / "embedded", "--engine", "embedded")
    assert len(known) == NUM_PROBLEMS
    assert greedy(tiny_folder, tmp_path / "sglang", "--engine", "sglang", "--server", fresh_server) == known
    needs(server_version, (0, 5, 20), "token ids from the OpenAI API")  # of an older one the text is tokenised again
    assert greedy(tiny_folder, tmp_path / "openai", "--engine", "openai", "--server", f"{fresh_server}/v1") == known
    command = ["evaluate", "--model", str(tiny_folder), "--engine", "openai", "--server", fresh_server]
    assert main([*command, "--served-model", "other", "--out", str(tmp_path / "x"), *SIZES]) == 2
    assert f"--served-model=other is not served by {fresh_server}/v1/models" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "aime_2024.jsonl").exists(), reason=f"needs the AIME problems in {DATA}")
def test_aime_of_both_years_is_one_report(
    fresh_server: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import evaluate_aime

    command = ["--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--n", "2"]
    for year in ("2024", "2025"):
        few = (DATA / f"aime_{year}.jsonl").read_text().splitlines(keepends=True)[:3]
        (tmp_path / f"{year}.jsonl").write_text("".join(few))
        command += [f"--aime-{year}", str(tmp_path / f"{year}.jsonl")]
    command += ["--engine", "sglang", "--server", fresh_server, "data.max_prompt_length=1600"]
    command += ["data.max_response_length=32", "env.sandbox.preload=[]", "trainer.num_threads=1"]
    command += ["env.sandbox.workers=1"]
    assert evaluate_aime.main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["num_problems"], report["num_samples"], report["num_excluded"]) == (6, 12, 0)
    assert report["by_source"].keys() == report["strict"]["by_source"].keys() == {"aime-2024", "aime-2025"}
    assert {"official_mean@2", "official_maj@2"} <= report["official"]["aime-2024"].keys()
    known = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (known["--n"], known["--temperature"], known["--top-p"]) == (2, 1.0, 0.6)
    assert "AIME 2025: 3 problems" in capsys.readouterr().out
