"""What SPEAR adds to the trainer's part of a step: the same step with and without self-imitation, in turn.

    python tools/bench_spear.py            # a model of a few M parameters, about three minutes on two quiet cores
    python tools/bench_spear.py --quick    # a small one, to see that it runs

Both sides share one actor and one made-up step of trajectories (sizes of configs/quickstart.yaml, lengths as agents
produce them) and run the real phases of the loop from scores to push; only rollouts, publishing and record are left
out. Self-imitation may cost what its tokens cost, and little more. Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402

from spear_megatron.config.loader import load  # noqa: E402
from spear_megatron.config.schema import Config  # noqa: E402
from spear_megatron.data.index import index_row  # noqa: E402
from spear_megatron.data.tiny import make_tiny_model  # noqa: E402
from spear_megatron.rollout.collect import Collected  # noqa: E402
from spear_megatron.trainer.metrics import replay_token_share  # noqa: E402
from spear_megatron.trainer.run import Run  # noqa: E402
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId  # noqa: E402

MODELS = {
    "large": dict(hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=768),
    "quick": dict(),
}
PROMPT = 40


def made_up(step: int, num_groups: int, num_samples: int) -> Collected:
    """A step of trajectories, half of them successes; log-normal lengths up to 160 sampled tokens."""
    generator = torch.Generator().manual_seed(step)
    groups = []
    for task in range(num_groups):
        members = []
        for sample in range(num_samples):
            sampled = int((torch.randn(1, generator=generator) * 0.5 + 3.7).exp().clamp(8, 160))
            ids = torch.randint(5, 260, (PROMPT + sampled,), generator=generator, dtype=torch.int32)
            mask = torch.arange(PROMPT + sampled) >= PROMPT
            won = bool(torch.rand(1, generator=generator) < 0.5)
            segment = Segment(ids, mask, torch.full((len(ids),), -5.0) * mask)
            parts = RewardParts(1.0 if won else -1.0, 1, success=won, num_tool_turns=1)
            members.append(
                Trajectory(TrajectoryId(step, task, sample), (segment,), parts, StopReason.ANSWER, step - 1)
            )
        groups.append(Group(Prompt(str(task), ()), tuple(members)))
    return Collected(groups, [index_row(member, "", 0) for group in groups for member in group.trajectories])


def trainer_part(run: Run, step: int, collected: Collected) -> tuple[float, dict[str, float]]:
    """Seconds of one step from scores to push, and its figures."""
    next(iter(run.remaining_steps()))  # a fresh step's state; the number below is what counts
    run._step = step
    start = time.perf_counter()
    scores = run.score(step, collected.index)
    replayed = run.select_replay(step, scores, collected.index)
    chosen = time.perf_counter() - start
    rows = run.old_log_probs(run.deal(collected, scores, replayed))
    scores = run.estimate(scores, collected.index, rows)
    rows = run.with_advantages(rows, scores)
    for mini_batch in run.mini_batches(rows):
        run.update(step, mini_batch)
    before = time.perf_counter()
    run.push(collected, scores, rows)
    end = time.perf_counter()
    own = chosen + end - before
    share = replay_token_share(run._updates).get("replay/token_share", 0.0)
    return end - start, {"token_share": share, "buffer_s": own, **run._metrics}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few samples")
    parser.add_argument("--samples", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--loss-mode", default="clip-cov", help="policy loss of both sides")
    parser.add_argument("--out", type=Path, help="write the JSON object there too")
    args = parser.parse_args()
    from spear_megatron.cli.build import open_run
    from spear_megatron.cli.session import StopFlag

    name, samples = ("quick", 3) if args.quick else ("large", args.samples)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", seed=0, **MODELS[name])
        overrides = [
            f"actor_rollout_ref.model.path={model}", f"trainer.default_local_dir={folder}/run", "trainer.logger=[]",
            "trainer.val_before_train=false", "trainer.test_freq=-1", "env.sandbox.preload=[]",
            "actor_rollout_ref.actor.max_replay_loss_steps=1", "data.max_response_length=256",
            "actor_rollout_ref.rollout.max_model_len=null",
            f"actor_rollout_ref.actor.policy_loss.loss_mode={args.loss_mode}",
        ]  # fmt: skip
        config = load(Config, ROOT / "configs" / "quickstart.yaml", overrides)
        times: dict[str, list[float]] = {"with": [], "without": []}
        shares, owns = [], []
        with open_run(config, StopFlag()) as run:
            parameters = sum(part.numel() for chunk in run.parts.actor.chunks for part in chunk.parameters())
            parts = replace(run.parts, imitation=None)
            plain = Run(parts=parts, settings=run.settings, trainer=run.trainer, algorithm=run.algorithm)
            for step in range(1, samples + 5):  # the first ones fill the buffer and warm up
                collected = made_up(step, config.data.train_batch_size, config.actor_rollout_ref.rollout.n)
                for side, which in (("without", plain), ("with", run)):
                    seconds, figures = trainer_part(which, step, collected)
                    if step > 4:
                        times[side].append(seconds)
                        if side == "with":
                            shares.append(figures["token_share"])
                            owns.append(figures["buffer_s"])
    on, off = statistics.median(times["with"]), statistics.median(times["without"])
    share = statistics.fmean(shares)
    # Tokens of replay over tokens of the step itself: what the extra work should cost.
    extra = share / (1 - share)
    result = {
        "parameters": parameters, "loss_mode": args.loss_mode, "with_s": on, "without_s": off, "ratio": on / off,
        "replayed_tokens_over_fresh": extra, "excess": on / off - 1 - extra, "buffer_s": statistics.median(owns),
        "buffer_share_of_step": statistics.median(owns) / on, "samples": samples,
    }  # fmt: skip
    print(f"{parameters:,} parameters, {args.loss_mode}, medians of {samples} steps in turn")
    print(f"without self-imitation {off * 1e3:9.1f} ms")
    print(f"with                   {on * 1e3:9.1f} ms   {on / off:.3f}x")
    print(f"replayed / fresh tokens in the update {extra:.3f}, excess over it {100 * result['excess']:+.1f} %")
    own, part = 1e3 * result["buffer_s"], 100 * result["buffer_share_of_step"]
    print(f"selection and push     {own:9.2f} ms   {part:.2f} % of it")
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
