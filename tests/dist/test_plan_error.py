"""The planner against live tensor bytes: every phase of a training step, in layouts of up to two ranks, within 10 %."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from harness import run_ranks
from plan_measure import Case, measure_on_rank, predict
from tiny import make_tiny_hf

TOLERANCE = 0.10
QWEN3: dict[str, Any] = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 384,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
QWEN2: dict[str, Any] = {k: v for k, v in QWEN3.items() if k != "head_dim"} | {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
CASES = (
    ("qwen3", Case("1 rank")),
    ("qwen3", Case("1 rank, bf16", bf16=True)),
    ("qwen3", Case("1 rank, full recomputation", recompute=True)),
    ("qwen3", Case("1 rank, block recomputation, bf16", recompute="block", bf16=True)),
    ("qwen3", Case("1 rank, selective recomputation", recompute="selective")),
    ("qwen3", Case("1 rank, full recomputation of few tokens", recompute=True, length=17)),
    ("qwen3", Case("DP2, full recomputation of few tokens", world_size=2, recompute=True, length=17)),
    ("qwen3", Case("1 rank, sliced logits", max_logits_mb=1)),
    ("qwen3", Case("DP2", world_size=2)),
    ("qwen3", Case("DP2, no distributed optimizer, bf16", world_size=2, distributed_optimizer=False, bf16=True)),
    ("qwen3", Case("TP2, one row to a micro-batch", world_size=2, tp=2, per_batch=1, rows=4)),
    ("qwen3", Case("PP2, bf16", world_size=2, pp=2, bf16=True)),
    ("qwen3", Case("PP2 VPP2", world_size=2, pp=2, vpp=2)),
    ("qwen3", Case("CP2", world_size=2, cp=2)),
    ("qwen3", Case("CP2, bf16, longer rows", world_size=2, cp=2, bf16=True, length=513, per_batch=1, rows=2)),
    ("qwen2", Case("CP2, full recomputation", world_size=2, cp=2, recompute=True)),
    ("qwen2", Case("TP2 SP, bf16", world_size=2, tp=2, sequence_parallel=True, bf16=True)),
    ("qwen2", Case("PP2", world_size=2, pp=2)),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"qwen3": QWEN3, "qwen2": QWEN2}
    return {arch: str(make_tiny_hf(folder / arch, arch, **fields)) for arch, fields in sizes.items()}


@pytest.mark.parametrize(("arch", "case"), CASES, ids=[f"{arch}, {case.name}" for arch, case in CASES])
def test_predictions_are_within_a_tenth_of_the_measured_peak(models: dict[str, str], arch: str, case: Case) -> None:
    folder, far = models[arch], {}
    for rank, measured in enumerate(run_ranks(measure_on_rank, case.world_size, folder, case)):
        predicted = predict(folder, case, rank)
        assert measured.keys() == predicted.keys()
        for phase, size in measured.items():
            error = sum(nbytes for _, nbytes in predicted[phase]) / size - 1
            if abs(error) > TOLERANCE:
                far[rank, phase] = f"{error:+.1%}"
    assert far == {}


def test_a_wrong_layout_is_told_apart(models: dict[str, str]) -> None:
    case = Case("1 rank")
    (measured,) = run_ranks(measure_on_rank, 1, models["qwen3"], case)
    wrong = predict(models["qwen3"], replace(case, recompute=True), 0)
    assert sum(nbytes for _, nbytes in wrong["update"]) < 0.8 * measured["update"]
