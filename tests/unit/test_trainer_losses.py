"""Loss and figures of a micro-batch against plain sums; which implementation the configuration takes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear_megatron.algorithms import drawn_loss
from spear_megatron.algorithms.config import PolicyLossConfig, RolloutCorrectionConfig
from spear_megatron.algorithms.covariance import ClipCovRule, KlCovRule, token_keys
from spear_megatron.kernels import cov_select, policy_loss_compiled
from spear_megatron.kernels.policy_surrogates import SURROGATE_MODES, token_surrogate
from spear_megatron.trainer import objective
from spear_megatron.trainer.config import ActorConfig
from spear_megatron.trainer.losses import PolicyLoss, SurrogateRule
from spear_megatron.types import MicroBatch, Row, TrajectoryId

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "kl_cov_coef": 0.7}
DRAWS = {"clip_cov": ClipCovRule(0.05, 0.0, 9.0, 0.2, 0.28), "kl_cov": KlCovRule(0.05)}


def make_batch(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, MicroBatch]:
    """(log-probs, entropy, micro-batch); NaN stands where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(6, count, generator=generator)
    log_probs, old, engine, reference = -3 * uniform[0] + 0.4 * torch.randn(4, count, generator=generator)
    mask, replayed = uniform[1] < 0.7, uniform[2] < 0.3
    beside = torch.where(mask, 0.0, torch.nan)
    batch = MicroBatch(
        *(torch.zeros(0, dtype=torch.int64),) * 4,
        loss_mask=mask,
        token_weight=uniform[3] / count * mask,
        advantages=torch.randn(count, generator=generator),
        old_log_probs=old + beside,
        rollout_log_probs=engine,
        ref_log_probs=reference,
        surrogate_weight=torch.where(uniform[4] < 0.1, 0.0, uniform[4]),
        replayed=replayed,
        selected=(uniform[5] < 0.2) & mask,
        token_keys=token_keys(seed, count, "eager"),
        rows=(),
    )
    return (log_probs + beside).requires_grad_(), uniform[1].clone().requires_grad_(), batch


def make_loss(mode: str, implementation: str, draw: bool = False, **fields: Any) -> PolicyLoss:
    rule = SurrogateRule(mode=mode, **CLIP, draw=DRAWS[mode] if draw else None, implementation=implementation)
    return PolicyLoss(rule=rule, replay_rule=rule, **fields)


def run(loss: PolicyLoss, count: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, float]]:
    log_probs, entropy, batch = make_batch(count, seed)
    value, figures = loss(log_probs, entropy, batch)
    value.backward()
    found = {name: float(figure) for name, figure in (figures.sums | figures.maxima).items()}
    return value.detach(), [log_probs.grad, entropy.grad], found


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_loss_and_figures_are_plain_sums(mode: str, implementation: str) -> None:
    extras = {"entropy_weight": 0.01, "replay_entropy_weight": 0.02, "kl_coef": 0.1, "kl_kind": "k1"}
    value, _, found = run(make_loss(mode, implementation, **extras), 500, seed=3)
    log_probs, entropy, batch = make_batch(500, seed=3)
    parts = {}
    for name, mask in (("own", batch.loss_mask & ~batch.replayed), ("replay", batch.loss_mask & batch.replayed)):
        selected = batch.selected[mask] if mode in DRAWS else None
        columns = [value[mask].detach() for value in (log_probs, batch.old_log_probs, batch.advantages)]
        surrogate = token_surrogate(mode, *columns, selected=selected, **CLIP)
        weight = (batch.token_weight * batch.surrogate_weight)[mask]
        loss = -(weight.double() * surrogate.surrogate.double()).sum().item()
        parts[name] = (mask, surrogate, loss, int(batch.selected[mask].sum()))
    mask, own, loss, selected = parts["own"]
    kl = (log_probs - batch.ref_log_probs)[mask]
    expected = {
        "pg_loss": loss, "tokens": int(mask.sum()), "entropy": entropy[mask].sum().item(), "cov_selected": selected,
        "clipped": int(own.clipped.sum()), "dual_clipped": int(own.dual_clipped.sum()),
        "log_ratio": own.log_ratio.sum().item(), "correction": batch.surrogate_weight[mask].sum().item(),
        "dropped": int((batch.surrogate_weight[mask] == 0).sum()), "ref_kl": kl.sum().item(),
        "kl_loss": (batch.token_weight[mask] * kl).sum().item(),
    }  # fmt: skip
    replay_mask, replay, replay_loss, replay_selected = parts["replay"]
    expected |= {
        "replay_pg_loss": replay_loss, "replay_tokens": int(replay_mask.sum()), "cov_replay_selected": replay_selected,
        "replay_clipped": int(replay.clipped.sum()),
    }  # fmt: skip
    total = loss + replay_loss + 0.1 * expected["kl_loss"] - 0.01 * expected["entropy"]
    expected["loss"] = total - 0.02 * entropy[replay_mask].sum().item()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert value.item() == pytest.approx(expected["loss"], rel=2e-5)
    assert found["replay_ratio"] == pytest.approx(math.exp(replay.log_ratio.max().item()), rel=1e-6)


@pytest.mark.parametrize("mode", SURROGATE_MODES)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("draw", [False, True])
def test_both_implementations_agree(mode: str, on_policy: bool, draw: bool) -> None:
    results = [
        run(make_loss(mode, name, draw and mode in DRAWS, on_policy=on_policy, kl_coef=0.1), 3000, seed=5)
        for name in ("eager", "auto")
    ]
    (loss, gradients, figures), (other, other_gradients, other_figures) = results
    torch.testing.assert_close(other, loss)
    assert gradients[1] is None and other_gradients[1] is None  # no entropy bonus
    torch.testing.assert_close(other_gradients[0], gradients[0], rtol=2e-6, atol=1e-9)
    assert other_figures == pytest.approx(figures, rel=1e-5, abs=1e-6)
    assert gradients[0].isfinite().all()
    if draw and mode in DRAWS:
        assert figures["cov_selected"] > 10 and figures["cov_replay_selected"] > 5


def test_a_micro_batch_without_own_tokens() -> None:
    log_probs, entropy, batch = make_batch(40, seed=1)
    batch.loss_mask[:] = False
    loss, figures = make_loss("vanilla", "auto")(log_probs, entropy, batch)
    loss.backward()
    assert loss == 0 and not log_probs.grad.any() and figures.sums["tokens"] == 0


def refuse(*_: Any) -> None:
    raise AssertionError("a compiled kernel is used")


def make_row(seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(64, generator=generator)
    mask = torch.rand(64, generator=generator) < 0.8
    return Row(
        TrajectoryId(0, 0, seed), 0, torch.zeros(64, dtype=torch.int64), mask, log_probs,
        torch.randn(64, generator=generator), log_probs,
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["mini_batch", "micro_batch"])
@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_the_configuration_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch, scope: str, kernels: str) -> None:
    monkeypatch.setattr(objective, "gather_objects", lambda _, value: [value])
    config = ActorConfig(
        kernels=kernels, policy_loss=PolicyLossConfig(loss_mode="clip_cov", cov_scope=scope, clip_cov_lb=0.0)
    )
    parallel: Any = SimpleNamespace(is_leader=True, dp_size=1)
    builder = objective.ObjectiveBuilder(
        config=config, correction=RolloutCorrectionConfig(), parallel=parallel, seed=1, max_response_length=64,
        mini_batch_rows=2, evaluate=lambda rows: [row.old_log_probs for row in rows],
    )  # fmt: skip
    if kernels == "eager":
        monkeypatch.setattr(cov_select, "compiled_module", refuse)
        monkeypatch.setattr(policy_loss_compiled, "compiled_module", refuse)
        monkeypatch.setattr(drawn_loss, "draw_and_differentiate", refuse)
        monkeypatch.setattr(drawn_loss, "load_autograd", refuse)
    built = builder.build([make_row(1), make_row(2)], objective.ReplayTerm(), on_policy=True, key=objective.UpdateKey())
    assert built.loss.rule.implementation == built.loss.replay_rule.implementation == kernels
    assert bool(built.metrics) == (scope == "mini_batch")
    log_probs, entropy, batch = make_batch(300, seed=2)
    assert built.loss(log_probs, entropy, batch)[0].isfinite()
