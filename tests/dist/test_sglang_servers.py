"""Servers of a run of two ranks: one starts them, both know them, both stop when none starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import RankError, run_ranks
from stand_in_fleet import gone, quick_config, stand_in_python


def servers_on_rank(folder: str, changes: dict[str, Any]) -> tuple[tuple[str, ...], bool, list[int]]:
    """URLs, whether this rank started them, and the processes of this rank's guards."""
    from spear_megatron.parallel.state import initialize
    from spear_megatron.rollout.sglang.command import ServerSpec
    from spear_megatron.rollout.sglang.start import open_servers

    parallel = initialize(tp=2, timeout_s=60)
    spec = ServerSpec(model_path="model", dtype="float32", context_length=64, max_running_requests=1, on_cpu=True)
    config = quick_config(python=f"{folder}/stand_in_python", **changes)
    with open_servers(config, spec, parallel, Path(folder)) as servers:
        children = [child.pid for child in psutil.Process().children(recursive=True) if "guard" in str(child.cmdline())]
        return servers.urls, servers.fleet is not None, children


def test_one_rank_starts_servers_that_both_know_and_they_end_with_the_body(tmp_path: Path) -> None:
    stand_in_python(tmp_path)
    (first, owns, pids), (second, other, none) = run_ranks(servers_on_rank, 2, str(tmp_path), {"num_servers": 2})
    assert first == second and len(set(first)) == 2
    assert owns and not other and len(pids) == 2 and none == []
    assert all(gone(pid) for pid in pids)
    assert sorted(path.name for path in (tmp_path / "sglang").iterdir()) == ["server_0", "server_1"]


def test_both_ranks_stop_with_the_reason_when_none_starts(tmp_path: Path) -> None:
    stand_in_python(tmp_path, "--exit", "7")
    with pytest.raises(RankError) as raised:
        run_ranks(servers_on_rank, 2, str(tmp_path), {"max_restarts": 0})
    text = str(raised.value)
    assert text.count("start of the SGLang servers failed. rank 0: of 1 SGLang servers none serves") == 2
    assert "exited with code 7" in text and "out of memory, for instance" in text
