"""Time the CUDA kernels against other ways to the same results, and those of token_logprobs against copying.

    python tools/bench_gpu_kernels.py --json outputs/bench/gpu_kernels.json

Every contender runs once per round, timed by CUDA events on logits of its own, after a buffer larger than the L2 cache
was read; figures are medians over the rounds. The fraction is (bytes that the pass must move / time) / (copy
bandwidth of the same rounds): the forward pass reads the logits once, the backward pass reads and writes them once.
Selection by covariance and policy loss follow (bench_gpu_policy.py), in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_gpu_policy  # noqa: E402

Results = tuple[Any, Any]
Function = Callable[[Any, Any], Results]
Sampler = Callable[["Clock", Any, Any], tuple[float, float]]
KERNEL, KERNEL_INPLACE, KERNEL_ALONE = "token_logprobs", "token_logprobs, in-place backward", "kernels alone, in place"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="tokens T")
    parser.add_argument("--vocab", type=int, nargs="+", default=[152064, 38016, 19008], help="columns V of this rank")
    parser.add_argument("--tokens", type=int, nargs="*", default=bench_gpu_policy.TOKENS, help="sizes of the loss")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved samples of each contender")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/gpu_kernels.json"), help="result file")
    arguments = parser.parse_args()
    if arguments.rounds < 20:
        parser.error(f"--rounds {arguments.rounds} must be at least 20 for a median that says something")
    return arguments


def eager_formula(logits: Any, targets: Any) -> Results:
    """The formula of common training code: log-prob by gather minus logsumexp, entropy as lse - sum(p * x)."""
    import torch

    x = logits.float()
    normaliser = torch.logsumexp(x, dim=-1)
    log_probs = x.gather(1, targets[:, None]).squeeze(1) - normaliser
    return log_probs, normaliser - (torch.softmax(x, dim=-1) * x).sum(-1)


def megatron_cross_entropy() -> Function | str:
    """Megatron's vocabulary-parallel cross-entropy on a group of one process (no entropy), or why there is none."""
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    except ImportError as error:
        return f"megatron-core cannot be imported: {error}"
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return lambda logits, targets: (-vocab_parallel_cross_entropy(logits.unsqueeze(1), targets[:, None])[:, 0], None)


class Clock:
    """Milliseconds of device work, each time with a cold L2 cache.

    What evicts the cache's content is read, not written: the write-back of a cache full of new values would fall into
    the time of whoever comes next. It takes the device longer than the host needs to hand over most contenders.
    """

    def __init__(self) -> None:
        import torch

        properties = torch.cuda.get_device_properties(0)
        size = max(4 * getattr(properties, "L2_cache_size", 0), 512 << 20)
        self._flush = torch.zeros(size // 4, dtype=torch.float32, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds from first to last kernel of ``work``, and what it returned."""
        started, ended = self._events
        self._flush.sum()
        started.record()
        result = work()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended), result


def sample(function: Function, clock: Clock, source: Any, targets: Any) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass on a private copy of the logits."""
    import torch

    # The in-place backward overwrites what it is given, which must not be a leaf.
    logits = source.clone().requires_grad_().view_as(source)
    forward, (log_probs, entropy) = clock.time(lambda: function(logits, targets))
    outputs = [log_probs] if entropy is None else [log_probs, entropy]
    ones = [torch.ones_like(output) for output in outputs]
    backward, _ = clock.time(lambda: torch.autograd.grad(outputs, [logits], ones))
    return forward, backward


def sample_kernels(clock: Clock, source: Any, targets: Any) -> tuple[float, float]:
    """Milliseconds of the two kernels alone, the backward one in place, without what joins them."""
    import torch

    from spear_megatron.kernels import logprobs_cuda
    from spear_megatron.kernels.softmax_stats import VocabShard, merge_stats, row_gradients, saved_for_backward

    logits, shard = source.clone(), VocabShard(0, source.shape[1])
    forward, stats = clock.time(lambda: logprobs_cuda.row_stats(logits, targets, shard, 1.0, True))
    saved = saved_for_backward(merge_stats(stats[None], 1.0), True, torch.float32)
    row_grads = row_gradients(saved, torch.ones_like(saved[:, 0]), torch.ones_like(saved[:, 0]))
    backward, _ = clock.time(lambda: logprobs_cuda.logits_grad(logits, targets, shard, 1.0, row_grads, logits))
    return forward, backward


def make_logits(rows: int, vocab: int) -> tuple[Any, Any]:
    """bf16 logits [rows, vocab] and targets [rows] on the device."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    source = torch.randn(rows, vocab, generator=generator, device="cuda", dtype=torch.bfloat16) * 3
    return source, torch.randint(0, vocab, (rows,), generator=generator, device="cuda")


def measure(samplers: dict[str, Sampler], clock: Clock, source: Any, targets: Any, rounds: int) -> dict[str, Any]:
    """All contenders on the same logits: median milliseconds, bytes, fractions of the copy bandwidth."""
    import torch

    spare, bytes_of_logits = torch.empty_like(source), source.numel() * source.element_size()
    samplers, failed = fitting(samplers, clock, source, targets)
    copies: list[float] = []
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    for round_index in range(-2, rounds):  # the first rounds warm up
        copied, _ = clock.time(lambda: spare.copy_(source))
        found = {name: sampler(clock, source, targets) for name, sampler in samplers.items()}
        if round_index >= 0:
            copies.append(copied)
            for name, times in found.items():
                samples[name].append(times)
    copy_rate = 2 * bytes_of_logits / statistics.median(copies)  # bytes per millisecond
    moved = {"forward": bytes_of_logits, "backward": 2 * bytes_of_logits}
    return {
        "shape": list(source.shape),
        "copy_gb_per_s": copy_rate / 1e6,
        "copy_samples_ms": copies,
        "failed": failed,
        "passes": [
            {
                "contender": name,
                "pass": which,
                "median_ms": statistics.median(times[index] for times in samples[name]),
                "bytes": moved[which],
                "fraction_of_copy": moved[which] / copy_rate / statistics.median(t[index] for t in samples[name]),
                "samples_ms": [times[index] for times in samples[name]],
            }
            for name in samplers
            for index, which in enumerate(moved)
        ],
    }


def fitting(
    samplers: dict[str, Sampler], clock: Clock, source: Any, targets: Any
) -> tuple[dict[str, Sampler], dict[str, str]]:
    """The contenders that run here, compiled and warm, and why the others do not (memory, a compiler).

    Those of this package must run: their errors end the benchmark.
    """
    import torch

    kept, failed = {}, {}
    for name, sampler in samplers.items():
        try:
            sampler(clock, source, targets)
        except torch.cuda.OutOfMemoryError:
            failed[name] = "out of device memory"
        except Exception as error:
            if name in (KERNEL, KERNEL_INPLACE, KERNEL_ALONE):
                raise
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            kept[name] = sampler
    torch.cuda.empty_cache()
    return kept, failed


def contenders() -> tuple[dict[str, Sampler], dict[str, str]]:
    """Name -> sampler, and name -> reason of those that cannot run here."""
    import torch

    from spear_megatron.kernels import token_logprobs

    functions: dict[str, Function] = {
        KERNEL: lambda x, t: token_logprobs(x, t, implementation="compiled"),
        KERNEL_INPLACE: lambda x, t: token_logprobs(x, t, implementation="compiled", inplace_backward=True),
        "eager implementation": lambda x, t: token_logprobs(x, t, implementation="eager"),
        "torch eager": eager_formula,
        "torch.compile": torch.compile(eager_formula, dynamic=False),
    }
    skipped = {}
    megatron = megatron_cross_entropy()
    if isinstance(megatron, str):
        skipped["megatron cross-entropy (no entropy)"] = megatron
    else:
        functions["megatron cross-entropy (no entropy)"] = megatron
    samplers: dict[str, Sampler] = {KERNEL_ALONE: sample_kernels}
    samplers |= {name: functools.partial(sample, function) for name, function in functions.items()}
    return samplers, skipped


def print_table(results: list[dict[str, Any]], skipped: dict[str, str]) -> None:
    """One line per shape, pass and contender, as a Markdown table."""
    print("| logits | pass | contender | median ms | GB to move | fraction of copy bandwidth | time / token_logprobs |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        base = {item["pass"]: item["median_ms"] for item in result["passes"] if item["contender"] == KERNEL}
        for item in result["passes"]:
            print(
                f"| {result['shape']} bf16 | {item['pass']} | {item['contender']} | {item['median_ms']:.3f} "
                f"| {item['bytes'] / 1e9:.2f} | {item['fraction_of_copy']:.2f} "
                f"| {item['median_ms'] / base[item['pass']]:.2f} |"
            )
        print(f"| {result['shape']} bf16 | | copy of the logits: {result['copy_gb_per_s']:.0f} GB/s | | | 1.00 | |")
        for name, reason in result["failed"].items():
            print(f"| {result['shape']} bf16 | | {name}: {reason} | | | | |")
    for name, reason in skipped.items():
        print(f"\n{name}: not run, {reason}")


def main() -> int:
    """Measure every shape and write the report; the exit status."""
    arguments = parse_arguments()
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing can be measured", file=sys.stderr)
        return 1
    samplers, skipped = contenders()
    clock = Clock()
    results = [
        measure(samplers, clock, *make_logits(arguments.rows, vocab), arguments.rounds) for vocab in arguments.vocab
    ]
    policy = [bench_gpu_policy.measure(clock.time, tokens, arguments.rounds) for tokens in arguments.tokens]
    report = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rounds": arguments.rounds,
        "results": results,
        "policy": policy,
        "policy_targets": bench_gpu_policy.targets(policy),
        "not_run": skipped,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1))
    print_table(results, skipped)
    bench_gpu_policy.print_table(policy)
    print(f"\n{report['device']}; written to {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
