"""Whole runs whose engine lies about its log-probs or weights: warned, masked, stopped, saved and computed again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SFT, SMALL

from spear_megatron.__main__ import main
from spear_megatron.data.batch_files import read_batch
from spear_megatron.data.tiny import make_tiny_model
from spear_megatron.observability.record import read_record
from spear_megatron.types import Prompt, RewardParts, Trajectory

GATE = "actor_rollout_ref.rollout.mismatch"
RUN = (
    *SMALL, "trainer.total_training_steps=3", "trainer.save_freq=1", "trainer.test_freq=-1", "trainer.logger=[console]",
    "trainer.val_before_train=false", "trainer.save_hf=false", "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.optim.lr=3e-3", "actor_rollout_ref.actor.entropy_coeff=0.05",
    "reward.name=test_mismatch_commands:EvenTokens",
)  # fmt: skip


class EvenTokens:
    """Share of even token ids among the sampled ones: it differs within a group also where all answers are wrong."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        sampled = [int(i) for segment in trajectory.segments for i in segment.ids[segment.response_mask]]
        return RewardParts(outcome=sum(i % 2 == 0 for i in sampled) / len(sampled))


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that calls its tool."""
    folder = tmp_path_factory.mktemp("agent")
    model = make_tiny_model(folder / "model", seed=0)
    arguments = ["sft", f"actor_rollout_ref.model.path={model}", f"sft.default_local_dir={folder / 'sft'}"]
    assert main([*arguments, *SMALL, *SFT]) == 0
    return folder / "sft" / "hf"


@pytest.fixture
def train(agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``train`` in this process; ``wrong`` are the faults of its engine."""

    def start(*overrides: str, wrong: dict[str, Any] | None = None) -> int:
        from spear_megatron.cli import agents
        from spear_megatron.rollout.embedded import EmbeddedEngine
        from spear_megatron.testing.perturbed_engine import PerturbedEngine

        def engine(*args: Any, **options: Any) -> Any:
            made = EmbeddedEngine(*args, **options)
            return made if wrong is None else PerturbedEngine(made, **wrong)

        monkeypatch.setattr(agents, "EmbeddedEngine", engine)
        places = (f"actor_rollout_ref.model.path={agent}", f"trainer.default_local_dir={tmp_path / 'run'}")
        return main(["train", *places, *RUN, *overrides])

    return start


def replay(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["replay-dump", str(folder), *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def level_of(text: str) -> float:
    found = re.search(r"mean difference to the engine: (\S+) nats", text)
    assert found is not None, text
    return float(found[1])


def test_an_honest_engine_passes_in_every_step(train: Callable[..., int], tmp_path: Path) -> None:
    assert train() == 0
    lines = read_record(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert "timing_s/old_log_prob" in line and line["training/num_optimizer_steps"] == 1
        assert 0 < line["mismatch/abs_diff_mean"] < 1e-5 and line["mismatch/warned"] == 0 == line["mismatch/over_bound"]
        assert line["mismatch/tokens"] == line["perf/response_tokens"]
        assert line["mismatch/abs_diff_mean"] == pytest.approx(line["training/rollout_logp_abs_diff/mean"], rel=0.5)
        assert {"mismatch/turn_1", "mismatch/turn_2", "mismatch/lag_0", "mismatch/position_1"} <= line.keys()
        assert "mismatch/lag_1" not in line
    assert not (tmp_path / "run" / "mismatch").exists()


def test_noise_in_the_second_turn_is_warned_of_and_named_by_the_doctor(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(f"{GATE}.keep_batches=2", wrong={"noise": 2.0, "turn": 2}) == 0
    told = " ".join(capsys.readouterr().out.split())
    lines = read_record(tmp_path / "run")
    assert [line["mismatch/warned"] for line in lines] == [1, 1, 1]
    assert all(line["mismatch/turn_1"] < 1e-5 and line["mismatch/turn_2"] > 0.1 for line in lines)
    assert told.count("worst in turn 2") == 3 and told.count("batch saved to") == 1
    assert [path.name for path in (tmp_path / "run" / "mismatch").iterdir()] == ["step_000001"]
    main(["doctor", str(tmp_path / "run")])
    told = " ".join(capsys.readouterr().out.split())
    assert "engine and trainer disagree" in told and "in 3 steps" in told and "worst in turn 2" in told


@pytest.mark.parametrize("ratio", ["trainer", "rollout"])
def test_the_run_stops_and_the_saved_batch_gives_the_same_figures(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], agent: Path, ratio: str
) -> None:
    code = train(f"{GATE}.stop=0.06", f"actor_rollout_ref.actor.old_log_prob={ratio}", wrong={"noise": 2.0, "turn": 2})
    error = capsys.readouterr().err
    assert code == 1 and error.count("error:") == 1 and "step 1:" in error
    assert "worst in turn 2" in error and f"{GATE}.stop=0.06" in error and "chat template" in error
    folder = tmp_path / "run" / "mismatch" / "step_000001"
    assert f"replay-dump {folder}" in error and not (tmp_path / "run" / "checkpoints" / "step_00000001").exists()
    saved = read_batch(folder).info
    assert saved.figures is not None and saved.figures["turn_2"]["abs_diff_mean"] > 0.1

    code, told = replay(folder, capsys)
    assert code == 1 and level_of(told) == pytest.approx(saved.figures["all"]["abs_diff_mean"], rel=1e-2)
    assert (folder / "mismatch.png").stat().st_size > 5000 and "version 0" in told
    assert replay(folder, capsys, "--threshold", "10")[0] == 0
    again = replayed(folder)
    # The weights of step 1 are at hand: the trainer's log-probs are those of the run, bit for bit.
    assert again.saved["all"].abs_diff_max == 0.0 and again.nonfinite == 0
    assert as_dicts(again.engine) == as_dicts(again.saved_engine) == saved.figures


def replayed(folder: Path) -> Any:
    """What a batch gives on one rank with the model that its run started from."""
    from spear_megatron.cli.build import build_actor
    from spear_megatron.cli.session import open_parallel
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.trainer.replay_batch import replay_batch

    batch = read_batch(folder)
    config = load(Config, batch.config_path)
    ref = config.actor_rollout_ref
    with open_parallel(config) as parallel:
        actor, _ = build_actor(config, parallel, ModelShape.from_folder(ref.model.path), ref.actor.optim, 1)
        return replay_batch(actor, parallel, batch, token_bound=ref.rollout.mismatch.token_bound)


def as_dicts(mismatch: Any) -> dict[str, dict[str, float]]:
    from dataclasses import asdict

    return {name: asdict(value) for name, value in mismatch.items()}


def test_an_engine_with_old_weights_is_stopped_at_the_first_step_that_they_serve(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train(f"{GATE}.stop=0.02", f"{GATE}.warn=0.01", wrong={"frozen_from": 1})
    error = capsys.readouterr().err
    assert code == 1 and "step 2:" in error and "other weights" in error
    folder = tmp_path / "run" / "mismatch" / "step_000002"
    info = read_batch(folder).info
    assert info.checkpoint == "checkpoints/step_00000001" and info.policy_version == 1
    code, told = replay(folder, capsys)
    assert code == 1 and "step_00000001 (version 1)" in told and "not the weights" not in told
    # With the weights that the engine really had, nothing is wrong.
    code, told = replay(folder, capsys, "--model", info.model_path)
    assert code == 0 and level_of(told) < 1e-5


@pytest.mark.parametrize(("measure", "bound"), [("abs_diff", 0.18), ("k3", 0.3)])
def test_masked_trajectories_are_counted_and_leave_the_loss(
    train: Callable[..., int], tmp_path: Path, measure: str, bound: float
) -> None:
    bounds = (f"{GATE}.mask={bound}", f"{GATE}.mask_by={measure}", f"{GATE}.warn=null")
    assert train(*bounds, "trainer.total_training_steps=2", wrong={"noise": 2.0, "turn": 2}) == 0
    for line in read_record(tmp_path / "run"):
        assert 0 < line["filter/mismatch"] < 1 and line["mismatch/warned"] == 0
        assert 0 < line["actor/tokens"] < line["perf/response_tokens"]
        assert line["mismatch/turn_1"] < 1e-5 < 0.05 < line["mismatch/turn_2"]
    assert not (tmp_path / "run" / "mismatch").exists()


def test_a_batch_that_was_not_finite_is_saved_in_the_same_form(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spear_megatron.trainer.optimizer import PolicyOptimizer

    norms = PolicyOptimizer.gradient_norm
    calls = []

    def broken(self: Any) -> float:
        calls.append(norms(self))
        return float("nan") if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(PolicyOptimizer, "gradient_norm", broken)
    assert train() == 0
    folder = tmp_path / "run" / "nonfinite" / "step_000002.update_000"
    batch = read_batch(folder)
    assert batch.info.kind == "nonfinite" and batch.info.checkpoint == "checkpoints/step_00000001"
    assert len(batch.rows) >= 16 and all(item.log_probs is not None for item in batch.rows)
    assert any(bool(item.row.advantages.any()) for item in batch.rows)
    assert json.loads((folder / "batch.json").read_text())["reason"].endswith("update skipped")
    lines = read_record(tmp_path / "run")
    assert lines[-1]["training/nonfinite_steps"] == 1 and lines[1].keys() & {"mismatch/tokens"} == set()
    code, told = replay(folder, capsys)
    assert code == 0 and level_of(told) < 1e-5 and "step_00000001 (version 1)" in told


SPEAR = tuple(
    f"actor_rollout_ref.actor.{key}" for key in (
        "enable_trajectory_replay=true", "trajectory_buffer_size=6", "max_replay_loss_steps=2",
        "replay.trigger_ratio=0.5", "replay.batch_size=5", "replay.require=none",
    )
)  # fmt: skip


def test_replayed_rows_are_saved_apart_and_enter_no_figure(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spear_megatron.trainer.optimizer import PolicyOptimizer

    norms = PolicyOptimizer.gradient_norm
    calls = []

    def broken(self: Any) -> float:
        calls.append(norms(self))
        return float("inf") if len(calls) == 3 else calls[-1]

    monkeypatch.setattr(PolicyOptimizer, "gradient_norm", broken)
    assert train(*SPEAR) == 0
    folder = tmp_path / "run" / "nonfinite" / "step_000003.update_000"
    batch = read_batch(folder)
    replayed = [item.row for item in batch.rows if item.replayed]
    assert 0 < len(replayed) < len(batch.rows) and all(row.trajectory.step < 3 for row in replayed)
    # The pass before the update has measured: the batch holds its log-probs, of the step's own rows.
    assert all((item.log_probs is None) == item.replayed for item in batch.rows)
    code, told = replay(folder, capsys)
    assert code == 0 and "step_00000002 (version 2)" in told and level_of(told) < 1e-5
    again = int(re.search(r"all +│ +(\d+)", told)[1])  # type: ignore[index]
    assert again == sum(int(item.row.response_mask.sum()) for item in batch.rows if not item.replayed)


def test_bad_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, culprit in (([str(tmp_path)], "no saved batch"), ([str(tmp_path), "--out", "x.jpg"], "png")):
        assert main(["replay-dump", *arguments]) == 2
        assert culprit in capsys.readouterr().err
    masked = (f"{GATE}.mask=0.1", "actor_rollout_ref.actor.old_log_prob=rollout")
    model = make_tiny_model(tmp_path / "model", seed=0)
    assert main(["train", "--dry-run", f"actor_rollout_ref.model.path={model}", *RUN, *masked]) == 2
    assert "old_log_prob=trainer" in capsys.readouterr().err
