"""The gate's decisions and the batches it saves, on one rank and without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear_megatron.data.batch_files import INFO_NAME, BatchFiles, BatchInfo, BatchRow, Kind, read_batch
from spear_megatron.data.rows import trajectory_rows
from spear_megatron.observability.schema import check_names
from spear_megatron.parallel.errors import RunError, RunTimeout
from spear_megatron.rollout.config import MismatchConfig
from spear_megatron.trainer.mismatch_gate import KEY, MismatchGate
from spear_megatron.types import RewardParts, Row, Segment, StopReason, Trajectory, TrajectoryId

ALONE: Any = SimpleNamespace(rank=0, world_size=1, dp_rank=0, dp_size=1, is_leader=True)
VERSION = 4


def make_row(sample: int, segment: int = 0, versions: int | None = VERSION, first_turn: int = 1) -> Row:
    """Two turns of 3 and 2 tokens."""
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    known = None if versions is None else torch.where(mask, versions, -1).to(torch.int32)
    return Row(
        trajectory=TrajectoryId(VERSION + 1, 0, sample), segment=segment, ids=torch.arange(8, dtype=torch.int32),
        response_mask=mask, rollout_log_probs=-1.0 * mask, advantages=0.5 * mask, policy_versions=known,
        first_turn=first_turn,
    )  # fmt: skip


def shifted(row: Row, *differences: float) -> torch.Tensor:
    """Trainer log-probs that differ by so much from the engine's, one figure for each of the five sampled tokens."""
    values = row.rollout_log_probs.clone()
    values[row.response_mask] += torch.tensor(differences)
    return values


class Saved(list):
    """Stands in for the files: keeps what would be saved."""

    def __call__(self, info: BatchInfo, rows: Sequence[BatchRow]) -> Path:
        self.append((info, rows))
        return Path(f"run/{info.kind}/step_{info.step}")


def judge(config: MismatchConfig, step: int, differences: Sequence[float], gate: MismatchGate | None = None) -> Any:
    row = make_row(0)
    gate = gate or MismatchGate(config, ALONE, Saved())
    return gate.judge(step, [row], [shifted(row, *differences)], VERSION)


def test_figures_of_a_step_are_in_the_schema() -> None:
    metrics, text = judge(MismatchConfig(), 5, [0.01, -0.01, 0.0, 0.2, -0.1])
    check_names(metrics)
    assert metrics["mismatch/abs_diff_mean"] == pytest.approx(0.064) and metrics["mismatch/warned"] == 1
    assert metrics["mismatch/turn_1"] == pytest.approx(0.02 / 3, rel=1e-5)
    assert metrics["mismatch/turn_2"] == pytest.approx(0.15, rel=1e-5)
    assert metrics["mismatch/over_bound"] == pytest.approx(0.4) and metrics["mismatch/tokens"] == 5
    assert "worst in turn 2 (0.15) and position 4-7" in text


def test_the_first_warning_of_a_streak_saves_the_batch() -> None:
    saved = Saved()
    gate = MismatchGate(MismatchConfig(), ALONE, saved)
    texts = []
    for step, size in ((1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)):
        texts.append(judge(MismatchConfig(), step, [size] * 5, gate)[1])
    assert [text is not None for text in texts] == [True, True, False, True, True, True]
    assert [info.step for info, _ in saved] == [1, 4]
    assert ["saved to" in (text or "") for text in texts] == [True, False, False, True, False, False]
    assert saved[0][0].figures["all"]["abs_diff_mean"] == pytest.approx(1.0)


def test_a_stop_is_one_error_that_names_bound_place_cause_and_file() -> None:
    config = MismatchConfig(warn=None, stop=0.5)
    assert judge(config, 1, [0.4] * 5)[1] is None
    with pytest.raises(RunError) as caught:
        judge(config, 7, [0.0, 0.0, 0.0, 2.0, 2.0])
    for text in ("step 7", f"{KEY}.stop=0.5", "turn 2 (2)", "other weights", "run/mismatch/step_7", "replay-dump"):
        assert text in str(caught.value)


def test_a_batch_that_cannot_be_saved_stops_no_run_that_only_warns() -> None:
    def full(info: BatchInfo, rows: Sequence[BatchRow]) -> Path:
        raise OSError("no space left")

    def absent(info: BatchInfo, rows: Sequence[BatchRow]) -> Path:
        raise RunTimeout("rank 1 did not answer")

    text = judge(MismatchConfig(), 1, [1.0] * 5, MismatchGate(MismatchConfig(), ALONE, full))[1]
    assert text.endswith("the batch could not be saved: no space left")
    config = MismatchConfig(warn=None, stop=0.5)
    with pytest.raises(RunError, match="mismatch.stop=0.5. Usual causes.*could not be saved: no space left"):
        judge(config, 1, [1.0] * 5, MismatchGate(config, ALONE, full))
    with pytest.raises(RunTimeout):
        judge(MismatchConfig(), 1, [1.0] * 5, MismatchGate(MismatchConfig(), ALONE, absent))


def test_tokens_of_older_versions_do_not_count_and_are_told() -> None:
    rows = [make_row(0), make_row(1, versions=VERSION - 2), make_row(2, versions=None)]
    values = [shifted(rows[0], *[0.1] * 5), shifted(rows[1], *[3.0] * 5), shifted(rows[2], *[0.2] * 5)]
    gate = MismatchGate(MismatchConfig(mask=1.0), ALONE, Saved())
    metrics, text = gate.judge(5, rows, values, VERSION)
    assert metrics["mismatch/abs_diff_mean"] == pytest.approx(0.15) and metrics["mismatch/tokens"] == 10
    assert metrics["mismatch/lag_2"] == pytest.approx(3.0) and metrics["mismatch/lag_0"] == pytest.approx(0.15)
    assert "tokens of older versions: 2 behind 3" in (text or "")
    assert gate.masked(rows, values, VERSION) == {}


def test_without_a_token_of_current_weights_nothing_is_said_of_them() -> None:
    old = make_row(0, versions=VERSION - 1)
    metrics, text = MismatchGate(MismatchConfig(), ALONE, Saved()).judge(5, [old], [shifted(old, *[3.0] * 5)], VERSION)
    assert metrics == {"mismatch/tokens": 0.0, "mismatch/lag_1": pytest.approx(3.0), "mismatch/warned": 0.0}
    assert text is None


def test_the_mask_is_over_all_segments_of_a_trajectory() -> None:
    rows = [make_row(0), make_row(0, segment=1), make_row(1), make_row(2)]
    values = [shifted(row, *[size] * 5) for row, size in zip(rows, (0.9, 0.0, 0.6, -0.4))]
    assert MismatchGate(MismatchConfig(mask=0.5), ALONE, Saved()).masked(rows, values, VERSION) == {
        rows[2].trajectory: "mismatch"
    }
    # k3 of d is exp(d) - 1 - d: 0.560 for 0.9, 0.280 with its other segment; 0.222 for 0.6; 0.070 for -0.4.
    by_k3 = MismatchGate(MismatchConfig(mask=0.25, mask_by="k3"), ALONE, Saved())
    assert by_k3.masked(rows, values, VERSION) == {rows[0].trajectory: "mismatch"}
    assert MismatchGate(MismatchConfig(), ALONE, Saved()).masked(rows, values, VERSION) == {}


@pytest.mark.parametrize("in_statistics", [True, False])
def test_masked_trajectories_leave_the_statistics_like_filtered_ones(in_statistics: bool) -> None:
    from spear_megatron.algorithms.config import AlgorithmConfig
    from spear_megatron.rollout.engine import SamplingParams
    from spear_megatron.trainer.parts import StepSettings
    from spear_megatron.trainer.run import Run
    from spear_megatron.trainer.run_config import TrainerConfig
    from spear_megatron.trainer.scoring import Scores

    sampling, told = SamplingParams(max_new_tokens=8), []
    settings = StepSettings(
        prompts_per_step=1, samples_per_prompt=3, sampling=sampling, val_samples=1, val_sampling=sampling,
        ppo_mini_batch_size=1, ppo_epochs=1, mismatch=MismatchConfig(warn=None, mask=0.5),
    )  # fmt: skip
    recorder = SimpleNamespace(message=told.append)
    parts: Any = SimpleNamespace(parallel=ALONE, imitation=None, recorder=recorder)
    algorithm = AlgorithmConfig(filtered_in_statistics=in_statistics)
    run = Run(parts=parts, settings=settings, trainer=TrainerConfig(), algorithm=algorithm)
    rows = [make_row(sample) for sample in range(3)]
    rows = [replace(row, old_log_probs=shifted(row, *[size] * 5)) for row, size in zip(rows, (0.0, 0.9, 0.9))]
    names = [row.trajectory for row in rows]
    values = dict.fromkeys(names, 1.0)
    scores = Scores(
        mu=0.0, base=values, bonus=values, rewards=values, masked={names[2]: "overlong"}, counted=frozenset(names),
        groups=frozenset({names[0].group}),
    )  # fmt: skip
    assert run.check_rollout(VERSION + 1, scores, rows) is scores  # nothing was computed before the update
    run._passed = True
    checked = run.check_rollout(VERSION + 1, scores, rows)
    assert checked.masked == {names[1]: "mismatch", names[2]: "overlong"} and told == []
    assert checked.counted == (frozenset(names) if in_statistics else {names[0]})
    assert run._metrics["filter/mismatch"] == pytest.approx(2 / 3) and run._measured
    after = run.with_advantages(rows, replace(checked, advantages=values))
    assert [bool(row.response_mask.any()) for row in after] == [True, False, False]


@pytest.mark.parametrize("name", ["warn", "stop", "mask", "token_bound"])
def test_bounds_must_be_positive(name: str) -> None:
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"mismatch.{name}"):
            MismatchConfig(**{name: value})
    with pytest.raises(ValueError, match="below warn"):
        MismatchConfig(warn=0.2, stop=0.1)


def test_rows_know_their_turn_and_versions() -> None:
    def segment(mask: list[int]) -> Segment:
        bits = torch.tensor(mask, dtype=torch.bool)
        zeros = torch.zeros(len(mask))
        return Segment(zeros.int(), bits, zeros, policy_versions=bits.int())

    segments = (segment([0, 1, 1, 0, 1]), segment([0, 1]), segment([0, 0]), segment([0, 1, 0, 1]))
    trajectory = Trajectory(TrajectoryId(1, 0, 0), segments, RewardParts(0.0), StopReason.ANSWER, 0)
    rows = trajectory_rows(trajectory)
    assert [row.first_turn for row in rows] == [1, 3, 4, 4]
    assert all(torch.equal(row.policy_versions, item.policy_versions) for row, item in zip(rows, segments))


def info_of(step: int, kind: Kind = "mismatch", update: int = 0) -> BatchInfo:
    return BatchInfo(kind=kind, step=step, update=update, policy_version=step - 1, reason="because")


def test_a_batch_comes_back_as_it_was(tmp_path: Path) -> None:
    files = BatchFiles(tmp_path, ALONE, keep=3, config_yaml="trainer:\n  seed: 3\n", model_path="model")
    row = replace(make_row(1, first_turn=3), old_log_probs=torch.rand(8))
    old = replace(make_row(0, versions=None), trajectory=TrajectoryId(1, 0, 0))
    rows = [BatchRow(row=old, replayed=True), BatchRow(row=row, log_probs=torch.rand(8))]
    info = replace(info_of(5, "nonfinite", 2), checkpoint="checkpoints/step_00000004", figures={"all": {"tokens": 5}})
    folder = files.save(info, rows)
    assert folder == tmp_path / "nonfinite" / "step_000005.update_002"
    batch = read_batch(folder)
    assert batch.info == replace(info, model_path="model") and "seed: 3" in batch.config_path.read_text()
    assert [item.replayed for item in batch.rows] == [False, True]
    for saved, back in zip(reversed(rows), batch.rows, strict=True):
        for name in Row.__dataclass_fields__:
            one, other = getattr(saved.row, name), getattr(back.row, name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
        assert (saved.log_probs is None) == (back.log_probs is None)
    assert torch.equal(batch.rows[0].log_probs, rows[1].log_probs)
    from safetensors.torch import load_file

    turns = load_file(folder / "rank_000.safetensors")["1/turns"]
    assert turns.tolist() == [0, 0, 3, 3, 3, 0, 4, 4]


def test_only_the_newest_batches_of_a_kind_stay(tmp_path: Path) -> None:
    files = BatchFiles(tmp_path, ALONE, keep=2)
    for step in (1, 2, 9, 10, 10):
        files.save(info_of(step), [BatchRow(row=make_row(0))])
    files.save(info_of(3, "nonfinite"), [])
    assert sorted(path.name for path in (tmp_path / "mismatch").iterdir()) == ["step_000009", "step_000010"]
    assert read_batch(tmp_path / "nonfinite" / "step_000003.update_000").rows == []


def test_batches_of_steps_that_are_done_again_make_room(tmp_path: Path) -> None:
    files = BatchFiles(tmp_path, ALONE, keep=3)
    for kind, updates in (("mismatch", [0]), ("nonfinite", [0, 1])):
        for step in (2, 5, 9):
            for update in updates:
                files.save(info_of(step, kind, update), [])
        (tmp_path / kind / "step_notes.txt").write_text("mine")
        files.save(info_of(5, kind), [])  # the run went on from a checkpoint of step 4
    names = {kind: sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("mismatch", "nonfinite")}
    assert names["mismatch"] == ["step_000002", "step_000005", "step_notes.txt"]
    assert names["nonfinite"] == ["step_000005.update_000", "step_notes.txt"]


def test_a_batch_is_computed_again_by_whole_models_whatever_the_layout_of_the_run() -> None:
    from spear_megatron.cli.replay_dump import _WHOLE_MODEL
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.parallel.config import MegatronConfig

    keys = "tensor_model", "pipeline_model", "context"
    split = [f"actor_rollout_ref.actor.megatron.{key}_parallel_size=2" for key in keys]
    assert load(Config, None, split).actor_rollout_ref.actor.megatron.model_parallel_size == 8
    megatron = load(Config, None, [*split, *_WHOLE_MODEL]).actor_rollout_ref.actor.megatron
    assert megatron.model_parallel_size == MegatronConfig().model_parallel_size == 1


def test_damaged_batches_are_refused_by_name(tmp_path: Path) -> None:
    folder = BatchFiles(tmp_path, ALONE, keep=2).save(info_of(1), [BatchRow(row=make_row(0))])
    text = (folder / INFO_NAME).read_text()
    (folder / INFO_NAME).write_text(json.dumps({**json.loads(text), "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2"):
        read_batch(folder)
    (folder / INFO_NAME).write_text(text.replace('"reason"', '"cause"'))
    with pytest.raises(ValueError, match="lacks or adds fields"):
        read_batch(folder)
    (folder / INFO_NAME).write_text(text.replace('"rows": 1', '"rows": 2'))
    with pytest.raises(ValueError, match="1 rows instead of 2"):
        read_batch(folder)
    (folder / INFO_NAME).write_text(text)
    (folder / "rank_000.safetensors").unlink()
    with pytest.raises(ValueError, match="rank_000.safetensors is missing"):
        read_batch(folder)
    (folder / INFO_NAME).unlink()
    with pytest.raises(ValueError, match="no saved batch"):
        read_batch(folder)
