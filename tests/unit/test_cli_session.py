"""What a training command opens first."""

from __future__ import annotations

import os

import pytest

from spear_megatron.cli.session import default_threads


@pytest.mark.parametrize(("cores", "local_ranks", "threads"), [(6, None, 6), (6, "2", 3), (6, "4", 1), (2, "8", 1)])
def test_threads_follow_the_cores_that_the_job_may_use(
    monkeypatch: pytest.MonkeyPatch, cores: int, local_ranks: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 96)  # of the host: a scheduler gave the job fewer
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    if local_ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    assert default_threads() == threads
