"""How the weights of a run get to what it samples with: into this process, or to servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from spear_megatron.cli.agents import Agents
from spear_megatron.config.schema import Config
from spear_megatron.model.hf_io import iter_hf_tensors
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.sglang.engine import SGLangEngine
from spear_megatron.trainer.actor import Actor
from spear_megatron.weights.build import build_publisher
from spear_megatron.weights.publisher import Published
from spear_megatron.weights.sync import publish


@contextlib.contextmanager
def open_publish(
    config: Config, actor: Actor, shape: ModelShape, parallel: ParallelState, agents: Agents
) -> Iterator[Callable[[int], Published | None]]:
    """A function that publishes the actor's weights under a policy version. Collective, as what it yields is.

    Args:
        agents: of this rank; its engine and the servers of the run are told.
    """
    rollout, engine = config.actor_rollout_ref.rollout, agents.engine
    if rollout.name == "embedded":
        yield lambda version: publish(iter_hf_tensors(actor.chunks, shape, parallel), engine, version)
        return

    def published(outcome: Published) -> None:
        if outcome.stale and rollout.sglang.router is not None:
            raise RunError(
                f"{', '.join(outcome.notes)}: requests cannot be kept from them behind "
                "actor_rollout_ref.rollout.sglang.router; take them out of the router, or set it to null"
            )
        if isinstance(engine, SGLangEngine):
            engine.note_version(outcome.version, outcome.stale)

    publisher = build_publisher(
        rollout.sglang.weights,
        actor.chunks,
        shape,
        parallel,
        dtype=config.actor_rollout_ref.model.torch_dtype,
        model_folder=config.actor_rollout_ref.model.path,
        default_folder=Path(config.trainer.default_local_dir) / "weights",
        urls=lambda: agents.servers.urls,
        score=actor.score,
        published=published,
    )
    try:
        yield publisher.publish
    finally:
        publisher.close()
