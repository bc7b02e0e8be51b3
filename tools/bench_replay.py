"""What self-imitation costs per training step: the buffer's own work, and moving the chosen trajectories.

    python tools/bench_replay.py                   # both, a few minutes on two quiet cores
    python tools/bench_replay.py --quick           # small sizes, to see that it runs
    python tools/bench_replay.py --only exchange   # step | exchange

`step` times one rank that samples every trajectory itself and pushes half of them: entries and push rules, payloads and
segment files, recalibration and selection from a full buffer. `exchange` moves a quarter of a step's trajectories to
the ranks that train on them, by the payload exchange and by `all_gather_object` of the same records; samples of the two
are interleaved and medians compared. Prints a table and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "dist"), str(ROOT / "tools")]

import torch  # noqa: E402

from spear_megatron.algorithms.recalibration import GroupStatistics  # noqa: E402
from spear_megatron.data.exchange import TensorRecord  # noqa: E402
from spear_megatron.replay.entries import ReplayEntry  # noqa: E402
from spear_megatron.replay.payload import BYTES_PER_TOKEN, make_payload  # noqa: E402
from spear_megatron.types import RewardParts, Segment, StopReason, Trajectory, TrajectoryId  # noqa: E402

# Trajectories and tokens of a step, trajectories of a group, and N_D.
Size = tuple[int, int, int, int]
SIZES: dict[str, Size] = {"quickstart": (256, 150, 8, 256), "32B": (2048, 4096, 16, 2048)}
QUICK: dict[str, Size] = {"tiny": (32, 50, 4, 16)}


def make_trajectory(step: int, number: int, tokens: int, group: int) -> Trajectory:
    """One made-up trajectory; every second one succeeds."""
    values = torch.rand(tokens, generator=torch.Generator().manual_seed(number))
    versions = torch.full((tokens,), step - 1, dtype=torch.int32)
    ids = (values * 30000).int()
    segment = Segment(ids, torch.arange(tokens) >= 32, -values, policy_versions=versions)
    good = number % 2 == 0
    parts = RewardParts(1.0 if good else -1.0, num_tool_calls=number % 4, success=good, num_tool_turns=number % 4)
    return Trajectory(
        TrajectoryId(step, number // group, number % group), (segment,), parts, StopReason.ANSWER, step - 1
    )


def make_entry(member: Trajectory, shard: int) -> ReplayEntry:
    """What the index says of it."""
    tokens = member.num_tokens
    base, bonus = member.reward.outcome, 0.1 * member.reward.num_tool_calls
    return ReplayEntry(
        id=member.id, shard=shard, base=base, bonus=bonus, parts=member.reward, stored_reward=base + bonus,
        advantage=base, num_tokens=tokens, num_sampled=tokens - 32, num_bytes=BYTES_PER_TOKEN * tokens,
        temperature=1.0,
    )  # fmt: skip


def make_record(member: Trajectory) -> TensorRecord:
    """Its payload, with the sampling engine's log-probs in place of the trainer's."""
    logs = [segment.rollout_log_probs for segment in member.segments]
    return make_payload(member, logs, [0.0] * len(logs), 1.0)


def steps_on_rank(size: Size, samples: int, folder: str) -> dict[str, float]:
    """Median seconds per step of every part, once the buffer is full."""
    from spear_megatron.parallel.state import initialize
    from spear_megatron.replay.buffer import ReplayBuffer
    from spear_megatron.replay.config import ReplayConfig
    from spear_megatron.replay.decisions import ReplayRules

    count, tokens, group, capacity = size
    rules = ReplayRules(
        buffer_size=capacity, score_threshold=0.0, tolerate_steps=10, weight_decay=-1.0, norm_by_std=False,
        replay=ReplayConfig(),
    )  # fmt: skip
    buffer = ReplayBuffer(rules, initialize(timeout_s=60), Path(folder), baseline_size=10240, seed=0, temperature=1.0)
    seconds: dict[str, list[float]] = {"index": [], "payloads": [], "push": [], "select": [], "snapshot": []}
    warm_up = -(-2 * capacity // count) + 1
    for step in range(1, warm_up + samples + 1):
        members = [make_trajectory(step, number, tokens, group) for number in range(count)]
        marks = [time.perf_counter()]
        plan = buffer.plan_push([make_entry(member, 0) for member in members])
        rewards = [(member.reward.outcome, 0.1 * member.reward.num_tool_calls) for member in members]
        parts = [rewards[at : at + group] for at in range(0, count, group)]
        groups = [GroupStatistics.of([s for s, _ in part], [n for _, n in part], 0.5) for part in parts]
        marks.append(time.perf_counter())
        accepted = {entry.id for entry in plan.accepted}
        payloads = {member.id: make_record(member) for member in members if member.id in accepted}
        marks.append(time.perf_counter())
        buffer.push(step, plan, payloads, groups)
        marks.append(time.perf_counter())
        buffer.expire(step + 1)
        selection = buffer.select(step + 1, 0.4, count // 4)
        buffer.payloads([item.entry.id for item in selection.chosen])
        marks.append(time.perf_counter())
        if step > warm_up:
            assert len(selection.chosen) == count // 4
            buffer.snapshot()
            marks.append(time.perf_counter())
            for name, start, end in zip(seconds, marks, marks[1:], strict=False):
                seconds[name].append(end - start)
    buffer.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def exchange_on_rank(size: Size, samples: int) -> dict[str, list[float]]:
    """Seconds per sample, until the last rank is done, of the two ways to move a quarter of a step's trajectories."""
    import torch.distributed as dist

    from spear_megatron.data.balance import assign
    from spear_megatron.data.exchange import exchange
    from spear_megatron.parallel.state import initialize

    parallel = initialize(timeout_s=300)
    count, tokens, group, _ = size
    chosen = range(0, count, 4)
    owners = dict(zip(chosen, assign([float(tokens)] * len(chosen), [0] * len(chosen), parallel.dp_size), strict=True))
    # Shards follow the position in another order than owners do, so that most records change their rank.
    own = [number for place, number in enumerate(chosen) if (place * 7 // 3) % parallel.dp_size == parallel.dp_rank]
    records = {number: make_record(make_trajectory(1, number, tokens, group)) for number in own}
    wanted = sorted(number for number in chosen if owners[number] == parallel.dp_rank)

    def by_exchange() -> list[TensorRecord]:
        payloads = [(owners[number], record) for number, record in records.items()]
        return exchange(payloads, parallel, phase="bench", timeout_s=120)

    def by_gather() -> list[TensorRecord]:
        everything: list[Any] = [None] * parallel.world_size
        dist.all_gather_object(everything, records, group=parallel.cpu_group)
        return [record for part in everything for number, record in part.items() if owners[number] == parallel.dp_rank]

    seconds: dict[str, list[float]] = {"exchange": [], "all_gather_object": []}
    for sample in range(samples + 1):
        for name, move in (("exchange", by_exchange), ("all_gather_object", by_gather)):
            dist.barrier(group=parallel.cpu_group)
            start = time.perf_counter()
            received = move()
            elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX, group=parallel.cpu_group)
            names = sorted(TrajectoryId(*record.fields["id"]) for record in received)
            assert names == [TrajectoryId(1, number // group, number % group) for number in wanted]
            if sample:  # the first one sets up connections
                seconds[name].append(float(elapsed))
    return seconds


def bench_step(sizes: dict[str, Size], samples: int) -> dict[str, Any]:
    """The buffer's own work on one rank."""
    from harness import run_ranks

    result = {}
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            parts = run_ranks(steps_on_rank, 1, size, samples, folder, deadline_s=1200)[0]
        result[name] = {**parts, "step": sum(value for part, value in parts.items() if part != "snapshot")}
        figures = ", ".join(f"{part} {1e3 * value:.1f}" for part, value in result[name].items())
        print(f"buffer {name:>10} ({size[0]} trajectories x {size[1]} tokens, N_D {size[3]}), ms: {figures}")
    return result


def bench_exchange(sizes: dict[str, Size], samples: int) -> dict[str, Any]:
    """The payload exchange against gathering everything everywhere."""
    from harness import run_ranks

    result: dict[str, Any] = {}
    for name, size in sizes.items():
        for world_size in (2, 4):
            ranks = run_ranks(exchange_on_rank, world_size, size, samples, deadline_s=1200)
            ours, theirs = (statistics.median(ranks[0][way]) for way in ("exchange", "all_gather_object"))
            result[f"{name} x{world_size}"] = {"exchange": ours, "all_gather_object": theirs, "ratio": theirs / ours}
            print(
                f"move {size[0] // 4:>4} x {size[1]:>4} tokens among {world_size} ranks: exchange {1e3 * ours:.1f} ms, "
                f"all_gather_object {1e3 * theirs:.1f} ms, ratio {theirs / ours:.1f}"
            )
    return result


BENCHES = {"step": bench_step, "exchange": bench_exchange}


def main() -> None:
    """Run the benchmarks and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHES), help="run one of them")
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples")
    parser.add_argument("--samples", type=int, help="samples per median (default 9, 2 with --quick)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    samples = options.samples or (2 if options.quick else 9)
    sizes = QUICK if options.quick else SIZES
    result = {name: bench(sizes, samples) for name, bench in BENCHES.items() if options.only in (None, name)}
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
