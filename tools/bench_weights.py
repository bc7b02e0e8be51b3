"""How fast weights leave the trainer: buckets in shared memory and by broadcast, against memcpy and plain gloo.

    python tools/bench_weights.py                # a model of 30 M parameters, a few minutes on two quiet cores
    python tools/bench_weights.py --size deep    # 16 M in many small tensors, which one-by-one sending pays for
    python tools/bench_weights.py --quick        # a tiny one, to see that it runs

Rank 0 of two holds a model, rank 1 plays the server: it copies what it receives into tensors of its own. All contenders
move the same bytes and their samples are interleaved; medians are compared. `gather` brings every bucket into memory
that another process can open, which is one copy, and is compared with one `memcpy` of the same bytes between warm
buffers; `shared memory` and `broadcast` go on until the server has loaded everything, and are compared with gloo's
broadcast of the ready tensors, one by one and as one flat tensor. Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / part) for part in ("", "dist", "unit")), str(ROOT / "tools")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

SIZES: dict[str, dict[str, int]] = {
    "30M": dict(
        hidden_size=512, num_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536, vocab_size=8192,
    ),
    "deep": dict(
        hidden_size=256, num_layers=24, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=512, vocab_size=4096,
    ),
    "tiny": dict(),
}  # fmt: skip
AIMS = {"gather / memcpy": 0.8, "shared memory / gloo one by one": 3.0, "broadcast / gloo one by one": 3.0}


class Sender:
    """Rank 0: every contender as a method that returns when the server has what it should have."""

    def __init__(self, folder: str, parallel: Any, bucket_bytes: int) -> None:
        from spear_megatron.model.hf_io import iter_hf_tensors, load_hf_folder
        from spear_megatron.model.provider import build_model
        from spear_megatron.model.shape import ModelShape
        from spear_megatron.parallel.config import MegatronConfig
        from spear_megatron.weights.gather import BucketGatherer
        from spear_megatron.weights.memory import BufferPool, Ledger, shared_bytes
        from spear_megatron.weights.plan import plan_sync

        self.parallel = parallel
        shape = ModelShape.from_folder(folder)
        chunks = build_model(shape, MegatronConfig(), dtype=torch.float32, parallel=parallel)
        load_hf_folder(chunks, shape, folder, parallel)
        self.plan = plan_sync(shape.parameter_shapes(), torch.float32, limit_bytes=bucket_bytes, num_owners=1)
        self.ledger = Ledger()
        self.pool = BufferPool(bucket_bytes, self.ledger, shared_bytes)
        self.gatherer = BucketGatherer(chunks, shape, parallel, self.plan, self.pool, self.ledger)
        self.ready = [tensor for _, tensor in iter_hf_tensors(chunks, shape, parallel) if tensor is not None]
        self.flat = torch.cat([tensor.view(-1) for tensor in self.ready])
        self.copy = torch.empty_like(self.flat)
        self.number = 0

    def memcpy(self) -> None:
        self.copy.copy_(self.flat)

    def gather(self) -> None:
        for bucket in self.plan.buckets:
            flat = self.gatherer.gather(bucket)
            assert flat is not None
            self.pool.give_back(flat)

    def shared_memory(self) -> None:
        from spear_megatron.weights.payload import flat_payload
        from spear_megatron.weights.stream import stream_buckets

        def send(bucket: Any, flat: torch.Tensor) -> None:
            text = flat_payload(bucket, flat, torch.float32, "shared_memory")
            self.parallel.store.set(f"bench/{self.number}", text)
            self.parallel.store.wait([f"bench/{self.number}/done"])
            self.number += 1

        stream_buckets(self.gatherer, self.plan.buckets, self.pool, send)

    def broadcast(self) -> None:
        from spear_megatron.weights.stream import stream_buckets

        def send(bucket: Any, flat: torch.Tensor) -> None:
            dist.broadcast(flat, 0, group=self.parallel.dp_group)

        stream_buckets(self.gatherer, self.plan.buckets, self.pool, send)

    def gloo_one_by_one(self) -> None:
        for tensor in self.ready:
            dist.broadcast(tensor, 0, group=self.parallel.dp_group)

    def gloo_flat(self) -> None:
        dist.broadcast(self.flat, 0, group=self.parallel.dp_group)


class Receiver:
    """Rank 1: what a server does with the same bytes."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.weights = {
            entry.name: torch.empty(entry.shape) for bucket in sender.plan.buckets for entry in bucket.entries
        }
        self.flat = torch.empty_like(sender.flat)
        self.buffer = torch.empty(max(bucket.num_bytes for bucket in sender.plan.buckets), dtype=torch.uint8)
        self.number = 0

    def memcpy(self) -> None:
        """The other rank works alone."""

    def gather(self) -> None:
        """The other rank works alone."""

    def shared_memory(self) -> None:
        from spear_megatron.testing.payloads import Unpickler

        store = self.sender.parallel.store
        for _ in self.sender.plan.buckets:
            value = Unpickler(base64.b64decode(store.get(f"bench/{self.number}"))).load()
            flat = value["flattened_tensor"]
            for meta in value["metadata"]:
                part = flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
                self.weights[meta.name].copy_(part)
            store.set(f"bench/{self.number}/done", "1")
            self.number += 1

    def broadcast(self) -> None:
        for bucket in self.sender.plan.buckets:
            flat = self.buffer[: bucket.num_bytes]
            dist.broadcast(flat, 0, group=self.sender.parallel.dp_group)
            for entry in bucket.entries:
                self.weights[entry.name].copy_(entry.view(flat, torch.float32))

    def gloo_one_by_one(self) -> None:
        for tensor in self.weights.values():
            dist.broadcast(tensor, 0, group=self.sender.parallel.dp_group)

    def gloo_flat(self) -> None:
        dist.broadcast(self.flat, 0, group=self.sender.parallel.dp_group)


CONTENDERS = ("memcpy", "gather", "shared_memory", "broadcast", "gloo_one_by_one", "gloo_flat")


def time_on_rank(folder: str, samples: int, bucket_bytes: int) -> dict[str, Any]:
    """Seconds of every contender and sample until both ranks are done, and the sizes."""
    from spear_megatron.parallel.state import initialize

    parallel = initialize(timeout_s=300)
    sender = Sender(folder, parallel, bucket_bytes)
    side: Any = sender if parallel.rank == 0 else Receiver(sender)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for sample in range(samples + 1):
        for name in CONTENDERS:
            dist.barrier(group=parallel.cpu_group)
            start = time.perf_counter()
            getattr(side, name)()
            alone = time.perf_counter() - start
            dist.barrier(group=parallel.cpu_group)
            both = time.perf_counter() - start
            if sample:  # the first one touches every page
                seconds[name].append(alone if name in ("memcpy", "gather") else both)
        if parallel.rank:
            for entry, tensor in zip(side.weights, sender.ready, strict=True):
                assert torch.equal(side.weights[entry], tensor), entry
    return {
        "seconds": seconds,
        "num_bytes": sender.plan.num_bytes,
        "num_buckets": len(sender.plan.buckets),
        "num_tensors": len(sender.ready),
        "peak_bytes": sender.ledger.peak,
    }


def report(result: Mapping[str, Any]) -> dict[str, Any]:
    """Medians, rates and ratios; prints them."""
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    rates = {name: result["num_bytes"] / seconds / 1e9 for name, seconds in medians.items()}
    for name, rate in rates.items():
        print(f"{name:>16}  {1e3 * medians[name]:9.2f} ms  {rate:7.2f} GB/s")
    ratios = {
        "gather / memcpy": rates["gather"] / rates["memcpy"],
        "shared memory / gloo one by one": rates["shared_memory"] / rates["gloo_one_by_one"],
        "shared memory / gloo flat": rates["shared_memory"] / rates["gloo_flat"],
        "broadcast / gloo one by one": rates["broadcast"] / rates["gloo_one_by_one"],
    }
    for name, ratio in ratios.items():
        print(f"{name:>32}  {ratio:6.2f}x" + (f"  (aim {AIMS[name]:g}x)" if name in AIMS else ""))
    return {**result, "median_s": medians, "gb_per_s": rates, "ratios": ratios, "aims": AIMS}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two samples")
    parser.add_argument("--size", choices=sorted(SIZES), default="30M", help="the model")
    parser.add_argument("--samples", type=int, default=21, help="interleaved samples of every contender")
    parser.add_argument("--bucket-mb", type=float, default=16.0, help="MiB of a bucket")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    from harness import run_ranks
    from tiny import make_tiny_hf

    size, samples = ("tiny", 2) if args.quick else (args.size, args.samples)
    bucket_bytes = 1 << 14 if args.quick else int(args.bucket_mb * (1 << 20))
    with tempfile.TemporaryDirectory() as folder:
        make: Callable[[], Path] = partial(make_tiny_hf, folder, **SIZES[size])
        result = run_ranks(time_on_rank, 2, str(make()), samples, bucket_bytes, deadline_s=1200)[0]
    megabytes, tensors, buckets = result["num_bytes"] / 1e6, result["num_tensors"], result["num_buckets"]
    print(f"{size}: {megabytes:.1f} MB, {tensors} tensors in {buckets} buckets, medians of {samples}")
    figures = {"size": size, "samples": samples, **report(result)}
    print(json.dumps(figures))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    from bench_common import keep_freed_memory

    keep_freed_memory()
    import bench_weights  # ranks find the functions by the module's name

    bench_weights.main()
