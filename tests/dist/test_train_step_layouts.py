"""One training step is the same in every layout and packing, and equals plain torch on the transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import (
    BASELINE, LAYOUTS, MAX_RESPONSE_LENGTH, TEMPERATURE, Layout, build_actor, largest_gradient_error, make_rows,
    share_of_rank, step_on_rank, with_trainer_log_probs,
)  # fmt: skip

TERMS = {
    "entropy_coeff": 0.01,
    "use_kl_loss": True,
    "kl_loss_coef": 0.05,
    "clip_ratio_high": 0.28,
    "loss_agg_mode": "seq-mean-token-mean",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("tiny") / "qwen3"))


@pytest.fixture(scope="module")
def baseline(folder: str) -> dict[str, dict[str, Any]]:
    return {name: run_ranks(step_on_rank, 1, folder, BASELINE, fields)[0] for name, fields in CASES.items()}


CASES: dict[str, dict[str, Any]] = {"surrogate": {}, "all terms": TERMS}


def assert_same_step(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["skipped"] is None
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    error, name = largest_gradient_error(result["gradients"], expected["gradients"])
    assert error <= 1e-5, name
    for part in ("before", "update", "figures"):
        assert result[part] == pytest.approx(expected[part], rel=1e-4, abs=1e-6)
    # Adam divides by the gradient's own size, so the weights after a step agree less closely than the gradients.
    assert result["after"] == pytest.approx(expected["after"], rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_does_not_depend_on_the_layout(folder: str, baseline: dict, layout: Layout) -> None:
    result = run_ranks(step_on_rank, layout.world_size, folder, layout, CASES["surrogate"])[0]
    assert_same_step(result, baseline["surrogate"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_nor_with_entropy_bonus_and_kl_term(folder: str, baseline: dict, layout: Layout) -> None:
    result = run_ranks(step_on_rank, layout.world_size, folder, layout, CASES["all terms"])[0]
    assert_same_step(result, baseline["all terms"])


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{"arch": "qwen2"}, {"tie_word_embeddings": False, "head_dim": 16}], ids=str)
def test_other_models_agree_as_well(tmp_path: Path, overrides: dict) -> None:
    model = str(make_tiny_hf(tmp_path / "model", **overrides))
    expected = run_ranks(step_on_rank, 1, model, BASELINE, TERMS)[0]
    for layout in (Layout("TP2+SP", 2, tp=2, sequence_parallel=True), Layout("PP2", 2, pp=2), Layout("DP2", 2)):
        assert_same_step(run_ranks(step_on_rank, 2, model, layout, TERMS)[0], expected)


def plain_torch_step(folder: str, mode: str) -> dict[str, Any]:
    """The same loss row by row on the transformers model, without packing: an independent oracle."""
    import transformers

    actor, _, _ = build_actor(folder, BASELINE, **TERMS | {"loss_agg_mode": mode})
    rows, _ = with_trainer_log_probs(actor, make_rows())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_tokens = sum(int(row.response_mask.sum()) for row in rows)
    members = [row.trajectory for row in rows]
    tokens_of = {m: sum(int(row.response_mask.sum()) for row in rows if row.trajectory == m) for m in members}
    policy = kl_sum = entropy_sum = torch.zeros(())
    for row in rows:
        mask = row.response_mask[1:]
        if not mask.any():
            continue
        logits = model(row.ids.long()[None]).logits[0, :-1] / TEMPERATURE
        distribution = logits.log_softmax(-1)
        logp = distribution.gather(-1, row.ids[1:].long()[:, None])[:, 0][mask]
        ratio = (logp - row.old_log_probs[1:][mask]).exp()
        advantage = row.advantages[1:][mask]
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        surrogate = torch.where(advantage < 0, torch.max(surrogate, 3.0 * advantage), surrogate)
        reverse = row.ref_log_probs[1:][mask] - logp
        kl = reverse.exp() - reverse - 1
        scale = {
            "token-mean": 1 / num_tokens,
            "seq-mean-token-sum": 1 / len(tokens_of),
            "seq-mean-token-mean": 1 / (len(tokens_of) * tokens_of[row.trajectory]),
            "seq-mean-token-sum-norm": 1 / (len(tokens_of) * MAX_RESPONSE_LENGTH),
        }[mode]
        policy = policy - scale * surrogate.sum()
        kl_sum = kl_sum + scale * kl.sum()
        entropy_sum = entropy_sum - (distribution.exp() * distribution).sum(-1)[mask].sum()
    loss = policy + TERMS["kl_loss_coef"] * kl_sum - TERMS["entropy_coeff"] * entropy_sum / num_tokens
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": float(loss.detach()), "gradients": gradients, "entropy": float(entropy_sum.detach()) / num_tokens}


@pytest.mark.parametrize(
    "mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_equals_plain_torch_on_the_transformers_model(folder: str, mode: str) -> None:
    expected = run_ranks(plain_torch_step, 1, folder, mode)[0]
    result = run_ranks(step_on_rank, 1, folder, BASELINE, TERMS | {"loss_agg_mode": mode})[0]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["update"]["actor/entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
    gradients = {name: tensor for name, tensor in result["gradients"].items() if name in expected["gradients"]}
    error, name = largest_gradient_error(gradients, expected["gradients"])
    assert error <= 1e-5, name


def on_policy_on_rank(folder: str, layout: Layout) -> tuple[float, float]:
    """Gradient norms with the old log-probs from a pass of their own, and without one."""
    actor, _, parallel = build_actor(folder, layout)
    rows = share_of_rank(make_rows(), parallel)
    filled, _ = actor.log_probs(rows)
    _, _, with_pass = actor.policy_gradients(filled)
    _, _, without = actor.policy_gradients(rows, on_policy=True)
    return with_pass, without


def test_the_first_update_needs_no_log_prob_pass(folder: str) -> None:
    with_pass, without = run_ranks(on_policy_on_rank, 2, folder, Layout("DP2", 2))[0]
    assert without == pytest.approx(with_pass, rel=1e-5)


def needed_log_probs_on_rank(folder: str) -> list[str]:
    messages = []
    actor, _, _ = build_actor(folder, BASELINE, use_kl_loss=True)
    for rows in (make_rows(), actor.log_probs(make_rows())[0]):
        try:
            actor.update(rows)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_missing_log_probs_are_named(folder: str) -> None:
    old, reference = run_ranks(needed_log_probs_on_rank, 1, folder)[0]
    assert "old_log_probs" in old and "ref_log_probs" in reference
