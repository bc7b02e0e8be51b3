"""Time a whole training step of one device against transformers + torch: utilisation of the device and peak memory.

    python tools/bench_step.py --model 0.5B 1.5B --json outputs/bench/step.json     # with a CUDA device
    python tools/bench_step.py --model tiny                                          # anywhere, to see that it runs

Random weights of the published Qwen2.5 shapes, rows of equal length, so that padding plays no part, and the same tokens
in a micro-batch. The contenders take turns in phases of their own, so that each has the device's memory to itself; step
times are medians over all phases. Both compute the entropy. Model operations are those of the architecture: three times
a forward pass (arXiv 2104.04473, appendix), logits of sampled tokens only, nothing for recomputation. The share of the
products of matrices that were measured between the phases says how much of the machine as it is was used, MFU how much
of the peak of --peak-tflops. Entropy and gradient norm of the first step show that the contenders compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402

from bench_common import write_report  # noqa: E402
from bench_trainer import PROMPT, make_rows, torch_losses  # noqa: E402
from spear_megatron.types import Row  # noqa: E402

MODELS: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                 vocab_size=512),
    "0.5B": dict(hidden_size=896, num_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                 vocab_size=151936),
    "1.5B": dict(hidden_size=1536, num_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=8960, vocab_size=151936),
}  # fmt: skip
OURS = "spear_megatron"
WARM_UP = 3
LEARNING_RATE = 1e-6

Step = Callable[[], tuple[float, float]]  # one optimizer step; mean entropy of the sampled tokens, gradient norm
Opened = Callable[[], contextlib.AbstractContextManager[Step]]


class Phase(NamedTuple):
    """One contender alone on the device: seconds of its steps, peak bytes of the device (None on the CPU)."""

    entropy: float
    grad_norm: float
    seconds: list[float]
    peak_bytes: int | None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["0.5B"], help="sizes")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="steps of a phase that count")
    parser.add_argument("--phases", type=int, default=2, help="phases of each contender")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the device (H100, H200)")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/step.json"), help="result file")
    arguments = parser.parse_args()
    if not PROMPT < arguments.length <= arguments.micro_batch_tokens:
        parser.error(f"--length {arguments.length} must be above {PROMPT} and at most --micro-batch-tokens")
    if min(arguments.rows, arguments.steps, arguments.phases) < 1:
        parser.error("--rows, --steps and --phases must be at least 1")
    return arguments


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def our_step(folder: str, rows: list[Row], micro_batch_tokens: int) -> Iterator[Step]:
    """``Actor.update`` as training calls it; bf16 on a device, fp32 on the CPU."""
    from spear_megatron.cli.build import build_actor
    from spear_megatron.config.loader import load
    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.parallel.state import initialize

    settings = {
        "model.path": folder, "model.dtype": "bf16" if device().type == "cuda" else "fp32",
        "actor.ppo_max_token_len_per_gpu": micro_batch_tokens, "actor.optim.lr": LEARNING_RATE,
    }  # fmt: skip
    config = load(Config, None, [f"actor_rollout_ref.{key}={value}" for key, value in settings.items()])
    parallel = initialize()
    try:
        optim = config.actor_rollout_ref.actor.optim
        actor, _ = build_actor(config, parallel, ModelShape.from_folder(folder), optim, 1000)

        def step() -> tuple[float, float]:
            result = actor.update(rows, on_policy=True)
            if result.skipped:
                raise RuntimeError(f"the step was skipped: {result.skipped}")
            return result.metrics["actor/entropy"], result.metrics["actor/grad_norm"]

        yield step
    finally:
        parallel.destroy()


@contextlib.contextmanager
def torch_step(folder: str, rows: list[Row], micro_batch_tokens: int, *, mixed: bool) -> Iterator[Step]:
    """The same update in plain torch: transformers with SDPA, AdamW, gradients of micro-batches added up.

    ``mixed``: fp32 weights under bf16 autocast; otherwise weights, gradients and moments are bf16 on a device: less
    memory than training needs, as small updates are lost. On the CPU both are fp32.
    """
    import transformers

    place = device()
    on_device = place.type == "cuda"
    dtype = torch.bfloat16 if on_device and not mixed else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=on_device)
    ids = torch.stack([row.ids.long() for row in rows]).to(place)
    mask = torch.stack([row.response_mask for row in rows]).to(place)[:, 1:]
    advantages = torch.stack([row.advantages for row in rows]).to(place)[:, 1:]
    sampled, together = mask.sum(), micro_batch_tokens // ids.shape[1]

    def step() -> tuple[float, float]:
        entropies = torch.zeros((), device=place)
        for part in torch.arange(len(rows)).split(together):
            chosen = slice(int(part[0]), int(part[-1]) + 1)
            with torch.autocast(place.type, torch.bfloat16, enabled=on_device and mixed):
                logits = model(ids[chosen, :-1], use_cache=False).logits
            loss, entropy = torch_losses(logits, ids[chosen], mask[chosen], advantages[chosen], with_entropy=True)
            del logits
            (loss / sampled).backward()
            entropies += entropy
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(entropies / sampled), float(norm)

    yield step


def contenders(folder: str, rows: list[Row], micro_batch_tokens: int) -> dict[str, Opened]:
    arguments = (folder, rows, micro_batch_tokens)
    return {
        OURS: lambda: our_step(*arguments),
        "transformers, fp32 weights, bf16 autocast": lambda: torch_step(*arguments, mixed=True),
        "transformers, all bf16": lambda: torch_step(*arguments, mixed=False),
    }


def run_phase(opened: Opened, steps: int) -> Phase:
    """Open a contender, warm it up, time its steps, and give its memory back."""
    on_device = device().type == "cuda"
    with opened() as step:
        entropy, grad_norm = step()
        for _ in range(WARM_UP - 1):
            step()
        wait()
        if on_device:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            wait()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if on_device else None
    del step
    gc.collect()
    if on_device:
        torch.cuda.empty_cache()
    return Phase(entropy, grad_norm, seconds, peak)


def product_rate() -> float:
    """Operations per second of products of large square matrices, in bf16 on a device and fp32 on the CPU."""
    on_device = device().type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_device else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        wait()
        started = time.perf_counter()
        torch.mm(left, right)
        wait()
        times.append(time.perf_counter() - started)
    return float(2 * size**3 / statistics.median(times[2:]))


def model_operations(folder: str, rows: list[Row]) -> float:
    """Operations of the forward and backward passes of one step."""
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.plan.timing import forward_flops

    tokens = sum(len(row.ids) for row in rows)
    sampled = sum(int(row.response_mask.sum()) for row in rows)
    return 3 * forward_flops(ModelShape.from_folder(folder), tokens, tokens / len(rows), sampled / tokens)


def measure(folder: str, arguments: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """All contenders on one model: seconds, tokens per second, utilisation, peak memory."""
    rows = make_rows([arguments.length] * arguments.rows, vocab_size)
    opened = contenders(folder, rows, arguments.micro_batch_tokens)
    phases: dict[str, list[Phase]] = {name: [] for name in opened}
    products = [product_rate()]
    for number in range(arguments.phases):
        for name, each in opened.items():
            print(f"phase {number + 1} of {arguments.phases}: {name}", flush=True)
            phases[name].append(run_phase(each, arguments.steps))
            products.append(product_rate())
    operations, ceiling = model_operations(folder, rows), statistics.median(products)
    found = {}
    for name, parts in phases.items():
        seconds = statistics.median(value for part in parts for value in part.seconds)
        rate = operations / seconds
        peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
        found[name] = {
            "seconds": seconds,
            "tokens_per_s": sum(len(row.ids) for row in rows) / seconds,
            "tflops": rate / 1e12,
            "share_of_products": rate / ceiling,
            "mfu": rate / (1e12 * arguments.peak_tflops) if device().type == "cuda" else None,
            "peak_gib": max(peaks) / 2**30 if peaks else None,
            "entropy": parts[0].entropy,
            "grad_norm": parts[0].grad_norm,
            "samples_s": [part.seconds for part in parts],
        }
    return {"operations": operations, "products_tflops": ceiling / 1e12, "contenders": found}


def print_table(model: str, result: dict[str, Any]) -> None:
    """One line per contender, as a Markdown table."""
    print(f"\n{model}: products of matrices {result['products_tflops']:.2f} TFLOP/s")
    print("| contender | s per step | tokens/s | TFLOP/s | of products | MFU | peak GiB | time / ours | entropy | norm |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    ours = result["contenders"][OURS]["seconds"]
    for name, item in result["contenders"].items():
        mfu, peak = ("-" if value is None else f"{value:.2f}" for value in (item["mfu"], item["peak_gib"]))
        print(
            f"| {name} | {item['seconds']:.4f} | {item['tokens_per_s']:.0f} | {item['tflops']:.3f} "
            f"| {item['share_of_products']:.2f} | {mfu} | {peak} | {item['seconds'] / ours:.2f} "
            f"| {item['entropy']:.4f} | {item['grad_norm']:.4f} |"
        )


def main() -> None:
    """Run the models and write the report."""
    arguments = parse_arguments()
    from tiny import make_tiny_hf

    name = torch.cuda.get_device_name() if device().type == "cuda" else "CPU"
    results = {}
    for model in arguments.model:
        with tempfile.TemporaryDirectory() as directory:
            # Small weights keep the logits of a random model in the range of a trained one.
            longest = max(arguments.length, 4096)
            folder = make_tiny_hf(
                directory, "qwen2", std=0.02, dtype=torch.bfloat16, max_position_embeddings=longest, **MODELS[model]
            )
            results[model] = measure(str(folder), arguments, MODELS[model]["vocab_size"])
        print_table(model, results[model])
    write_report(arguments.json, results, device=name, rows=arguments.rows, length=arguments.length)


if __name__ == "__main__":
    main()
