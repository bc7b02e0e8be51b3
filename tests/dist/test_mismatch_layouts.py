"""The mismatch of engine and trainer is the same in every layout and packing, before the update and out of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from spear_step import replay_rows
from tiny import make_tiny_hf
from train_step import Layout, build_actor, make_rows, share_of_rank

from spear_megatron.types import Row

BASELINE = Layout("1 rank")
LAYOUTS = (
    Layout("1 rank, rows alone", max_tokens=50),
    Layout("DP2", 2),
    Layout("TP2+SP", 2, tp=2, sequence_parallel=True),
    Layout("PP2", 2, pp=2, max_tokens=64),
    Layout("DP2xTP2", 4, tp=2),
)
VERSION = 5


def versioned(rows: list[Row]) -> list[Row]:
    """Rows whose tokens come from versions 3 to 5, by a draw that belongs to the row."""
    made = []
    for row in rows:
        generator = torch.Generator().manual_seed(100 * row.trajectory.task + row.trajectory.sample)
        versions = torch.randint(3, VERSION + 1, (len(row.ids),), generator=generator, dtype=torch.int32)
        made.append(replace(row, policy_versions=torch.where(row.response_mask, versions, -1), first_turn=2))
    return made


def figures_on_rank(folder: str, layout: Layout, run_dir: str) -> dict[str, Any]:
    """Figures by the pass, by the first update (with replayed rows), masked trajectories, and the saved batch."""
    from spear_megatron.data.batch_files import BatchFiles
    from spear_megatron.parallel.errors import RunError
    from spear_megatron.rollout.config import MismatchConfig
    from spear_megatron.trainer.mismatch_gate import MismatchGate
    from spear_megatron.trainer.objective import ReplayTerm

    actor, _, parallel = build_actor(folder, layout)
    files = BatchFiles(Path(run_dir), parallel, keep=2, config_yaml="trainer: {}\n", model_path=folder)
    config = MismatchConfig(stop=0.1, mask=1.9)
    gate = MismatchGate(config, parallel, files.save)
    rows = share_of_rank(versioned(make_rows()), parallel)
    filled, _ = actor.log_probs(rows)
    by_pass = [row.old_log_probs for row in filled]
    replayed = [replace(row, old_log_probs=row.rollout_log_probs) for row in share_of_rank(replay_rows(), parallel)]
    replay = ReplayTerm(rows=replayed, coefficient=0.3)
    result = actor.update(rows, on_policy=True, replay=replay, keep_log_probs=True)
    assert result.log_probs is not None and len(result.log_probs) == len(rows) + len(replay.rows)
    of_update = result.log_probs[: len(rows)]
    try:
        gate.judge(6, rows, by_pass, VERSION)
        message = ""
    except RunError as error:
        message = str(error)
    return {
        "pass": {name: asdict(value) for name, value in gate.measure(rows, by_pass, VERSION).items()},
        "update": {name: asdict(value) for name, value in gate.measure(rows, of_update, VERSION).items()},
        "masked": gate.masked(rows, by_pass, VERSION),
        "message": message,
    }


def replay_on_rank(folder: str, layout: Layout, batch: str) -> dict[str, Any]:
    """The figures of a saved batch, computed again with the weights that it was computed with."""
    from spear_megatron.data.batch_files import read_batch
    from spear_megatron.rollout.config import MismatchConfig
    from spear_megatron.trainer.replay_batch import replay_batch

    actor, _, parallel = build_actor(folder, layout)
    bound = MismatchConfig().token_bound
    result = replay_batch(actor, parallel, read_batch(Path(batch)), token_bound=bound)
    assert result.saved_engine is not None and result.saved is not None
    return {
        "engine": {name: asdict(value) for name, value in result.engine.items()},
        "saved_engine": {name: asdict(value) for name, value in result.saved_engine.items()},
        "largest": result.saved["all"].abs_diff_max, "nonfinite": result.nonfinite,
        "tokens": sorted(zip(*result.tokens, strict=True)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_hf(tmp_path_factory.mktemp("tiny") / "qwen3"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def baseline(folder: str, run_dir: Path) -> dict[str, Any]:
    return run_ranks(figures_on_rank, 1, folder, BASELINE, str(run_dir))[0]


@pytest.mark.parametrize("layout", [BASELINE, *LAYOUTS], ids=lambda layout: layout.name)
def test_a_saved_batch_gives_its_figures_again(
    folder: str, baseline: dict[str, Any], run_dir: Path, layout: Layout
) -> None:
    batch = str(run_dir / "mismatch" / "step_000006")
    ranks = run_ranks(replay_on_rank, layout.world_size, folder, layout, batch)
    assert all(result == ranks[0] for result in ranks[1:])
    # Those of the saved log-probs bit for bit; those computed anew as close as layouts are, on one rank the same bits.
    assert ranks[0]["saved_engine"] == baseline["pass"] and ranks[0]["nonfinite"] == 0
    assert ranks[0]["largest"] < 1e-4 and (layout is not BASELINE or ranks[0]["engine"] == baseline["pass"])
    for name, figures in baseline["pass"].items():
        assert ranks[0]["engine"][name] == pytest.approx(figures, rel=1e-5, abs=1e-6), name
    assert len(ranks[0]["tokens"]) == baseline["pass"]["all"]["tokens"]


def test_the_first_update_tells_what_the_pass_tells(baseline: dict[str, Any]) -> None:
    assert {"all", "turn_2", "position_1", "lag_0", "lag_2"} <= baseline["pass"].keys()
    assert "turn_1" not in baseline["pass"]
    for name, figures in baseline["pass"].items():
        assert baseline["update"][name] == pytest.approx(figures, rel=1e-5, abs=1e-6)
    assert 0 < len(baseline["masked"]) < 12 and set(baseline["masked"].values()) == {"mismatch"}
    for text in ("step 6", "mismatch.stop=0.1", "worst in turn", "tokens of older versions: 1 behind", "replay-dump"):
        assert text in baseline["message"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_no_layout_changes_a_figure(folder: str, baseline: dict[str, Any], layout: Layout, tmp_path: Path) -> None:
    from spear_megatron.data.batch_files import read_batch

    ranks = run_ranks(figures_on_rank, layout.world_size, folder, layout, str(tmp_path))
    assert all(result == ranks[0] for result in ranks[1:]), "ranks disagree"
    for part in ("pass", "update"):
        assert ranks[0][part].keys() == baseline[part].keys()
        for name, figures in baseline[part].items():
            assert ranks[0][part][name] == pytest.approx(figures, rel=1e-5, abs=1e-6), name
    assert ranks[0]["masked"] == baseline["masked"]
    saved = read_batch(tmp_path / "mismatch" / "step_000006")
    rows = versioned(make_rows())
    assert [(item.row.trajectory, item.row.segment) for item in saved.rows] == [(r.trajectory, r.segment) for r in rows]
    for item, row in zip(saved.rows, rows, strict=True):
        assert torch.equal(item.row.ids, row.ids) and torch.equal(item.row.policy_versions, row.policy_versions)
        assert torch.equal(item.row.rollout_log_probs, row.rollout_log_probs) and item.row.first_turn == 2
    assert saved.info.figures == ranks[0]["pass"] and saved.info.policy_version == VERSION
