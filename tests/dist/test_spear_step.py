"""The joint update J_GRPO + gamma * J_SIL: the same in every layout, and equal to plain torch with transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import run_ranks
from spear_step import COV, GAMMA, noisy, replay_rows, spear_step_on_rank
from tiny import make_tiny_hf
from train_step import (
    BASELINE, MAX_RESPONSE_LENGTH, TEMPERATURE, Layout, build_actor, largest_gradient_error, make_rows, share_of_rank,
)  # fmt: skip

from spear_megatron.algorithms.config import PolicyLossConfig
from spear_megatron.trainer.objective import ReplayTerm
from spear_megatron.types import TrajectoryId

LAYOUTS = (
    Layout("1 rank, one micro-batch", max_tokens=2048),
    Layout("1 rank, rows alone", max_tokens=50),
    Layout("DP2", 2),
    Layout("TP2", 2, tp=2),
    Layout("PP2", 2, pp=2, max_tokens=64),
    Layout("TP2xPP2", 4, tp=2, pp=2),
    Layout("CP2xPP2", 4, cp=2, pp=2, max_tokens=64),
)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-cov": (COV, {"loss_agg_mode": "seq-mean-token-sum-norm", "clip_ratio_high": 0.28}),
    "kl-cov": ({**COV, "loss_mode": "kl-cov"}, {"loss_agg_mode": "token-mean"}),
    "vanilla and clip-cov on replay": (
        {**COV, "loss_mode": "vanilla", "loss_mode_replay": "clip-cov"},
        {"correction": {"mode": "tis", "cap": 1.2}, "loss_agg_mode": "seq-mean-token-mean"},
    ),
    "gpg, sequence mask": (
        {"loss_mode": "gpg"},
        {"correction": {"mode": "sequence_mask", "low": 0.9, "high": 1.1}, "loss_rows": "segment"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("tiny") / "qwen3"))


@pytest.fixture(scope="module")
def baseline(folder: str) -> dict[str, dict[str, Any]]:
    return {name: run_ranks(spear_step_on_rank, 1, folder, BASELINE, *case)[0] for name, case in CASES.items()}


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["skipped"] is None
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    error, name = largest_gradient_error(result["gradients"], expected["gradients"])
    assert error <= 1e-5, name
    for part in ("update", "figures"):
        assert result[part] == pytest.approx(expected[part], rel=1e-4, abs=1e-6)
    assert result["selected"] == expected["selected"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_joint_step_does_not_depend_on_the_layout(folder: str, baseline: dict, layout: Layout) -> None:
    result = run_ranks(spear_step_on_rank, layout.world_size, folder, layout, *CASES["clip-cov"])[0]
    assert_same(result, baseline["clip-cov"])
    assert result["update"]["cov/selected"] >= 1 and result["update"]["cov/replay_selected"] >= 1
    assert sum(map(len, result["selected"].values())) == (
        result["update"]["cov/selected"] + result["update"]["cov/replay_selected"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "clip-cov"])
@pytest.mark.parametrize("layout", LAYOUTS[2:], ids=lambda layout: layout.name)
def test_nor_with_other_losses_and_corrections(folder: str, baseline: dict, layout: Layout, case: str) -> None:
    assert_same(run_ranks(spear_step_on_rank, layout.world_size, folder, layout, *CASES[case])[0], baseline[case])


def test_the_cases_differ(baseline: dict) -> None:
    assert len({round(part["loss"], 9) for part in baseline.values()}) == len(CASES)
    assert baseline["vanilla and clip-cov on replay"]["update"]["correction/weight_mean"] < 1.2
    assert 0 < baseline["gpg, sequence mask"]["update"]["correction/dropped"] < 1


def plain_torch_joint_step(folder: str, selected: dict[tuple, list[int]]) -> dict[str, Any]:
    """J_GRPO + gamma * J_SIL row by row on the transformers model, given the tokens that clip-cov selected."""
    import transformers

    actor, _, _ = build_actor(folder, BASELINE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(())
    for rows, gamma in ((make_rows(), 1.0), (replay_rows(), GAMMA)):
        members = noisy(actor, rows, 0.3)
        normaliser = len({row.trajectory for row in members}) * MAX_RESPONSE_LENGTH
        for row in members:
            logits = model(row.ids.long()[None]).logits[0, :-1] / TEMPERATURE
            logp = logits.log_softmax(-1).gather(-1, row.ids[1:].long()[:, None])[:, 0]
            ratio = (logp - row.old_log_probs[1:]).exp()
            surrogate = torch.min(ratio * row.advantages[1:], ratio.clamp(0.8, 1.28) * row.advantages[1:])
            keep = row.response_mask[1:].float()
            for position in selected.get((row.trajectory, row.segment), []):
                keep[position - 1] = 0.0
            total = total - gamma * (keep * surrogate).sum() / normaliser
    total.backward()
    return {"loss": float(total.detach()), "gradients": {name: p.grad for name, p in model.named_parameters()}}


def test_equals_plain_torch_on_the_transformers_model(folder: str, baseline: dict) -> None:
    result = baseline["clip-cov"]
    expected = run_ranks(plain_torch_joint_step, 1, folder, result["selected"])[0]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    gradients = {name: tensor for name, tensor in result["gradients"].items() if name in expected["gradients"]}
    error, name = largest_gradient_error(gradients, expected["gradients"])
    assert error <= 1e-5, name


def volume_on_rank(folder: str, copies: int) -> float:
    """Loss of the self-imitation term alone, with every trajectory so many times."""
    actor, _, _ = build_actor(folder, BASELINE, loss_agg_mode="seq-mean-token-sum-norm")
    once = noisy(actor, replay_rows(), 0.3)
    rows = [
        replace(row, trajectory=TrajectoryId(-3 - copy, *row.trajectory[1:])) for copy in range(copies) for row in once
    ]
    return actor.policy_gradients([], replay=ReplayTerm(rows=rows, coefficient=GAMMA))[1].sums["loss"]


def test_the_volume_of_replay_is_no_second_coefficient(folder: str) -> None:
    once, twice = (run_ranks(volume_on_rank, 1, folder, copies)[0] for copies in (1, 2))
    assert once != 0 and twice == pytest.approx(once, rel=1e-5)


def scope_on_rank(folder: str, layout: Layout) -> dict[str, float]:
    loss = PolicyLossConfig(**{**COV, "cov_scope": "micro_batch"})
    actor, _, parallel = build_actor(folder, layout, policy_loss=loss)
    return actor.update(noisy(actor, share_of_rank(make_rows(), parallel), 0.3)).metrics


def test_the_scope_of_a_micro_batch_depends_on_the_packing_but_not_on_tensor_ranks(folder: str) -> None:
    one = run_ranks(scope_on_rank, 1, folder, BASELINE)[0]
    tensor = run_ranks(scope_on_rank, 2, folder, Layout("TP2", 2, tp=2))[0]
    alone = run_ranks(scope_on_rank, 1, folder, Layout("rows alone", max_tokens=50))[0]
    assert one["cov/selected"] == tensor["cov/selected"] and one["actor/loss"] == pytest.approx(tensor["actor/loss"])
    assert one["cov/selected"] >= 1 and alone["actor/loss"] != pytest.approx(one["actor/loss"], rel=1e-4)


def denominator_on_rank(folder: str, layout: Layout, denominator: str) -> float:
    fields = {"loss_agg_mode": "seq-mean-token-sum-norm", "sum_norm_denominator": denominator}
    actor, _, _ = build_actor(folder, layout, **fields)
    return actor.policy_gradients(noisy(actor, make_rows(), 0.3))[1].sums["loss"]


def test_the_released_denominator_weighs_rows_by_their_company(folder: str) -> None:
    alone, crowded = Layout("alone", max_tokens=50), Layout("crowded", max_tokens=4096)
    right, same = (run_ranks(denominator_on_rank, 1, folder, layout, "rows")[0] for layout in (alone, crowded))
    assert right == pytest.approx(same, rel=1e-5)
    by_alone, by_crowded = (
        run_ranks(denominator_on_rank, 1, folder, layout, "micro_batch_share")[0] for layout in (alone, crowded)
    )
    trajectories = len({row.trajectory for row in make_rows()})
    # 13 of the 14 rows have sampled tokens; a full mini-batch would have 16 trajectories.
    assert by_crowded == pytest.approx(right * trajectories * 13 / 16, rel=1e-5)
    assert abs(by_alone) < 0.25 * abs(by_crowded)
