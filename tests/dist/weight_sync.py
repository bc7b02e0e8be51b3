"""Publishing a tiny actor's weights to servers, real or recorded, on the ranks of a layout."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from train_step import Layout, build_actor, make_rows, share_of_rank

PROMPTS = tuple(tuple(range(3 + i, 9 + 2 * i)) for i in range(4))
GREEDY_TOKENS = 16


def open_publisher(
    actor: Any, shape: Any, parallel: Any, folder: str, urls: list[str], scratch: str, **keys: Any
) -> Any:
    """A publisher to ``urls``; ``keys`` are of WeightsConfig."""
    from spear_megatron.rollout.sglang.weights_config import WeightsConfig
    from spear_megatron.weights.build import build_publisher

    return build_publisher(
        WeightsConfig(**keys),
        actor.chunks,
        shape,
        parallel,
        dtype=next(actor.chunks[0].parameters()).dtype,
        model_folder=folder,
        default_folder=Path(scratch) / "weights",
        urls=lambda: urls,
        score=actor.score,
    )


def train(actor: Any, parallel: Any, seed: int) -> None:
    """One large optimizer step."""
    assert actor.update(share_of_rank(make_rows(seed=seed), parallel), on_policy=True).skipped is None


def corrupt(publisher: Any, name: str, *, times: int) -> None:
    """Damage one value of a tensor in the first ``times`` gathered buckets that hold it."""
    gather, left = publisher._gatherer.gather, [times]

    def gather_wrong(bucket: Any) -> Any:
        flat = gather(bucket)
        if flat is not None and left[0] > 0:
            for entry in bucket.entries:
                if entry.name == name:
                    left[0] -= 1
                    entry.view(flat, publisher.plan.dtype).mul_(-1.5)
        return flat

    publisher._gatherer.gather = gather_wrong


def greedy_tokens(actor: Any, shape: Any, parallel: Any, version: int) -> list[tuple[int, ...]] | None:
    """Greedy continuations of PROMPTS by the embedded engine with the trainer's weights; None but on leaders."""
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.rollout.embedded import EmbeddedEngine
    from spear_megatron.rollout.engine import GenerateRequest, SamplingParams
    from spear_megatron.weights.sync import publish

    engine = EmbeddedEngine(shape, max_num_seqs=8, max_model_len=64) if parallel.is_leader else None
    publish(iter_hf_tensors(actor.chunks, shape, parallel), engine, version)
    if engine is None:
        return None
    sampling = SamplingParams(GREEDY_TOKENS, temperature=0.0)

    async def all_of_them() -> list[tuple[int, ...]]:
        requests = [GenerateRequest(f"r{i}", prompt, sampling, noise_key=i) for i, prompt in enumerate(PROMPTS)]
        return [(await engine.generate(request)).output_ids for request in requests]

    return asyncio.run(all_of_them())


def sync_on_rank(folder: str, layout: Layout, urls: list[str], scratch: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Two steps, each published (versions 1 and 2); what came of the last one, beside an export of it."""
    from spear_megatron.model.hf_export import export_hf

    actor, shape, parallel = build_actor(folder, layout, lr=1e-2)
    publisher = open_publisher(actor, shape, parallel, folder, urls, scratch, **keys)
    try:
        for version in (1, 2):
            train(actor, parallel, version)
            outcome = publisher.publish(version)
            assert outcome.version == version and outcome.fresh == tuple(urls) and not outcome.stale, outcome
        export_hf(actor.chunks, shape, parallel, Path(scratch) / "export", folder)
        return {"outcome": outcome, "greedy": greedy_tokens(actor, shape, parallel, 2)}
    finally:
        publisher.close()


def corrupt_on_rank(
    folder: str, layout: Layout, urls: list[str], scratch: str, keys: dict[str, Any], name: str, times: int
) -> str:
    """What is said when a tensor is damaged on its way."""
    from spear_megatron.parallel.errors import RunError

    actor, shape, parallel = build_actor(folder, layout, lr=1e-2)
    publisher = open_publisher(actor, shape, parallel, folder, urls, scratch, **keys)
    corrupt(publisher, name, times=times)
    try:
        outcome = publisher.publish(1)
        return f"resends {outcome.resends}: {' '.join(outcome.notes)}"
    except RunError as error:
        return str(error)
    finally:
        publisher.close()


def absentee_on_rank(folder: str, layout: Layout, urls: list[str], scratch: str, keys: dict[str, Any]) -> Any:
    """Outcome of a publish to servers of which some are not there."""
    actor, shape, parallel = build_actor(folder, layout)
    publisher = open_publisher(actor, shape, parallel, folder, urls, scratch, **keys)
    try:
        return publisher.publish(1)
    finally:
        publisher.close()


def straddle_on_rank(folder: str, url: str, scratch: str, keys: dict[str, Any]) -> dict[str, Any]:
    """What a long request answers that is running while weights are published."""
    import threading
    import time

    import httpx

    actor, shape, parallel = build_actor(folder, Layout("1 rank"), lr=1e-2)
    publisher = open_publisher(actor, shape, parallel, folder, [url], scratch, **keys)
    publisher.publish(1)
    train(actor, parallel, 1)
    sampling = {"temperature": 1.0, "max_new_tokens": 500, "ignore_eos": True}
    answer: dict[str, Any] = {}

    def ask() -> None:
        body = {"input_ids": list(PROMPTS[0]), "sampling_params": sampling, "return_logprob": True}
        answer.update(httpx.post(f"{url}/generate", json=body, timeout=90, trust_env=False).json())

    request = threading.Thread(target=ask)
    request.start()
    time.sleep(0.15)
    assert request.is_alive(), "the request was over before the publish"
    outcome = publisher.publish(2)
    request.join()
    publisher.close()
    return {"outcome": outcome, "num_tokens": len(answer["output_ids"]), "meta": answer["meta_info"]}
