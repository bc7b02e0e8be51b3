"""A publisher from the settings."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.sglang.control import ControlClient
from spear_megatron.rollout.sglang.weights_config import WeightsConfig
from spear_megatron.weights.plan import SyncPlan, plan_sync
from spear_megatron.weights.probe import Probe
from spear_megatron.weights.publisher import Published, Publisher, ScoreRows
from spear_megatron.weights.servers import ServerGroup
from spear_megatron.weights.ways.disk import DiskWay
from spear_megatron.weights.ways.distributed import DistributedWay, Turns
from spear_megatron.weights.ways.tensor import TensorWay
from spear_megatron.weights.ways.way import Way

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def build_publisher(
    config: WeightsConfig,
    chunks: Sequence[MegatronModule],
    shape: ModelShape,
    parallel: ParallelState,
    *,
    dtype: torch.dtype,
    model_folder: str | Path,
    default_folder: str | Path,
    urls: Callable[[], Sequence[str]],
    score: ScoreRows,
    published: Callable[[Published], None] = lambda outcome: None,
    connect: Callable[[str], ControlClient] | None = None,
) -> Publisher:
    """The publisher of this rank. Collective: every rank makes one.

    Args:
        dtype: of the parameters, which is what travels.
        model_folder: whose config.json and tokenizer files go with weights on disk.
        default_folder: where weights on disk go unless ``config.folder`` says.
        urls: the servers of the moment; asked on rank 0.
        score: see :class:`Publisher`.
        published: told every outcome, on every rank.
        connect: makes the control connection to a URL; None for one without a key.
    """
    plan = plan_sync(
        shape.parameter_shapes(), dtype, limit_bytes=config.bucket_bytes, num_owners=parallel.dp_size
    )
    servers = ServerGroup(timeout_s=config.timeout_s, connect=connect)
    folder = Path(config.folder or default_folder)
    count = config.probe_prompts
    probe = Probe.draw(shape.vocab_size, dtype, count=count, tolerance=config.probe_tolerance) if count else None
    return Publisher(
        chunks=chunks,
        shape=shape,
        parallel=parallel,
        plan=plan,
        servers=servers,
        urls=urls,
        way=_way(config, servers, plan, parallel, folder, Path(model_folder)) if parallel.is_leader else None,
        score=score,
        probe=probe,
        pause=config.pause,
        resend=config.resend_on_mismatch,
        published=published,
    )


def _way(
    config: WeightsConfig, servers: ServerGroup, plan: SyncPlan, parallel: ParallelState, folder: Path, source: Path
) -> Way:
    if config.way == "disk":
        return DiskWay(servers, plan, folder, source, config.keep)
    if config.way == "tensor":
        return TensorWay(servers, plan.dtype, config.transport)

    def turns(key: str) -> Turns:
        return Turns(parallel.store, key, config.timeout_s)

    return DistributedWay(
        servers,
        plan.dtype,
        parallel.platform.device,
        leader=parallel.dp_rank,
        address=config.master_address,
        run_name=f"spear-{os.getpid()}-{secrets.token_hex(4)}",  # servers may outlive a run and remember its groups
        turns=turns if parallel.dp_size > 1 else None,
    )
