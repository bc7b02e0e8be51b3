"""Tokens per second of the embedded engine against transformers' ``generate``, in one run.

    python tools/bench_engine.py --out outputs/bench_engine.json

Every round times each contender once, in turn, on fresh random prompts of equal length; the figures are medians over
the rounds. transformers gets one rectangular batch, its best case; both sides sample at temperature 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.embedded import EmbeddedEngine
from spear_megatron.rollout.engine import GenerateRequest, SamplingParams

Contender = Callable[[torch.Tensor], None]


def build_model(args: argparse.Namespace) -> tuple[Any, ModelShape]:
    """A random Qwen2 model of the asked size (about 5 million parameters by default)."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).to(torch.float32).eval()
    model.generation_config.eos_token_id = None
    shape = ModelShape.from_hf_config({**config.to_dict(), "architectures": ["Qwen2ForCausalLM"]})
    return model, shape


def embedded(model: Any, shape: ModelShape, batch: int, args: argparse.Namespace) -> Contender:
    """The engine with room for the whole batch."""
    engine = EmbeddedEngine(shape, max_num_seqs=batch, max_model_len=args.prompt + args.new)
    engine.update_weights(((name, value.detach()) for name, value in model.named_parameters()), version=0)
    sampling = SamplingParams(max_new_tokens=args.new)

    async def complete(prompts: torch.Tensor) -> None:
        rows = [tuple(row) for row in prompts.tolist()]
        await asyncio.gather(
            *(engine.generate(GenerateRequest(str(i), ids, sampling, noise_key=i)) for i, ids in enumerate(rows))
        )

    return lambda prompts: asyncio.run(complete(prompts))


def hugging_face(model: Any, cache: str, args: argparse.Namespace) -> Contender:
    """transformers' ``generate`` with the named cache implementation."""

    @torch.inference_mode()
    def complete(prompts: torch.Tensor) -> None:
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=args.new,
            min_new_tokens=args.new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
            cache_implementation=cache,
        )
        assert out.shape[1] == args.prompt + args.new

    return complete


def measure(contenders: dict[str, Contender], batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of every contender in every round; the first round warms up and does not count."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    generator = torch.Generator().manual_seed(batch)
    for round_index in range(args.rounds + 1):
        prompts = torch.randint(args.vocab, (batch, args.prompt), generator=generator)
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender(prompts)
            if round_index:
                rates[name].append(batch * args.new / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Run the benchmark, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "hidden": 256, "heads": 4, "kv-heads": 2, "intermediate": 1024, "vocab": 4096}
    for name, value in {**sizes, "prompt": 64, "new": 128, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, shape = build_model(args)
    print(f"{shape.num_parameters() / 1e6:.2f} M parameters, {args.threads} threads, torch {torch.__version__}")
    print(
        f"{'batch':>5} {'embedded':>10} {'dynamic':>10} {'static':>10} {'ratio to the better':>20}   tokens/s, medians"
    )
    report: dict[str, Any] = {"arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    report |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "batches": {}}
    for batch in args.batches:
        contenders = {
            "embedded": embedded(model, shape, batch, args),
            "dynamic": hugging_face(model, "dynamic", args),
            "static": hugging_face(model, "static", args),
        }
        rates = measure(contenders, batch, args)
        median = {name: statistics.median(values) for name, values in rates.items()}
        ratio = median["embedded"] / max(median["dynamic"], median["static"])
        print(f"{batch:>5} " + " ".join(f"{median[name]:>10.0f}" for name in contenders) + f" {ratio:>19.2f}x")
        report["batches"][str(batch)] = {"median": median, "ratio": ratio, "rounds": rates}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
