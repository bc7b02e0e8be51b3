"""Rollouts one step ahead of training against rollouts in turn, in an environment whose steps take time.

    python tools/bench_async.py            # a few minutes on two quiet cores
    python tools/bench_async.py --quick    # small, to see that it runs

Both ways train the same number of steps on as many trajectories, from the same weights. Runs alternate, first one way
and then the other in front; the steps of all runs but each run's first, which nothing can hide, are compared by their
median. Without ``--latency-s`` the environment's latency is chosen so that rollouts take about as long as a step that
runs ahead of them, where running ahead can save the most. Prints steps per second, their ratio and the mean reward by
step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from spear_megatron.types import Prompt, RewardParts, Trajectory  # noqa: E402

IN_TURN, AHEAD = "in turn", "one step ahead"
SETTINGS = (
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[]", "trainer.save_freq=-1", "trainer.test_freq=-1",
    "trainer.val_before_train=false", "trainer.save_hf=false", "trainer.num_logged_trajectories=0",
    "data.generator.levels=[1]", "data.generator.num_train=512", "data.max_prompt_length=64",
    "env.name=spear_megatron.testing.latency:LatencyEnvironment", "env.sandbox.preload=[]",
    "reward.name=bench_async:EvenTokens", "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.optim.lr=2e-3", "algorithm.rollout_correction.mode=tis",
)  # fmt: skip
COLD_START = (
    "sft.num_examples=512", "sft.total_training_steps=120", "sft.train_batch_size=16", "sft.lr=1e-2", "sft.tool_rate=0",
    "actor_rollout_ref.model.dtype=fp32", "trainer.logger=[]", "data.generator.levels=[1]",
    "data.max_prompt_length=64", "data.max_response_length=64",
)  # fmt: skip


class EvenTokens:
    """Share of even token ids among the sampled ones: something that a tiny model learns within a few steps."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """Score one trajectory."""
        sampled = [int(i) for segment in trajectory.segments for i in segment.ids[segment.response_mask]]
        share = sum(i % 2 == 0 for i in sampled) / max(len(sampled), 1)
        return RewardParts(outcome=share, success=share > 0.5)


@dataclass
class Way:
    """What was measured of one way: seconds of every step but the first of each run, rewards by step of each run."""

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    samples: int = 0

    def summary(self) -> dict[str, Any]:
        """Plain figures."""
        return {
            "steps_per_s": 1.0 / statistics.median(self.seconds),
            "step_s": statistics.median(self.seconds),
            "wait_for_rollouts_s": statistics.median(self.waits),
            "trajectories": self.samples,
            "rewards": [statistics.mean(column) for column in zip(*self.rewards, strict=True)],
        }


def make_model(folder: Path) -> str:
    """A tiny model that ends its turns, after a short supervised start."""
    from spear_megatron.__main__ import main
    from spear_megatron.data.tiny import make_tiny_model

    model = make_tiny_model(folder / "model", seed=0)
    paths = [f"actor_rollout_ref.model.path={model}", f"sft.default_local_dir={folder / 'sft'}"]
    code = main(["sft", *paths, *COLD_START])
    assert code == 0
    return str(folder / "sft" / "hf")


def train(model: str, run_dir: Path, args: argparse.Namespace, latency_s: float, ahead: bool) -> list[dict[str, float]]:
    """The record of one run."""
    from spear_megatron.__main__ import main
    from spear_megatron.observability.record import read_record

    kwargs = f"{{latency_s: {latency_s}, num_turns: {args.turns}}}"
    code = main([
        "train", f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={run_dir}", *SETTINGS,
        f"trainer.total_training_steps={args.steps}", f"trainer.async={int(ahead)}", f"env.kwargs={kwargs}",
        f"data.train_batch_size={args.prompts}", f"actor_rollout_ref.actor.ppo_mini_batch_size={args.prompts}",
        f"data.max_response_length={args.response}", f"actor_rollout_ref.rollout.max_num_seqs={8 * args.prompts}",
    ])  # fmt: skip
    assert code == 0
    return [dict(line) for line in read_record(run_dir)]


def balanced_latency(in_turn: list[dict[str, float]], ahead: list[dict[str, float]], turns: int) -> float:
    """Latency of an environment step with which rollouts take as long as a step that runs ahead of them.

    From runs without latency: how long rollouts take in turn, and a step while the next rollouts compete for the cores.
    """
    sampling = statistics.median(line["timing_s/gen"] for line in in_turn[1:])
    step = statistics.median(line["timing_s/step"] for line in ahead[1:])
    return max(step - sampling, 0.02) / turns


def note(way: Way, record: list[dict[str, float]]) -> None:
    """Add one run."""
    way.seconds += [line["timing_s/step"] for line in record[1:]]
    way.waits += [line["timing_s/gen"] for line in record[1:]]
    way.rewards.append([line["critic/score/mean"] for line in record])
    way.samples += int(sum(line["training/num_trajectories"] for line in record))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternate runs of both ways."""
    model = make_model(folder)
    latency_s = args.latency_s
    if latency_s is None:
        records = [train(model, folder / f"calibration_{ahead:d}", args, 0.0, ahead) for ahead in (False, True)]
        latency_s = balanced_latency(*records, args.turns)
    ways = {IN_TURN: Way(), AHEAD: Way()}
    for number in range(args.rounds):
        for name in (IN_TURN, AHEAD) if number % 2 == 0 else (AHEAD, IN_TURN):
            run_dir = folder / f"{name.replace(' ', '_')}_{number}"
            note(ways[name], train(model, run_dir, args, latency_s, name == AHEAD))
    assert ways[IN_TURN].samples == ways[AHEAD].samples, "both ways must train on as many trajectories"
    results = {name: way.summary() for name, way in ways.items()}
    ratio = results[AHEAD]["steps_per_s"] / results[IN_TURN]["steps_per_s"]
    return {"latency_s": latency_s, "ratio": ratio, "steps": args.steps, "rounds": args.rounds, "results": results}


def show(report: dict[str, Any]) -> None:
    """A table, the curves, and everything as one JSON object."""
    print(f"\nenvironment steps of {report['latency_s']:.3f} s")
    for name, figures in report["results"].items():
        print(
            f"{name:>16}: {figures['steps_per_s']:.3f} steps/s, waits {figures['wait_for_rollouts_s']:.3f} s per step, "
            f"{figures['trajectories']} trajectories"
        )
    print(f"{'ratio':>16}: {report['ratio']:.2f}\n\nmean reward by step")
    for name, figures in report["results"].items():
        print(f"{name:>16}: " + " ".join(f"{value:.3f}" for value in figures["rewards"]))
    print(json.dumps(report))


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--steps", type=int, default=12, help="training steps of a run")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step; each is sampled 8 times")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--turns", type=int, default=2, help="model turns of an episode")
    parser.add_argument("--latency-s", type=float, default=None, help="seconds of an environment step")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.prompts = 1, 3, 2
    with tempfile.TemporaryDirectory() as folder:
        show(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
