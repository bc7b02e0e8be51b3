"""Process groups of every layout: coordinates, groups and leaders."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks

from spear_megatron.parallel.state import initialize


def _coordinates(tp: int, pp: int, vpp: int | None, cp: int = 1) -> dict[str, object]:
    state = initialize(tp=tp, pp=pp, vpp=vpp, cp=cp, timeout_s=60)
    total = torch.tensor([state.rank + 1])
    dist.all_reduce(total, group=state.cpu_group)
    state.store.set(f"key-{state.rank}", str(state.rank))
    neighbour = state.store.get(f"key-{(state.rank + 1) % state.world_size}")
    result = {
        "coordinates": (state.tp_rank, state.dp_rank, state.pp_rank),
        "sizes": (state.tp_size, state.dp_size, state.pp_size),
        "model": dist.get_process_group_ranks(state.model_group),
        "leader_rank": state.leader_rank,
        "leaders": None if state.leader_group is None else dist.get_process_group_ranks(state.leader_group),
        "is_leader": state.is_leader,
        "is_last_stage": state.is_last_stage,
        "total": int(total),
        "neighbour": int(neighbour),
    }
    state.destroy()
    return result


LAYOUTS = [(1, 1, None, 2), (2, 1, None, 2), (1, 2, 2, 2), (2, 1, None, 4)]


def test_context_parallel_ranks_belong_to_one_model_copy() -> None:
    results = run_ranks(_coordinates, 8, 2, 2, None, 2)
    for rank, result in enumerate(results):
        tp_rank, dp_rank, pp_rank = result["coordinates"]
        assert (rank % 2, dp_rank, rank // 4) == (tp_rank, 0, pp_rank)
        assert result["model"] == list(range(8)) and result["leaders"] == ([0] if rank == 0 else None)
    results = run_ranks(_coordinates, 4, 1, 1, None, 2)
    assert [result["model"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result["is_leader"] for result in results] == [True, False, True, False]
    assert [result["leaders"] for result in results if result["is_leader"]] == [[0, 2]] * 2


@pytest.mark.parametrize(("tp", "pp", "vpp", "world"), LAYOUTS)
def test_coordinates_and_groups(tp: int, pp: int, vpp: int | None, world: int) -> None:
    results = run_ranks(_coordinates, world, tp, pp, vpp)
    dp = world // (tp * pp)
    leaders = sorted({r["leader_rank"] for r in results})
    assert len(leaders) == dp
    for rank, result in enumerate(results):
        tp_rank, dp_rank, pp_rank = result["coordinates"]
        assert rank == tp_rank + tp * (dp_rank + dp * pp_rank)
        assert result["sizes"] == (tp, dp, pp)
        assert rank in result["model"] and len(result["model"]) == tp * pp
        assert result["leader_rank"] == tp * dp_rank
        assert result["is_leader"] == (rank == result["leader_rank"])
        assert result["leaders"] == (leaders if result["is_leader"] else None)
        assert result["is_last_stage"] == (pp_rank == pp - 1)
        assert result["total"] == world * (world + 1) // 2
        assert result["neighbour"] == (rank + 1) % world


def _fail_on_rank_one() -> None:
    state = initialize(timeout_s=20)
    if state.rank == 1:
        raise ValueError("only rank one is unhappy")


@pytest.mark.slow
def test_an_error_of_one_rank_is_shown_and_the_next_job_runs() -> None:
    with pytest.raises(RankError, match="only rank one is unhappy"):
        run_ranks(_fail_on_rank_one, 2)
    assert len(run_ranks(_coordinates, 2, 1, 1, None)) == 2


def _initialize_with(tp: int, pp: int, vpp: int | None, cp: int) -> None:
    initialize(tp=tp, pp=pp, vpp=vpp, cp=cp)


def test_impossible_sizes_are_refused_by_name() -> None:
    for arguments, message in [
        ((2, 1, None, 1), "tensor_model_parallel_size=2"),
        ((1, 1, 2, 1), "virtual_pipeline_model_parallel_size=2"),
        ((1, 1, None, 2), "context_parallel_size=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            _initialize_with(*arguments)


def test_a_single_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):  # a destroyed state can be followed by another
        state = initialize()
        try:
            assert (state.world_size, state.is_leader, state.is_last_stage) == (1, True, True)
        finally:
            state.destroy()
