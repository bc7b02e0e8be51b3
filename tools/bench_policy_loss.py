"""Time Clip-Cov, selection and loss with its gradient, against the official formulation: medians and ratios.

    python tools/bench_policy_loss.py --tokens 65536 1048576 --json outputs/bench/policy_loss.json

Every contender is called once per round, in a shuffled order, so that a disturbance hits all of them alike and each
finds the caches as any other leaves them. The ratios are medians over the rounds of (official formulation / contender)
within one round. All tokens are sampled ones of one micro-batch, the scope of the official formulation:
drawn_policy_loss does the same work in one function. Selection and loss apart are what a selection over a whole
mini-batch takes. "Compiled call alone" leaves out what autograd and Python add to it: checks, objects, the backward
pass that hands on a gradient which the forward pass computed. One product of two columns and its gradient, torch.dot,
shows how little any function can take that autograd differentiates. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from bench_common import keep_freed_memory, write_report  # noqa: E402

OFFICIAL = "official formulation"
RATIO, LB, UB, CLIP_LOW, CLIP_HIGH = 0.02, 1.0, 40.0, 0.2, 0.28
ROW_TOKENS = 4096


class Inputs(NamedTuple):
    """Columns of a micro-batch, fp32 [T] but the keys and the mask (int64 [T])."""

    log_probs: Any
    old_log_probs: Any
    advantages: Any
    weight: Any
    keys: Any
    mask: Any


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 1048576], help="sizes T")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved samples of each contender")
    parser.add_argument("--quick", action="store_true", help="T = 65536 alone, five rounds, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/policy_loss.json"), help="result file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rounds, arguments.no_compile = [65536], 5, True
    return arguments


def make_inputs(tokens: int) -> Inputs:
    """Log-probs with a long tail, close policies, one advantage per 256 tokens: some percent are candidates."""
    import torch

    from spear_megatron.kernels.cov_select import token_keys

    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.empty(tokens).exponential_(1.0, generator=generator)
    old = log_probs + 0.1 * torch.randn(tokens, generator=generator)
    advantages = torch.randn((tokens + 255) // 256, generator=generator).repeat_interleave(256)[:tokens].contiguous()
    weight = torch.full((tokens,), 1.0 / tokens)
    mask = torch.ones(tokens, dtype=torch.int64)
    return Inputs(log_probs, old, advantages, weight, token_keys(1, tokens), mask)


def masked_mean(values: Any, mask: Any) -> Any:
    """Mean over an integer mask; what stands beside it may be NaN."""
    import torch

    return (torch.where(mask.bool(), values, 0.0) * mask).sum() / (mask.sum() + 1e-8)


def official_clip_cov(log_probs: Any, inputs: Inputs) -> Any:
    """Clip-Cov as released training code computes it, on [rows, tokens] with an integer mask, loss by rows.

    Covariances that take part in the graph, a count and indices on the host, a permutation of the candidates, and the
    figures that it records read back one by one.
    """
    import torch

    shape = (-1, min(ROW_TOKENS, len(log_probs)))
    current, old, advantages = (column.view(shape) for column in (log_probs, inputs.old_log_probs, inputs.advantages))
    mask = inputs.mask.view(shape)
    log_ratio = current - old
    ratio = torch.exp(log_ratio)
    drift = masked_mean(-log_ratio, mask)
    plain = -advantages * ratio
    factor = torch.ones_like(advantages)
    bounded = -advantages * torch.clamp(ratio, 1.0 - CLIP_LOW, 1.0 + CLIP_HIGH)
    clipped = (bounded > plain) & (mask > 0)
    covariance = (advantages - masked_mean(advantages, mask)) * (current - masked_mean(current.detach(), mask))
    covariance[mask == 0] = -torch.inf
    covariance[clipped] = -torch.inf
    count = max(int(RATIO * mask.sum().item()), 1)
    inside = torch.nonzero((covariance < UB) & (covariance > LB) & (mask > 0))
    drawn = inside[torch.randperm(len(inside))[: min(count, len(inside))]]
    factor[drawn[:, 0], drawn[:, 1]] = 0
    share = masked_mean((factor == 0).float(), mask)
    losses = torch.maximum(plain, bounded) * factor
    per_row = (losses * mask).sum(dim=-1) / mask.shape[-1]
    loss = per_row.sum() / mask.shape[0]
    return loss, [figure.detach().item() for figure in (loss, share, drift)]


def drawn(implementation: str, make_keys: bool = False) -> Callable[[Any, Inputs], Any]:
    """Selection and loss of this package in one function; with ``make_keys`` the keys are made anew as well."""
    from spear_megatron.algorithms.covariance import ClipCovRule
    from spear_megatron.algorithms.drawn_loss import drawn_policy_loss
    from spear_megatron.kernels.cov_select import token_keys

    rule = ClipCovRule(RATIO, LB, UB, CLIP_LOW, CLIP_HIGH)

    def function(log_probs: Any, inputs: Inputs) -> Any:
        keys = token_keys(1, len(log_probs), implementation) if make_keys else inputs.keys
        return drawn_policy_loss(
            log_probs, inputs.old_log_probs, inputs.advantages, inputs.weight, keys, rule,
            clip_ratio_low=CLIP_LOW, clip_ratio_high=CLIP_HIGH, kl_cov_coef=1.0, implementation=implementation,
        )  # fmt: skip

    return function


def apart(log_probs: Any, inputs: Inputs) -> Any:
    """The selection, then the loss that takes it."""
    from spear_megatron.algorithms.covariance import ClipCovRule, TokenSet, select_tokens
    from spear_megatron.kernels.policy_loss import policy_loss

    row = TokenSet(log_probs.detach(), inputs.old_log_probs, inputs.advantages, inputs.keys)
    selection = select_tokens([row], ClipCovRule(RATIO, LB, UB, CLIP_LOW, CLIP_HIGH), implementation="compiled")
    loss, sums = policy_loss(
        log_probs, inputs.old_log_probs, inputs.advantages, inputs.weight, mode="clip_cov",
        selected=selection.masks[0], clip_ratio_low=CLIP_LOW, clip_ratio_high=CLIP_HIGH, clip_ratio_c=3.0,
        kl_cov_coef=1.0, implementation="compiled",
    )  # fmt: skip
    return loss, sums, selection.num_selected


def compiled_call(log_probs: Any, inputs: Inputs) -> Any:
    """What the kernel does, gradient included, without autograd around it."""
    import torch

    from spear_megatron.kernels.cov_select import CovJudge
    from spear_megatron.kernels.drawn_loss_compiled import draw_and_differentiate
    from spear_megatron.kernels.policy_loss_compiled import PolicySettings

    judge = CovJudge(0.0, 0.0, LB, UB, CLIP_LOW, CLIP_HIGH)
    columns = (log_probs, inputs.old_log_probs, inputs.advantages, inputs.weight, inputs.keys)
    with torch.no_grad():
        settings = PolicySettings("clip_cov", CLIP_LOW, CLIP_HIGH, 3.0, 1.0)
        found = draw_and_differentiate(columns, None, settings, RATIO, judge)
    assert found is not None
    return found[0].loss, found


def one_product(log_probs: Any, inputs: Inputs) -> Any:
    """The least that can be differentiated: one native operator over the tokens."""
    import torch

    return (torch.dot(log_probs, inputs.weight),)


def contenders(compile_too: bool) -> dict[str, Callable[[Any, Inputs], Any]]:
    """Name -> function of (log-probs, inputs) whose first result is the loss."""
    import torch

    found: dict[str, Callable[[Any, Inputs], Any]] = {
        "drawn_policy_loss": drawn("compiled"),
        "drawn_policy_loss, keys included": drawn("compiled", make_keys=True),
        "selection and loss apart": apart,
        "compiled call alone": compiled_call,
        "autograd alone: one torch.dot": one_product,
        "eager implementation": drawn("eager"),
        OFFICIAL: official_clip_cov,
    }
    if compile_too:
        # The draw leaves the graph by its host values; what lies around it is compiled.
        found[f"{OFFICIAL}, torch.compile"] = torch.compile(official_clip_cov, dynamic=False)
    return found


def time_call(function: Callable[[Any, Inputs], Any], inputs: Inputs) -> float:
    """Wall seconds of one forward and backward pass."""
    import torch

    log_probs = inputs.log_probs.clone().requires_grad_()
    started = time.perf_counter()
    result = function(log_probs, inputs)[0]
    if result.requires_grad:
        torch.autograd.grad(result, log_probs)
    return time.perf_counter() - started


def measure(tokens: int, rounds: int, compile_too: bool) -> dict[str, Any]:
    """All contenders on one size: milliseconds, and how many times as fast as the official formulation."""
    inputs = make_inputs(tokens)
    functions = contenders(compile_too)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(tokens)
    for round_index in range(-2, rounds):  # the first two rounds warm up
        for name in order.sample(list(functions), len(functions)):
            seconds = time_call(functions[name], inputs)
            if round_index >= 0:
                samples[name].append(seconds)
    return {
        "tokens": tokens,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
        "official_by_this": {
            name: statistics.median(a / b for a, b in zip(samples[OFFICIAL], values, strict=True))
            for name, values in samples.items()
        },
        "samples_ms": {name: [1e3 * value for value in values] for name, values in samples.items()},
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """One line per size and contender, as a Markdown table."""
    print("| tokens | contender | median ms | official formulation / this |")
    print("|---|---|---|---|")
    for result in results:
        for name, milliseconds in result["median_ms"].items():
            print(f"| {result['tokens']} | {name} | {milliseconds:.3f} | {result['official_by_this'][name]:.2f} |")


def main() -> None:
    """Run the sizes and write the report."""
    arguments = parse_arguments()
    keep_freed_memory()
    import torch

    torch.set_num_threads(arguments.threads)
    results = [measure(tokens, arguments.rounds, not arguments.no_compile) for tokens in arguments.tokens]
    print(f"{arguments.threads} threads, forward and backward pass\n")
    print_table(results)
    write_report(arguments.json, results, threads=arguments.threads, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
