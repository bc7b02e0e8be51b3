"""Tokens per second of the agent loop against a bare client loop, on one running SGLang server, interleaved.

    python tools/bench_sglang.py --server http://127.0.0.1:30000 --model DIR --out outputs/bench_sglang.json

Both play the same number of conversations at a time: a turn is sampled until a token of a fixed set, then a tool
message is appended, up to ``--turns`` turns. The bare loop posts to /generate and adds up tokens, with none of the
guards, checks, chat templates, environments and rewards of the agent loop: the difference is what those cost. Every
round runs both, in alternating order, after the server's cache was emptied; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from spear_megatron.cli.agents import load_renderer
from spear_megatron.data.chat import ChatRenderer
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.model.shape import ModelShape
from spear_megatron.rollout.agent_loop import EpisodeLimits
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.rollout.scheduler import EpisodeRunner, collect_groups
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.types import Prompt, RewardParts, Trajectory

TOOL_MESSAGE = {"role": "tool", "content": "The tool answered: 123 456 789."}


class Talk:
    """An environment that answers every turn with the same tool message, and ends after ``num_turns``."""

    def __init__(self, num_turns: int) -> None:
        self._left = num_turns

    async def reset(self, prompt: Prompt) -> Observation:
        """The prompt's own messages."""
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        """Go on, or end."""
        self._left -= 1
        if self._left == 0:
            return StepResult(done=True)
        return StepResult(messages=(TOOL_MESSAGE,), num_tool_calls=1)

    async def close(self) -> None:
        """Nothing to free."""


async def no_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    """Nothing to win."""
    return RewardParts(0.0)


def stop_tokens(vocab_size: int, period: int) -> tuple[int, ...]:
    """One token in ``period``, so that turns of a random model have about that length."""
    return tuple(range(period - 1, vocab_size, period))


async def agent_loop(engine: SGLangEngine, renderer: ChatRenderer, prompts: list[Prompt], args: Any) -> int:
    """Sampled tokens of one episode per prompt through scheduler, agent loop and engine."""
    length = args.turns * (args.new + 64)
    runner = EpisodeRunner(
        engine=engine,
        renderer=renderer,
        environment_factory=lambda: Talk(args.turns),
        reward=no_reward,
        limits=EpisodeLimits(
            max_turns=args.turns, max_prompt_length=512, max_response_length=length, max_model_len=512 + length,
            max_tool_response_length=256,
        ),
        sampling=SamplingParams(args.new, stop_token_ids=args.stops),
        seed=0,
        purpose="bench",
    )  # fmt: skip
    pairs, limit = list(enumerate(prompts)), 2 * args.concurrency
    groups = await collect_groups(pairs, run=runner, step=1, num_samples=1, max_concurrency=limit, deadline_s=600)
    return sum(trajectory.num_response_tokens for group in groups for trajectory in group.trajectories)


async def bare_loop(
    http: aiohttp.ClientSession, prompts: Sequence[Sequence[int]], delta: Sequence[int], stops: Sequence[int], args: Any
) -> int:
    """Sampled tokens of the same conversations by plain requests."""
    slots = asyncio.Semaphore(args.concurrency)
    params = {"temperature": 1.0, "max_new_tokens": args.new, "stop_token_ids": list(stops)}

    async def conversation(ids: list[int]) -> int:
        total = 0
        for _ in range(args.turns):
            body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
            async with slots, http.post(f"{args.server}/generate", json=body) as response:
                answer = await response.json()
            output = answer["output_ids"]
            total += len(output)
            if answer["meta_info"]["finish_reason"]["type"] == "length":
                break
            ids = [*ids, *output, *delta]
        return total

    return sum(await asyncio.gather(*(conversation(list(ids)) for ids in prompts)))


async def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of both loops in every round; the first round warms up and does not count."""
    renderer, shape = load_renderer(args.model), ModelShape.from_folder(args.model)
    args.stops = stop_tokens(shape.vocab_size, args.period)
    prompts = [
        Prompt(f"p{i}", ({"role": "user", "content": f"What is {37 * i} + {i * i}?"},)) for i in range(args.episodes)
    ]
    ids = [renderer.prompt_ids(prompt.messages, ()) for prompt in prompts]
    delta = renderer.delta_ids((TOOL_MESSAGE,), closed=False)
    stops = tuple(dict.fromkeys((*args.stops, *renderer.stop_token_ids)))
    engine = SGLangEngine(
        shape,
        SGLangConfig(),
        servers=[args.server],
        max_in_flight=args.concurrency,
        max_model_len=512 + args.turns * (args.new + 64),
    )
    control = ControlClient(args.server)
    rates: dict[str, list[float]] = {"agent loop": [], "bare loop": []}
    http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600))
    try:
        for index in range(args.rounds + 1):
            for name in list(rates)[:: 1 if index % 2 else -1]:
                await asyncio.to_thread(control.flush_cache)
                start = time.perf_counter()
                if name == "agent loop":
                    tokens = await agent_loop(engine, renderer, prompts, args)
                else:
                    tokens = await bare_loop(http, ids, delta, stops, args)
                if index:
                    rates[name].append(tokens / (time.perf_counter() - start))
    finally:
        await http.close()
        await engine.close()
        control.close()
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="URL of a running server with the weights of --model")
    parser.add_argument("--model", required=True, help="Hugging Face folder with tokenizer")
    sizes = {"episodes": 128, "concurrency": 64, "turns": 3, "new": 128, "period": 48, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    args.server = args.server.rstrip("/")
    rates = asyncio.run(measure(args))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["agent loop"] / medians["bare loop"]
    for name, values in rates.items():
        print(f"{name:>10}: {medians[name]:9.1f} tokens/s  (lowest {min(values):.1f}, highest {max(values):.1f})")
    print(f"agent loop / bare loop: {ratio:.3f}")
    if args.out is not None:
        report = {
            "arguments": {name: getattr(args, name) for name in (*sizes, "server", "model")},
            "machine": platform.processor() or platform.machine(),
            "tokens_per_s": rates,
            "medians": medians,
            "ratio": ratio,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
