"""Observers of ``actor_rollout_ref.rollout.sglang.weights.*``: publishes to stand-ins for servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from observers.core import Observer, Observers
from observers.sglang import shape_of

from spear_megatron.config.schema import Config

_WEIGHTS = "actor_rollout_ref.rollout.sglang.weights"
URL = "http://127.0.0.1:9"


def publish(config: Config, scratch: Path, server: Any, *, versions: int = 1, damage: bool = False) -> str:
    """Publish a model of a bit over 1 MiB to ``server``; "published", or why not."""
    from fake_control import toy_log_probs
    from weight_sync import corrupt

    from spear_megatron.cli.session import open_parallel
    from spear_megatron.model.hf_io import iter_hf_tensors
    from spear_megatron.model.provider import build_model
    from spear_megatron.parallel.config import MegatronConfig
    from spear_megatron.parallel.errors import RunError
    from spear_megatron.weights.build import build_publisher

    shape = shape_of(4096)
    with open_parallel(config) as parallel:
        chunks = build_model(shape, MegatronConfig(), dtype=torch.float32, parallel=parallel)
        generator = torch.Generator().manual_seed(0)
        for parameter in chunks[0].parameters():
            parameter.data.normal_(generator=generator)
        true = {name: tensor for name, tensor in iter_hf_tensors(chunks, shape, parallel) if tensor is not None}

        def score(rows: Any) -> Any:
            values = toy_log_probs(true, [row.ids.tolist() for row in rows])
            return [dataclasses.replace(row, old_log_probs=torch.tensor([0.0, *v])) for row, v in zip(rows, values)]

        publisher = build_publisher(
            config.actor_rollout_ref.rollout.sglang.weights,
            chunks,
            shape,
            parallel,
            dtype=torch.float32,
            model_folder=config.actor_rollout_ref.model.path,
            default_folder=scratch / "weights",
            urls=lambda: [server.url],
            score=score,
            connect=lambda url: server,
        )
        if damage:
            corrupt(publisher, "model.norm.weight", times=1)
        try:
            for version in range(1, versions + 1):
                publisher.publish(version)
        except RunError as error:
            return str(error)
        finally:
            publisher.close()
    return "published"


def with_server(look: Callable[[Any, str, Path], Any], **options: Any) -> Callable[[Config, Path], Any]:
    """Observation of ``look(server, outcome, scratch)`` after a publish; ``options`` are of :func:`publish`."""

    def observe(config: Config, scratch: Path) -> Any:
        from fake_control import FakeControl

        server = FakeControl(URL)
        return look(server, publish(config, scratch, server, **options), scratch)

    return observe


def versions_in(scratch: Path) -> list[str]:
    """Weights on disk."""
    return sorted(str(path.relative_to(scratch)) for path in scratch.glob("*/version_*"))


def joining(config: Config, scratch: Path) -> Any:
    """The address that a server is told to join."""
    from fake_control import FakeControl

    from spear_megatron.rollout.engine import EngineError

    told: list[str] = []

    class Refusing(FakeControl):
        def init_group(self, *, address: str, **_: Any) -> None:
            told.append(address)
            raise EngineError("no")

    publish(config, scratch, Refusing(URL))
    return told


def slow_flush(config: Config, scratch: Path) -> Any:
    """Whether a server gets weights that cannot empty its cache for half a second after a pause."""
    import time

    from fake_control import FakeControl

    from spear_megatron.rollout.engine import EngineError

    class Busy(FakeControl):
        ready_at = 0.0

        def pause(self, mode: str) -> None:
            super().pause(mode)
            self.ready_at = time.monotonic() + 0.5

        def flush_cache(self, timeout_s: float = 30.0) -> None:
            if time.monotonic() < self.ready_at:
                raise EngineError("HTTP 400: Flush cache failed.")

    return publish(config, scratch, Busy(URL)) == "published"


def other_program(config: Config, scratch: Path) -> Any:
    """What becomes of a publish to a server whose log-probs are 0.01 off."""
    from fake_control import FakeControl

    server = FakeControl(URL)
    score = server.prompt_log_probs
    server.prompt_log_probs = lambda prompts: [[v + 0.01 for v in part] for part in score(prompts)]  # type: ignore
    return publish(config, scratch, server) == "published"


_DISK = (f"{_WEIGHTS}.way=disk",)
OBSERVERS: Observers = {
    f"{_WEIGHTS}.way": Observer(
        with_server(lambda server, outcome, scratch: (outcome, server.num_updates, versions_in(scratch))),
        ("tensor", "disk"),
    ),
    f"{_WEIGHTS}.transport": Observer(
        with_server(lambda server, outcome, scratch: (outcome, server.largest_payload > 10_000)),
        ("http", "shared_memory"),
    ),
    f"{_WEIGHTS}.folder": Observer(
        with_server(lambda server, outcome, scratch: (outcome, versions_in(scratch))), ("null", "{scratch}/else"), _DISK
    ),
    f"{_WEIGHTS}.keep": Observer(
        with_server(lambda server, outcome, scratch: (outcome, versions_in(scratch)), versions=3), ("1", "2"), _DISK
    ),
    f"{_WEIGHTS}.master_address": Observer(joining, ("null", "trainer.example"), (f"{_WEIGHTS}.way=distributed",)),
    f"{_WEIGHTS}.max_gather_mb": Observer(
        with_server(lambda server, outcome, scratch: (outcome, server.num_updates)), ("1", "64")
    ),
    f"{_WEIGHTS}.timeout_s": Observer(slow_flush, ("30", "0.1")),
    f"{_WEIGHTS}.pause": Observer(
        with_server(lambda server, outcome, scratch: (outcome, server.calls)), ("retract", "in_place")
    ),
    f"{_WEIGHTS}.probe_prompts": Observer(
        with_server(lambda server, outcome, scratch: (outcome, server.num_probes)), ("4", "0")
    ),
    f"{_WEIGHTS}.probe_tolerance": Observer(other_program, ("null", "0.1")),
    f"{_WEIGHTS}.resend_on_mismatch": Observer(
        with_server(lambda server, outcome, scratch: outcome, damage=True), ("true", "false")
    ),
}
