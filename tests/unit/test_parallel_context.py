"""Cutting packed sequences over context-parallel ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_config_checks import HF_CONFIG
from test_trainer_deal import ALONE

from spear_megatron.cli.build import build_imitation
from spear_megatron.cli.preflight import print_plan
from spear_megatron.config.loader import load
from spear_megatron.config.schema import Config
from spear_megatron.data.packing import plan_packing
from spear_megatron.parallel.context import context_chunks, context_multiple, context_positions, gathered_order


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_every_token_is_on_one_rank_and_comes_back(size: int, chunk_lengths: list[int]) -> None:
    lengths = [length * context_multiple(size) for length in chunk_lengths]
    if not sum(lengths):
        return
    offsets = [0, *itertools.accumulate(lengths)]
    parts = [context_positions(offsets, rank, size) for rank in range(size)]
    assert {len(part) for part in parts} == {offsets[-1] // size}
    joined = torch.cat(parts)
    assert joined[gathered_order(tuple(offsets), size)].tolist() == list(range(offsets[-1]))


def test_ranks_share_the_work_of_causal_attention_equally() -> None:
    offsets = (0, 32, 40, 64)
    costs = []
    for rank in range(4):
        positions = context_positions(offsets, rank, 4)
        starts = torch.tensor(offsets[:-1])[torch.searchsorted(torch.tensor(offsets), positions, right=True) - 1]
        costs.append(int((positions - starts + 1).sum()))
    assert len(set(costs)) == 1


def test_a_chunk_sees_its_sequence_up_to_its_last_token() -> None:
    chunks = context_chunks((0, 4, 12), 1, 2)
    found = [(c.queries.start, c.queries.stop, c.first_key, c.end_key) for c in chunks]
    assert found == [(0, 1, 0, 2), (1, 2, 0, 3), (2, 4, 4, 8), (4, 6, 4, 10)]


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        context_positions((0, 6), 0, 2)


def test_a_plan_counts_the_padding_of_sequences() -> None:
    plan = plan_packing([5, 6, 3], max_tokens=16, sequence_multiple=4, length_multiple=4)
    assert plan.token_length in (12, 16) and plan.sequence_multiple == 4 and len(plan.bins) == 2
    with pytest.raises(ValueError, match="A row of 20 tokens"):
        plan_packing([17], max_tokens=19, sequence_multiple=4, length_multiple=4)


SPLIT = [f"actor_rollout_ref.actor.megatron.{name}_parallel_size={size}" for name, size in (
    ("context", 2), ("tensor_model", 3))]  # fmt: skip


def test_a_replayed_segment_must_fit_the_padded_budget_of_a_micro_batch(tmp_path: Path) -> None:
    given = [
        *SPLIT, "actor_rollout_ref.actor.megatron.sequence_parallel=true", f"trainer.default_local_dir={tmp_path}",
        "actor_rollout_ref.actor.enable_trajectory_replay=true",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4103",
    ]  # fmt: skip
    imitation = build_imitation(load(Config, None, given), ALONE)
    assert imitation is not None and imitation.buffer._max_tokens == 4103 // 12 * 12 == 4092
    imitation.buffer.close()


def test_the_plan_tells_all_factors_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    monkeypatch.setenv("WORLD_SIZE", "24")
    print_plan(load(Config, None, [*SPLIT, f"actor_rollout_ref.model.path={tmp_path}"]))
    assert "# layout: 24 ranks = tensor 3 x pipeline 1 x context 2 x data 4\n" in capsys.readouterr().out
