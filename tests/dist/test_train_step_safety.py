"""Steps that must not happen: non-finite ones and empty ones; the reference swap; supervised and bf16 steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import make_tiny_hf
from train_step import VOCAB, Layout, build_actor, make_rows, share_of_rank

SAFETY_LAYOUTS = (
    Layout("1 rank"),
    Layout("DP2", 2),
    Layout("TP2", 2, tp=2),
    Layout("PP2 VPP2", 2, pp=2, vpp=2, max_tokens=64),
    Layout("DP2xPP2", 4, pp=2, distributed_optimizer=False),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("tiny") / "qwen3"))


def state_of(actor: Any) -> list[torch.Tensor]:
    """Copies of everything that an update may change on this rank."""
    weights = [parameter.detach().clone() for chunk in actor.chunks for parameter in chunk.parameters()]
    states = [
        value.clone()
        for optimizer in actor.optimizer.megatron.chained_optimizers
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
        for value in (parameter.detach(), *optimizer.optimizer.state.get(parameter, {}).values())
        if isinstance(value, torch.Tensor)
    ]
    return [*weights, *states, torch.tensor([actor.optimizer.scheduler.num_steps, actor.optimizer.lr])]


def poisoned(rows: list, value: float, parallel: Any) -> list:
    """Rows of the last data-parallel rank get an advantage that spoils the loss or its gradient."""
    if parallel.dp_rank != parallel.dp_size - 1:
        return rows
    victim = next(row for row in rows if row.response_mask.any())
    return [replace(row, advantages=row.response_mask * value) if row is victim else row for row in rows]


def skip_on_rank(folder: str, layout: Layout, value: float) -> dict[str, Any]:
    actor, _, parallel = build_actor(folder, layout)
    rows, _ = actor.log_probs(share_of_rank(make_rows(), parallel))
    first = actor.update(rows)
    before = state_of(actor)
    bad = actor.update(poisoned(rows, value, parallel))
    untouched = all(torch.equal(a, b) for a, b in zip(before, state_of(actor), strict=True))
    good = actor.update(rows)
    moved = not all(torch.equal(a, b) for a, b in zip(before, state_of(actor), strict=True))
    return {"first": first, "bad": bad, "untouched": untouched, "good": good, "moved": moved}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37], ids=["nan", "inf", "gradient norm overflows"])
@pytest.mark.parametrize("layout", SAFETY_LAYOUTS, ids=lambda layout: layout.name)
def test_a_non_finite_step_is_skipped_everywhere(folder: str, layout: Layout, value: float) -> None:
    for outcome in run_ranks(skip_on_rank, layout.world_size, folder, layout, value):
        assert outcome["first"].skipped is None and outcome["good"].skipped is None
        assert outcome["bad"].skipped == "nonfinite"
        assert outcome["untouched"] and outcome["moved"]
        loss, norm = (outcome["bad"].metrics[f"actor/{name}"] for name in ("loss", "grad_norm"))
        assert not (math.isfinite(loss) and math.isfinite(norm))
        assert all(math.isfinite(number) for number in outcome["good"].metrics.values())


def empty_on_rank(folder: str, layout: Layout) -> tuple[str | None, bool, str | None]:
    actor, _, parallel = build_actor(folder, layout)
    rows, _ = actor.log_probs(share_of_rank(make_rows(), parallel))
    before = state_of(actor)
    masked = [replace(row, response_mask=torch.zeros_like(row.response_mask)) for row in rows]
    empty = actor.update(masked)
    for nothing in (masked, []):  # a mean of no tokens is no figure
        filled, metrics = actor.log_probs(nothing)
        assert metrics == {} and [row.ids for row in filled] == [row.ids for row in nothing]
    untouched = all(torch.equal(a, b) for a, b in zip(before, state_of(actor), strict=True))
    # One rank with nothing at all takes part like the others.
    alone = actor.update(rows if parallel.dp_rank == 0 else [])
    return empty.skipped, untouched, alone.skipped


@pytest.mark.parametrize("layout", SAFETY_LAYOUTS[:2], ids=lambda layout: layout.name)
def test_nothing_to_learn_skips_and_one_idle_rank_does_not(folder: str, layout: Layout) -> None:
    assert run_ranks(empty_on_rank, layout.world_size, folder, layout) == [("empty", True, None)] * layout.world_size


def reference_on_rank(folder: str, layout: Layout) -> tuple[bool, bool, bool]:
    from spear_megatron.trainer.reference import Reference

    actor, _, parallel = build_actor(folder, layout)
    rows = share_of_rank(make_rows(), parallel)
    reference = Reference(actor.chunks)
    initial, _ = actor.log_probs(rows)
    actor.update(initial)
    before = state_of(actor)
    referred = actor.reference_log_probs(rows, reference)
    restored = all(torch.equal(a, b) for a, b in zip(before, state_of(actor), strict=True))
    current, _ = actor.log_probs(rows)
    same = all(torch.equal(a.old_log_probs, b.ref_log_probs) for a, b in zip(initial, referred, strict=True))
    changed = any(not torch.equal(a.old_log_probs, b.old_log_probs) for a, b in zip(initial, current, strict=True))
    return same, restored, changed


@pytest.mark.parametrize("layout", SAFETY_LAYOUTS[1:4], ids=lambda layout: layout.name)
def test_the_reference_is_the_initial_policy_and_leaves_no_trace(folder: str, layout: Layout) -> None:
    assert run_ranks(reference_on_rank, layout.world_size, folder, layout) == [(True, True, True)] * layout.world_size


def supervised_on_rank(folder: str, layout: Layout, dtype: torch.dtype, steps: int) -> list[float]:
    actor, _, parallel = build_actor(folder, layout, dtype=dtype, lr=1e-2)
    rows = share_of_rank(make_rows(), parallel)
    return [actor.sft_update(rows).metrics["sft/loss"] for _ in range(steps)]


def plain_cross_entropy(folder: str) -> float:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in make_rows():
        mask = row.response_mask[1:]
        logits = model(row.ids.long()[None]).logits[0, :-1]
        targets = row.ids[1:].long()
        total += float(torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum"))
        tokens += int(mask.sum())
    return total / tokens


def test_a_supervised_step_is_the_global_token_mean(folder: str) -> None:
    expected = run_ranks(plain_cross_entropy, 1, folder)[0]
    for layout in SAFETY_LAYOUTS[:3]:
        (loss,) = run_ranks(supervised_on_rank, layout.world_size, folder, layout, torch.float32, 1)[0]
        assert loss == pytest.approx(expected, rel=1e-5)


def schedule_on_rank(folder: str, layout: Layout) -> list[tuple[float, float]]:
    actor, _, parallel = build_actor(folder, layout, lr=1e-2)
    rows = share_of_rank(make_rows(), parallel)
    metrics = [actor.sft_update(rows).metrics for _ in range(4)]
    return [(step["sft/loss"], step["sft/lr"]) for step in metrics]


def plain_schedule(folder: str) -> list[tuple[float, float]]:
    """torch's AdamW with decay on matrices, clipping at 1, warm-up over 2 and a cosine over 10 steps."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
    rows = make_rows()
    num_tokens = sum(int(row.response_mask.sum()) for row in rows)
    results = []
    for step in range(4):
        lr = 1e-2 * (0.5 + 0.25 * step) if step <= 2 else 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
        total = 0.0
        optimizer.zero_grad()
        for row in rows:
            mask = row.response_mask[1:]
            logits = model(row.ids.long()[None]).logits[0, :-1]
            targets = row.ids[1:].long()
            loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum") / num_tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        results.append((total, lr))
    return results


def test_optimizer_and_schedule_equal_torch_adamw(folder: str) -> None:
    expected = run_ranks(plain_schedule, 1, folder)[0]
    for layout in SAFETY_LAYOUTS[:2]:
        for step, (loss, lr) in enumerate(run_ranks(schedule_on_rank, layout.world_size, folder, layout)[0]):
            assert lr == pytest.approx(expected[step][1], rel=1e-9)
            assert loss == pytest.approx(expected[step][0], rel=1e-3)


@pytest.mark.parametrize("layout", [SAFETY_LAYOUTS[1], SAFETY_LAYOUTS[3]], ids=lambda layout: layout.name)
def test_bf16_supervised_steps_learn_the_rows(folder: str, layout: Layout) -> None:
    losses = run_ranks(supervised_on_rank, layout.world_size, folder, layout, torch.bfloat16, 9)[0]
    assert losses[0] > math.log(VOCAB) * 0.8
    assert losses[-1] < 0.8 * losses[0]
