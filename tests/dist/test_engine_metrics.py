"""Figures of the engines of several leaders become one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from harness import run_ranks

from spear_megatron.parallel.state import initialize
from spear_megatron.trainer.frame import RunFrame


def figures_on_a_rank(kept: bool) -> Any:
    parallel = initialize(1, 1)
    own = {"engine/requests": 1.0 + parallel.rank, f"engine_server/{parallel.rank}/lost": 1.0}
    parts: Any = SimpleNamespace(parallel=parallel, engine_metrics=(lambda: own) if kept else None)
    return RunFrame._engine_metrics(SimpleNamespace(parts=parts))  # type: ignore[arg-type]


def test_figures_are_summed_over_the_leaders() -> None:
    summed = {"engine/requests": 3.0, "engine_server/0/lost": 1.0, "engine_server/1/lost": 1.0}
    assert run_ranks(figures_on_a_rank, 2, True) == [summed, summed]
    assert run_ranks(figures_on_a_rank, 2, False) == [{}, {}]
