"""Rows of bench_gpu_kernels.py on Clip-Cov: selection and policy loss on CUDA against the official formulation.

Every contender runs once per round on the same tokens of one micro-batch, all of them sampled ones. A CUDA graph shows
what the device needs where the host is too slow to feed it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from bench_policy_loss import CLIP_HIGH, CLIP_LOW, LB, RATIO, UB, Inputs, make_inputs, official_clip_cov  # noqa: E402

TOKENS = (1 << 16, 1 << 20)
LOSS_ALONE, LOSS, SELECTION, BOTH = "policy_loss kernel", "policy_loss", "selection", "selection and policy_loss"
GRAPH, OFFICIAL = "selection and policy_loss, CUDA graph", "official formulation"
LOSS_TARGET_US = 25.0  # of the kernel with its gradient at 2^20 tokens
SPEEDUP_TARGET = 30.0  # of selection and loss over the official formulation at 2^16 tokens

Work = Callable[[], Any]
Timer = Callable[[Work], tuple[float, Any]]


def contenders(inputs: Inputs) -> dict[str, Work]:
    """Name -> one forward and backward pass, or the part of it that the name says."""
    import torch

    from spear_megatron.algorithms.covariance import ClipCovRule, TokenSet
    from spear_megatron.algorithms.covariance_device import select_on_device
    from spear_megatron.kernels import policy_loss_cuda
    from spear_megatron.kernels.policy_loss import policy_loss
    from spear_megatron.kernels.policy_loss_compiled import PolicySettings, PolicyTokens

    rule = ClipCovRule(RATIO, LB, UB, CLIP_LOW, CLIP_HIGH)
    row = TokenSet(inputs.log_probs, inputs.old_log_probs, inputs.advantages, inputs.keys)
    leaf = inputs.log_probs.clone().requires_grad_()
    constants = {"clip_ratio_low": CLIP_LOW, "clip_ratio_high": CLIP_HIGH, "clip_ratio_c": 3.0, "kl_cov_coef": 1.0}

    def loss(selected: Any) -> Any:
        value, _ = policy_loss(
            leaf, inputs.old_log_probs, inputs.advantages, inputs.weight, mode="clip_cov", selected=selected,
            implementation="compiled", **constants,
        )  # fmt: skip
        return torch.autograd.grad(value, leaf)

    chosen = select_on_device([row], rule).masks[0]
    tokens = PolicyTokens(inputs.log_probs, inputs.old_log_probs, inputs.advantages, inputs.weight, chosen, None)
    settings = PolicySettings("clip_cov", **constants)

    def both() -> Any:
        return loss(select_on_device([row], rule).masks[0])

    return {
        LOSS_ALONE: captured(lambda: policy_loss_cuda.loss_and_gradient(tokens, settings)),
        LOSS: lambda: loss(chosen),
        SELECTION: lambda: select_on_device([row], rule),
        BOTH: both,
        GRAPH: captured(both),
        OFFICIAL: lambda: torch.autograd.grad(official_clip_cov(leaf, inputs)[0], leaf),
    }


def captured(work: Work) -> Work:
    """A replay of ``work`` as a CUDA graph: what the device needs, without what the host needs to start it."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def measure(timer: Timer, tokens: int, rounds: int) -> dict[str, Any]:
    """Median microseconds of every contender, and their ratios to selection and loss within one round."""
    inputs = Inputs(*(value.cuda() for value in make_inputs(tokens)))
    works = contenders(inputs)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_index in range(-3, rounds):  # the first rounds warm up
        for name, work in works.items():
            milliseconds, _ = timer(work)
            if round_index >= 0:
                samples[name].append(1e3 * milliseconds)
    return {
        "tokens": tokens,
        "median_us": {name: statistics.median(values) for name, values in samples.items()},
        "ratio_to_both": {
            name: statistics.median(a / b for a, b in zip(values, samples[BOTH], strict=True))
            for name, values in samples.items()
        },
        "samples_us": samples,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per size and contender, as a Markdown table."""
    print("\n| tokens | contender | median us | time / selection and policy_loss |")
    print("|---|---|---|---|")
    for result in results:
        for name, value in result["median_us"].items():
            print(f"| {result['tokens']} | {name} | {value:.1f} | {result['ratio_to_both'][name]:.2f} |")


def targets(results: list[dict[str, Any]]) -> list[str]:
    """What was aimed at and what was reached, one line each; sizes that were not measured have none."""
    lines = []
    for result in results:
        if result["tokens"] == TOKENS[0]:
            reached = result["ratio_to_both"][OFFICIAL]
            mark = "reached" if reached >= SPEEDUP_TARGET else f"below {SPEEDUP_TARGET:.0f}"
            lines.append(f"selection and policy_loss, {TOKENS[0]} tokens: {reached:.1f} x official, {mark}")
        if result["tokens"] == TOKENS[1]:
            reached = result["median_us"][LOSS_ALONE]
            mark = "reached" if reached <= LOSS_TARGET_US else f"above {LOSS_TARGET_US:.0f}"
            lines.append(f"policy_loss kernel, {TOKENS[1]} tokens: {reached:.1f} us, {mark}")
    return lines
