"""Three steps of the command `train` in a given layout: what the loop tests and `make layouts` compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import run_ranks
from train_step import Layout

from spear_megatron.types import Prompt, RewardParts, Trajectory, TrajectoryId

STEPS = 3
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""A figure agrees within RELATIVE of the one on one rank; ABSOLUTE is for figures that are rounding noise around 0."""

LOOP_BASELINE = Layout("1 rank")
LOOP_LAYOUTS = (
    Layout("DP2", world_size=2),
    Layout("TP2", world_size=2, tp=2),
    Layout("PP2", world_size=2, pp=2),
    Layout("TP2xPP2", world_size=4, tp=2, pp=2),
    Layout("CP2xTP2", world_size=4, cp=2, tp=2),
)
_NOT_COMPARED = ("timing_s/", "perf/", "unix_time")  # what depends on the machine or, as the balance, on the layout
_COMMON = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[]", "trainer.num_threads=1", "data.generator.levels=[1]",
    "data.generator.num_train=512", "data.max_prompt_length=64", "data.max_response_length=64",
)  # fmt: skip
_COLD_START = (
    "sft.num_examples=512", "sft.total_training_steps=120", "sft.train_batch_size=16", "sft.lr=1e-2",
)  # fmt: skip
_SETTINGS = (
    *_COMMON,
    f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1", "trainer.test_freq=3",
    "trainer.val_before_train=false", "trainer.save_hf=false",
    "trainer.num_logged_trajectories=1000", "trainer.collective_timeout_s=60", "trainer.collect_timeout_s=60",
    "data.train_batch_size=4", "data.generator.num_val=4", "env.sandbox.preload=[]",
    "reward.name=train_loop:EvenTokens", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
    "actor_rollout_ref.actor.optim.lr=2e-3", "actor_rollout_ref.actor.entropy_coeff=0.01",
    "actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0.05",
)  # fmt: skip

SPEAR = (
    "actor_rollout_ref.actor.use_kl_loss=false", "actor_rollout_ref.actor.enable_trajectory_replay=true",
    "actor_rollout_ref.actor.trajectory_buffer_size=6", "actor_rollout_ref.actor.max_replay_loss_steps=2",
    "actor_rollout_ref.actor.replay.trigger_ratio=0.5", "actor_rollout_ref.actor.replay.batch_size=5",
    "actor_rollout_ref.actor.replay.require=none", "actor_rollout_ref.actor.policy_loss.loss_mode=clip-cov",
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio=0.05", "actor_rollout_ref.actor.policy_loss.clip_cov_lb=-0.1",
    "actor_rollout_ref.actor.policy_loss.clip_cov_ratio_replay=0.05",
    "actor_rollout_ref.actor.policy_loss.clip_cov_lb_replay=-0.1",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm", "algorithm.norm_adv_by_std_in_grpo=false",
    "algorithm.use_toolcall_reward=cosine", "algorithm.max_toolcall_steps=4", "algorithm.rollout_correction.mode=tis",
    "actor_rollout_ref.rollout.rollout_filter_ratio=0.75", "algorithm.filter_repetitive_responses=true",
)  # fmt: skip
"""Self-imitation with covariance clipping, group filter and correction, on top of the settings above."""


class EvenTokens:
    """Share of even token ids among the sampled ones: it differs within a group also where all answers are wrong."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        sampled = [int(i) for segment in trajectory.segments for i in segment.ids[segment.response_mask]]
        share = sum(i % 2 == 0 for i in sampled) / len(sampled)
        return RewardParts(outcome=share, num_tool_calls=trajectory.num_tool_calls, success=share > 0.5)


@dataclass(frozen=True)
class LoopResult:
    """What a run left behind: figures by step, and the tokens of every trajectory of every step."""

    metrics: dict[int, dict[str, float]]
    tokens: dict[int, dict[TrajectoryId, list[list[int]]]]


@dataclass(frozen=True)
class LoopDifference:
    """A run against the one on one rank. ``error`` is in units of the tolerance: at most 1 where they agree."""

    first_step_tokens_equal: bool
    equal_steps: int
    error: float
    worst: str

    @property
    def agrees(self) -> bool:
        return self.first_step_tokens_equal and self.error <= 1.0


def command_on_rank(arguments: list[str]) -> int:
    """The command line on one rank, as `python -m spear_megatron` runs it."""
    from spear_megatron.__main__ import main

    return main(arguments)


def make_agent(folder: Path) -> str:
    """A tiny model after a short cold start, which calls the tool and is mostly wrong; returns its folder."""
    from spear_megatron.data.tiny import make_tiny_model

    model = make_tiny_model(folder / "model", seed=0)
    arguments = ["sft", f"actor_rollout_ref.model.path={model}", f"sft.default_local_dir={folder / 'sft'}"]
    assert run_ranks(command_on_rank, 1, [*arguments, *_COMMON, *_COLD_START, "--debug"]) == [0]
    return str(folder / "sft" / "hf")


def run_loop(folder: str, run_dir: Path, layout: Layout, *more: str) -> LoopResult:
    """Run `train` on the model in ``folder``, with ``more`` overrides, and read what it recorded."""
    megatron = "actor_rollout_ref.actor.megatron"
    arguments = [
        "train", f"actor_rollout_ref.model.path={folder}", f"trainer.default_local_dir={run_dir}", *_SETTINGS,
        f"{megatron}.tensor_model_parallel_size={layout.tp}", f"{megatron}.pipeline_model_parallel_size={layout.pp}",
        f"{megatron}.context_parallel_size={layout.cp}", *more, "--debug",
    ]  # fmt: skip
    codes = run_ranks(command_on_rank, layout.world_size, arguments)
    assert codes == [0] * layout.world_size, f"{layout.name}: exit codes {codes}"
    return read_loop(run_dir)


def read_loop(run_dir: Path) -> LoopResult:
    """Figures and tokens that a run directory holds."""
    from spear_megatron.observability.record import read_record
    from spear_megatron.observability.trajectories import read_trajectories, recorded_steps

    metrics = {
        int(line["step"]): {key: value for key, value in line.items() if not key.startswith(_NOT_COMPARED)}
        for line in read_record(run_dir)
    }
    tokens: dict[int, dict[TrajectoryId, list[list[int]]]] = {}
    for step in recorded_steps(run_dir):
        kept = [item.trajectory for item in read_trajectories(run_dir, step)]
        tokens[step] = {one.id: [segment.ids.tolist() for segment in one.segments] for one in kept}
    return LoopResult(metrics, tokens)


def compare(result: LoopResult, expected: LoopResult) -> LoopDifference:
    """The largest difference of any figure of any step, and whether the tokens are the same."""
    error, worst = 0.0, "none"
    for step, figures in expected.metrics.items():
        assert figures.keys() == result.metrics[step].keys(), figures.keys() ^ result.metrics[step].keys()
        for name, value in figures.items():
            other: Any = result.metrics[step][name]
            # Drift between engine and trainer is a difference itself: compared on the scale of what it is taken of.
            scale = 1.0 if name.startswith(("training/rollout_", "mismatch/")) else abs(value)
            distance = abs(other - value) / (RELATIVE * scale + ABSOLUTE)
            if distance > error:
                error, worst = distance, f"step {step} {name}: {other:.8g} for {value:.8g}"
    equal = [result.tokens[step] == tokens for step, tokens in expected.tokens.items()]
    return LoopDifference(equal[0], sum(equal), error, worst)
