"""Time and memory of the LM head with the log-probs of sampled tokens, forward and backward.

    python tools/bench_lm_head.py                  # [1024, 512] x [32000, 512], fp32 and bf16, densities 1 and 0.3
    python tools/bench_lm_head.py --quick          # a small one, to see that it runs

Contenders: plain torch (linear, log_softmax in fp32, entropy), Megatron's own head followed by `token_logprobs` with
the gradient in place, `linear_token_logprobs` with kept logits and with a budget that makes it compute them twice. All
give log-probs and entropies. The bare products of matrices (one forward, two backward) are the floor. Samples are
interleaved; ratios are medians over the rounds of time / (kept logits at full density). Peak memory is what the
resident set of a fresh process grows by in one pass beyond hidden states, head and its gradient. Where oneDNN has no
products of bf16 matrices (CPUs without AVX-512) torch's take minutes each, so that bf16 is left out there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_common import WARM_ALLOCATOR, keep_freed_memory, write_report  # noqa: E402
from bench_kernels import eager_with_entropy  # noqa: E402

BASE = "kept logits"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="tokens T")
    parser.add_argument("--hidden", type=int, default=512, help="width H")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of the head V")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: both, where oneDNN has bf16")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.3], help="share of sampled tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved samples of each contender")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/lm_head.json"), help="result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.hidden, arguments.vocab, arguments.rounds = 128, 64, 2048, 2
    if arguments.dtypes is None:
        arguments.dtypes = ["fp32", "bf16"] if arguments.quick or has_bf16_products() else ["fp32"]
    return arguments


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices here."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Task:
    """Inputs of one size: hidden states and the head with Megatron's fp32 gradient buffer."""

    def __init__(self, arguments: argparse.Namespace, dtype_name: str, density: float) -> None:
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
        generator = torch.Generator().manual_seed(0)
        rows, width, vocab = arguments.rows, arguments.hidden, arguments.vocab
        self.hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, generator=generator) * width**-0.5).to(dtype).requires_grad_()
        self.weight.main_grad = torch.zeros(vocab, width)
        self.weight.grad_added_to_main_grad = False
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.mask = torch.rand(rows, generator=generator) < density
        self.budget = int(self.mask.sum()) * vocab * self.hidden.element_size() // 8

    def by_torch(self) -> None:
        """Every row, plain torch."""
        self._backward(*eager_with_entropy(self.hidden @ self.weight.T, self.targets))

    def by_rows(self) -> None:
        """Every row's logits, then the kernel on logits, its gradient in place."""
        from spear_megatron.kernels import token_logprobs

        self._backward(*token_logprobs(self.hidden @ self.weight.T, self.targets, inplace_backward=True))

    def by_head(self, budget: int | None = None) -> None:
        """The head in one operation."""
        from spear_megatron.kernels import linear_token_logprobs

        options: dict[str, Any] = {"mask": self.mask, "max_logits_bytes": budget}
        self._backward(*linear_token_logprobs(self.hidden, self.weight, self.targets, **options))

    def by_head_twice(self) -> None:
        """The same within an eighth of the memory."""
        self.by_head(self.budget)

    def products(self) -> None:
        """The three products of matrices alone, on the sampled rows."""
        hidden, weight = self.hidden.detach()[self.mask], self.weight.detach()
        logits = hidden @ weight.T
        self.sink = (logits @ weight, logits.T @ hidden)

    def _backward(self, log_probs: Any, entropy: Any) -> None:
        loss = ((log_probs + 0.1 * entropy) * self.mask).sum()
        loss.backward()
        if not self.weight.grad_added_to_main_grad:  # what Megatron's hook on the weight does
            self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad = self.hidden.grad = None
        self.weight.grad_added_to_main_grad = False


CONTENDERS: dict[str, Callable[[Task], None]] = {
    BASE: Task.by_head,
    "logits twice, an eighth of the memory": Task.by_head_twice,
    "all logits, token_logprobs in place": Task.by_rows,
    "plain torch": Task.by_torch,
    "bare products": Task.products,
}


def peak_bytes(arguments: argparse.Namespace, dtype_name: str, density: float, name: str) -> int:
    """Growth of the resident set in one pass, measured in a process of its own."""
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("rows", "hidden", "vocab", "threads")]
    case = ["--dtypes", dtype_name, "--densities", str(density), "--memory-of", name]
    command = [sys.executable, __file__, *sizes, *case]
    env = {key: value for key, value in os.environ.items() if key not in WARM_ALLOCATOR}  # freed memory goes back
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=600).stdout)


def print_growth(arguments: argparse.Namespace) -> None:
    """The process behind `peak_bytes`: warm up on a small task, then one pass on the real one."""
    from spear_megatron.device.host_memory import reset_peak, status_bytes

    small = argparse.Namespace(rows=16, hidden=16, vocab=300)
    run = CONTENDERS[arguments.memory_of]
    run(Task(small, arguments.dtypes[0], 1.0))
    task = Task(arguments, arguments.dtypes[0], arguments.densities[0])
    task.weight.main_grad.fill_(1.0)  # its pages exist before the pass
    reset_peak()
    before = status_bytes("VmRSS")
    run(task)
    print(status_bytes("VmHWM") - before)


def measure(arguments: argparse.Namespace, dtype_name: str) -> list[dict[str, Any]]:
    """All contenders at all densities, interleaved."""
    tasks = {density: Task(arguments, dtype_name, density) for density in arguments.densities}
    samples: dict[tuple[float, str], list[float]] = {(d, name): [] for d in tasks for name in CONTENDERS}
    for round_index in range(-1, arguments.rounds):  # the first round warms up
        for (density, name), values in samples.items():
            started = time.perf_counter()
            CONTENDERS[name](tasks[density])
            if round_index >= 0:
                values.append(time.perf_counter() - started)
    base = samples[(max(tasks), BASE)]
    return [
        {
            "dtype": dtype_name,
            "density": density,
            "contender": name,
            "median_ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "peak_mib": peak_bytes(arguments, dtype_name, density, name) / 2**20,
        }
        for (density, name), values in samples.items()
    ]


def main() -> None:
    """Run everything and write the report."""
    arguments = parse_arguments()
    if not arguments.memory_of:
        keep_freed_memory()
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_growth(arguments)
        return
    results = [line for dtype in arguments.dtypes for line in measure(arguments, dtype)]
    shape = f"[{arguments.rows}, {arguments.hidden}] x [{arguments.vocab}, {arguments.hidden}]"
    print(f"{shape}, {arguments.threads} threads, forward + backward with entropy\n")
    print("| dtype | sampled tokens | contender | median ms | time / kept logits of all | peak MiB |")
    print("|---|---|---|---|---|---|")
    for line in results:
        print(
            f"| {line['dtype']} | {line['density']:.0%} | {line['contender']} | {line['median_ms']:.1f} "
            f"| {line['ratio']:.2f} | {line['peak_mib']:.0f} |"
        )
    size = [arguments.rows, arguments.hidden, arguments.vocab]
    write_report(arguments.json, results, shape=size, threads=arguments.threads, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
