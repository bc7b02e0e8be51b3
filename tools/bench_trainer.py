"""How fast a training step is: against transformers + torch, over two ranks, and packed against padded.

    python tools/bench_trainer.py                  # all three, about ten minutes on two quiet cores
    python tools/bench_trainer.py --quick          # small sizes, to see that it runs
    python tools/bench_trainer.py --only peer      # peer | scaling | packing

Samples of the contestants are interleaved in one process (or alternate, for ranks) and medians are compared, so that a
slow phase of the machine hits all of them. Prints a table and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "dist"), str(ROOT / "tools")]

import torch  # noqa: E402

from spear_megatron.types import Row, TrajectoryId  # noqa: E402

Models = dict[str, dict[str, int]]
MODELS: Models = {
    "5M": dict(hidden_size=256, num_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
               intermediate_size=768, vocab_size=4096),
    "30M": dict(hidden_size=512, num_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
                intermediate_size=1536, vocab_size=8192),
}  # fmt: skip
QUICK_MODELS = {"0.2M": dict(hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                             intermediate_size=128, vocab_size=512)}  # fmt: skip
PROMPT = 32


def make_rows(lengths: list[int], vocab_size: int) -> list[Row]:
    """On-policy rows of the given lengths, every token after the prompt sampled."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        mask = torch.arange(length) >= PROMPT
        rows.append(
            Row(
                trajectory=TrajectoryId(1, number, 0),
                segment=0,
                ids=torch.randint(0, vocab_size, (length,), generator=generator, dtype=torch.int32),
                response_mask=mask,
                rollout_log_probs=torch.zeros(length),
                advantages=mask * float(torch.randn(1, generator=generator)),
            )
        )
    return rows


def agent_lengths(count: int, longest: int) -> list[int]:
    """Log-normal lengths cut at ``longest``, a few rows at the limit: what multi-turn agents with tools produce."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.exp(0.7 * torch.randn(count, generator=generator)) * longest / 5
    lengths = lengths.clamp(PROMPT + 8, longest)
    lengths[:: max(count // 3, 1)] = longest
    return [int(length) for length in lengths]


def median_seconds(contestants: dict[str, Callable[[], Any]], samples: int) -> dict[str, float]:
    """Median wall-clock seconds of each, sampled in turn after one warm-up call."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(samples + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def torch_losses(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, *, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Clipped surrogate loss and entropy, summed over the response tokens, as plain torch has them.

    Args:
        logits: [rows, n - 1, V]; ``ids`` are [rows, n], mask and advantages of their last n - 1 tokens.
    """
    entropy = None
    if with_entropy:
        with torch.no_grad():
            distribution = torch.log_softmax(logits.float(), dim=-1)
            entropy = -((distribution.exp() * distribution).sum(-1) * mask).sum()
    flat = logits.flatten(0, 1).float()
    log_probs = -torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    log_probs = log_probs.view_as(mask)
    ratio = (log_probs - log_probs.detach()).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(surrogate * mask).sum(), entropy


def torch_step(folder: str, rows: list[Row], *, with_entropy: bool) -> Callable[[], None]:
    """The same update in plain torch on the transformers model: one padded batch, clipped surrogate, AdamW.

    ``with_entropy`` also computes the mean entropy of the response tokens, which our step always reports.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, foreach=True)
    ids = torch.stack([row.ids.long() for row in rows])
    mask = torch.stack([row.response_mask for row in rows])[:, 1:]
    advantages = torch.stack([row.advantages for row in rows])[:, 1:]

    def step() -> None:
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch_losses(logits, ids, mask, advantages, with_entropy=with_entropy)[0] / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(folder: str, rows: list[Row], *, max_tokens: int, world_size: int = 1) -> Callable[[], Any]:
    """``Actor.update`` on this rank's share; ours also reports the entropy and the difference to the engine."""
    from train_step import Layout, build_actor, share_of_rank

    actor, _, parallel = build_actor(folder, Layout("bench", world_size=world_size, max_tokens=max_tokens), lr=1e-5)
    share = share_of_rank(rows, parallel)
    return lambda: actor.update(share, on_policy=True)


def peer_on_rank(folder: str, rows: list[Row], samples: int, threads: int) -> dict[str, float]:
    """Medians of ours and of transformers + torch with and without the entropy, interleaved in this process."""
    torch.set_num_threads(threads)
    try:
        ours = our_step(folder, rows, max_tokens=sum(len(row.ids) for row in rows))
        contestants = {
            "ours": ours,
            "transformers": torch_step(folder, rows, with_entropy=False),
            "transformers_entropy": torch_step(folder, rows, with_entropy=True),
        }
        return median_seconds(contestants, samples)
    finally:
        torch.set_num_threads(1)


def seconds_on_rank(folder: str, rows: list[Row], world_size: int, max_tokens: int, samples: int) -> float:
    """Median step of ours over ``world_size`` ranks, one thread each."""
    torch.set_num_threads(1)
    step = our_step(folder, rows, max_tokens=max_tokens, world_size=world_size)
    return median_seconds({"ours": step}, samples)["ours"]


def packing_on_rank(
    folder: str, rows: list[Row], padded: list[Row], max_tokens: int, samples: int, threads: int
) -> dict[str, float]:
    """Medians of a step on rows as they are and on rows filled up to the longest, interleaved, one model."""
    from train_step import Layout, build_actor

    torch.set_num_threads(threads)
    try:
        actor, _, _ = build_actor(folder, Layout("bench", max_tokens=max_tokens), lr=1e-5)
        steps = {name: (lambda part=part: actor.update(part, on_policy=True)) for name, part in
                 (("packed", rows), ("padded", padded))}  # fmt: skip
        return median_seconds(steps, samples)
    finally:
        torch.set_num_threads(1)


def fill_up(row: Row, length: int) -> Row:
    """The row padded to ``length`` tokens; the padding is computed like in a padded batch and weighs nothing.

    Its last token is marked as sampled with advantage 0, because the packer leaves out everything after the last
    sampled token.
    """
    extra = length - len(row.ids)
    if extra == 0:
        return row
    zeros = torch.zeros(extra)
    mask = torch.cat([row.response_mask, zeros.bool()])
    mask[-1] = True
    return Row(
        trajectory=row.trajectory,
        segment=row.segment,
        ids=torch.cat([row.ids, torch.zeros(extra, dtype=torch.int32)]),
        response_mask=mask,
        rollout_log_probs=torch.cat([row.rollout_log_probs, zeros]),
        advantages=torch.cat([row.advantages, zeros]),
    )


def bench_peer(folders: dict[str, str], models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """Step time over transformers + torch on equal-length rows, so that padding plays no part."""
    from harness import run_ranks

    result = {}
    for name, folder in folders.items():
        count, length = (4, 64) if options.quick else ((16, 256) if name == "5M" else (8, 256))
        rows = make_rows([length] * count, models[name]["vocab_size"])
        seconds = run_ranks(peer_on_rank, 1, folder, rows, options.samples, options.threads, deadline_s=1200)[0]
        tokens = count * (length - 1)
        ours, theirs = seconds["ours"], seconds["transformers"]
        alike = seconds["transformers_entropy"]
        ratios = {"ratio": ours / alike, "ratio_without_entropy": ours / theirs}
        result[name] = {**seconds, **ratios, "tokens_per_s": tokens / ours}
        print(
            f"step {name:>5}: ours {1e3 * ours:8.1f} ms; transformers + torch {1e3 * alike:8.1f} ms with the entropy, "
            f"ratio {ours / alike:.3f}; {1e3 * theirs:8.1f} ms without, ratio {ours / theirs:.3f} "
            f"({options.threads} threads, {count} x {length} tokens)"
        )
    return result


def bench_scaling(folders: dict[str, str], models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """t(1 rank) / (2 t(2 ranks)) on the same global batch of ragged rows, one thread per rank, rounds alternating."""
    from harness import run_ranks

    result = {}
    for name, folder in folders.items():
        longest = 128 if options.quick else 512
        rows = make_rows(agent_lengths(32, longest), models[name]["vocab_size"])
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(1 if options.quick else 3):
            for world_size, values in times.items():
                arguments = (folder, rows, world_size, 2048, options.samples)
                ranks = run_ranks(seconds_on_rank, world_size, *arguments, deadline_s=1200)
                values.append(max(ranks))
        one, two = (statistics.median(values) for values in times.values())
        result[name] = {"one_rank": one, "two_ranks": two, "efficiency": one / (2 * two)}
        print(f"DP 1 -> 2 {name:>5}: {one:.3f} s -> {two:.3f} s, efficiency {one / (2 * two):.3f} (one thread each)")
    return result


def bench_packing(folders: dict[str, str], models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """Real tokens per second packed against padded, and how even the ranks' shares are."""
    from harness import run_ranks

    from spear_megatron.data.balance import assign, imbalance

    name, folder = next(iter(folders.items()))
    longest = 128 if options.quick else 1024
    lengths = agent_lengths(32, longest)
    rows = make_rows(lengths, models[name]["vocab_size"])
    padded = [fill_up(row, longest) for row in rows]
    samples = max(options.samples // 2, 1)
    arguments = (folder, rows, padded, 4 * longest, samples, options.threads)
    seconds = run_ranks(packing_on_rank, 1, *arguments, deadline_s=1200)[0]
    speedup = seconds["padded"] / seconds["packed"]
    rate = sum(lengths) / seconds["packed"]
    many = agent_lengths(512, 16384)
    uneven = {size: imbalance(many, assign(many, [0] * len(many), size), size) for size in (2, 4, 8, 16)}
    print(f"packing {name}: {rate:.0f} tokens/s, {speedup:.2f} x padded to the longest row")
    print("imbalance of 512 rows: " + ", ".join(f"DP{size} {100 * value:.2f} %" for size, value in uneven.items()))
    return {"tokens_per_s": rate, "speedup": speedup, "imbalance": uneven}


BENCHES = {"peer": bench_peer, "scaling": bench_scaling, "packing": bench_packing}


def main() -> None:
    """Run the benchmarks and print the figures."""
    from tiny import make_tiny_hf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHES), help="run one of them")
    parser.add_argument("--quick", action="store_true", help="small sizes and few samples")
    parser.add_argument("--samples", type=int, help="samples per median (default 9, 2 with --quick)")
    parser.add_argument("--threads", type=int, default=min(torch.get_num_threads(), 2), help="threads of one process")
    options = parser.parse_args()
    options.samples = options.samples or (2 if options.quick else 9)
    models = QUICK_MODELS if options.quick else MODELS
    with tempfile.TemporaryDirectory() as directory:
        # Small weights keep the logits of a random model in the range of a trained one.
        folders = {
            name: str(make_tiny_hf(Path(directory) / name, std=0.02, max_position_embeddings=4096, **sizes))
            for name, sizes in models.items()
        }
        result = {
            name: bench(folders, models, options) for name, bench in BENCHES.items() if options.only in (None, name)
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
