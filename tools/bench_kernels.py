"""Time token_logprobs against torch's own operations: interleaved samples, medians and ratios, JSON and a table.

    python tools/bench_kernels.py --rows 4096 --vocab 32000 --json outputs/bench/kernels.json

Peers: torch's own operations, the log-prob and entropy class of vocabulary-parallel trainers that keep the softmax in
fp32, and megatron-core's cross-entropy (which knows no entropy).

Every contender is called once per round, so that a disturbance hits all of them alike. The ratios are medians over the
rounds of (contender / kernel) within one round. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from bench_common import keep_freed_memory, write_report  # noqa: E402

KERNEL, KERNEL_INPLACE = "kernel", "kernel, in-place backward"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="tokens T")
    parser.add_argument("--vocab", type=int, default=32000, help="columns V")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved samples of each contender")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the two eager formulas")
    parser.add_argument(
        "--allocator",
        choices=["warm", "default"],
        default="warm",
        help="warm keeps freed memory, so that no contender pays page faults; default is what glibc does",
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/kernels.json"), help="result file")
    return parser.parse_args()


def eager_logprobs(logits: Any, targets: Any) -> tuple[Any, Any]:
    """log_softmax in fp32 and gather."""
    import torch

    return torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1), None


def eager_with_entropy(logits: Any, targets: Any) -> tuple[Any, Any]:
    """The formula of common training code: log-prob by gather minus logsumexp, entropy as lse - sum(p * x)."""
    import torch

    x = logits.float()
    normaliser = torch.logsumexp(x, dim=-1)
    log_probs = x.gather(1, targets[:, None]).squeeze(1) - normaliser
    return log_probs, normaliser - (torch.softmax(x, dim=-1) * x).sum(-1)


def cross_entropy(logits: Any, targets: Any) -> tuple[Any, Any]:
    """torch.nn.functional.cross_entropy on the given dtype."""
    import torch

    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none"), None


def stored_softmax() -> Callable[[Any, Any], tuple[Any, Any]]:
    """Log-prob and entropy whose backward pass reads a stored fp32 softmax, as vocabulary-parallel trainers do."""
    import torch

    class StoredSoftmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, targets: Any) -> tuple[Any, Any]:
            x = logits.float()
            x = x - x.max(dim=-1, keepdim=True).values
            exponentials = x.exp()
            total = exponentials.sum(-1, keepdim=True)
            softmax = exponentials.div_(total)
            log_total = total.log().squeeze(1)
            entropy = log_total - (softmax * x).sum(-1)
            log_probs = x.gather(1, targets[:, None]).squeeze(1) - log_total
            ctx.save_for_backward(softmax, x, targets, log_total, entropy)
            ctx.dtype = logits.dtype
            return log_probs, entropy

        @staticmethod
        def backward(ctx: Any, grad_log_probs: Any, grad_entropy: Any) -> tuple[Any, None]:
            softmax, x, targets, log_total, entropy = ctx.saved_tensors
            grad = -softmax * grad_log_probs[:, None]
            grad.scatter_add_(1, targets[:, None], grad_log_probs[:, None])
            grad -= grad_entropy[:, None] * softmax * (x - (log_total - entropy)[:, None])
            return grad.to(ctx.dtype), None

    return StoredSoftmax.apply


@functools.cache
def megatron_cross_entropy() -> Callable[[Any, Any], tuple[Any, Any]]:
    """megatron-core's vocabulary-parallel cross-entropy, in a tensor-parallel group of one."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from spear_megatron.device.cpu_shim import megatron_on_cpu
    from spear_megatron.parallel.state import initialize

    initialize(timeout_s=60)

    def cross_entropy_of(logits: Any, targets: Any) -> tuple[Any, Any]:
        with megatron_on_cpu():
            return -vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)).squeeze(1), None

    return cross_entropy_of


def contenders(with_entropy: bool, compile_too: bool) -> dict[str, Callable[[Any, Any], tuple[Any, Any]]]:
    """Name -> function of (logits, targets) that returns log-probs and entropy or None."""
    import torch

    from spear_megatron.kernels import token_logprobs

    def kernel(logits: Any, targets: Any) -> tuple[Any, Any]:
        return token_logprobs(logits, targets, with_entropy=with_entropy, implementation="compiled")

    def kernel_inplace(logits: Any, targets: Any) -> tuple[Any, Any]:
        return token_logprobs(
            logits, targets, with_entropy=with_entropy, implementation="compiled", inplace_backward=True
        )

    def ours_eager(logits: Any, targets: Any) -> tuple[Any, Any]:
        return token_logprobs(logits, targets, with_entropy=with_entropy, implementation="eager")

    torch_formula = eager_with_entropy if with_entropy else eager_logprobs
    found: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
        KERNEL: kernel, KERNEL_INPLACE: kernel_inplace, "torch eager": torch_formula, "eager implementation": ours_eager
    }  # fmt: skip
    found["F.cross_entropy" + (" (no entropy)" if with_entropy else "")] = cross_entropy
    if with_entropy:
        found["stored softmax"] = stored_softmax()
    else:
        found["megatron"] = megatron_cross_entropy()
    if compile_too:
        found["torch.compile"] = torch.compile(torch_formula)
    return found


def time_call(function: Callable[[Any, Any], tuple[Any, Any]], source: Any, targets: Any, backward: bool) -> float:
    """Wall seconds of one forward, or forward + backward, on a private copy of the logits."""
    import torch

    logits = source.clone().requires_grad_(backward)
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        log_probs, entropy = function(logits, targets)
        if backward:
            outputs = [log_probs] if entropy is None else [log_probs, entropy]
            torch.autograd.grad(outputs, [logits], [torch.ones_like(output) for output in outputs])
    return time.perf_counter() - started


def copy_bandwidth(source: Any, rounds: int) -> float:
    """Bytes read and written per second by Tensor.copy_, median."""
    target = source.clone()
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        target.copy_(source)
        samples.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / statistics.median(samples)


def measure(arguments: argparse.Namespace, dtype_name: str, with_entropy: bool, backward: bool) -> dict[str, Any]:
    """All contenders on one task; seconds, ratios to the kernel and the kernel's bandwidth."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    generator = torch.Generator().manual_seed(0)
    source = (torch.randn(arguments.rows, arguments.vocab, generator=generator) * 3).to(dtype)
    targets = torch.randint(0, arguments.vocab, (arguments.rows,), generator=generator)
    functions = contenders(with_entropy, arguments.compile)
    if not backward:
        del functions[KERNEL_INPLACE]
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(-1, arguments.rounds):  # the first round warms up
        for name, function in functions.items():
            seconds = time_call(function, source, targets, backward)
            if round_index >= 0:
                samples[name].append(seconds)
    return {
        "dtype": dtype_name,
        "entropy": with_entropy,
        "backward": backward,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
        "ratio": {
            name: statistics.median(a / b for a, b in zip(values, samples[KERNEL], strict=True))
            for name, values in samples.items()
        },
        "samples_ms": {name: [1e3 * value for value in values] for name, values in samples.items()},
        "copy_gb_per_s": copy_bandwidth(source, arguments.rounds) / 1e9,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per task and contender, as a Markdown table."""
    print("| logits | result | pass | contender | median ms | time / kernel |")
    print("|---|---|---|---|---|---|")
    for result in results:
        task = (
            f"| {result['dtype']} | {'log-prob + entropy' if result['entropy'] else 'log-prob'} "
            f"| {'forward + backward' if result['backward'] else 'forward'} "
        )
        for name, milliseconds in result["median_ms"].items():
            print(f"{task}| {name} | {milliseconds:.2f} | {result['ratio'][name]:.2f} |")


def main() -> None:
    """Run the tasks and write the report."""
    arguments = parse_arguments()
    if arguments.allocator == "warm":
        keep_freed_memory()
    import torch

    torch.set_num_threads(arguments.threads)
    results = [
        measure(arguments, dtype, with_entropy, backward)
        for dtype in arguments.dtypes
        for with_entropy in (False, True)
        for backward in (False, True)
    ]
    print(f"[{arguments.rows}, {arguments.vocab}], {arguments.threads} threads, {arguments.allocator} allocator\n")
    print_table(results)
    write_report(
        arguments.json, results, shape=[arguments.rows, arguments.vocab], threads=arguments.threads,
        allocator=arguments.allocator, rounds=arguments.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
