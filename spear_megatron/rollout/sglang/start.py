"""Starts the servers of a run from all of its ranks, and ends them with it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from spear_megatron.parallel.agreement import agree_ok, forget_heartbeat, gather_objects, heartbeat, wait_for_leaders
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.command import ServerSpec
from spear_megatron.rollout.sglang.fleet import Fleet
from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig
from spear_megatron.rollout.sglang.local_fleet import local_launches
from spear_megatron.rollout.sglang.placement import Placement, RankFacts, place_servers
from spear_megatron.rollout.sglang.process import Launch

_PHASE = "sglang/start"
_GRACE_S = 60.0


@dataclass(frozen=True)
class Servers:
    """``urls`` of all servers of the run, equal on every rank; ``fleet`` of those that this rank started, if any."""

    urls: tuple[str, ...]
    fleet: Fleet | None


@contextlib.contextmanager
def open_servers(
    config: SGLangLaunchConfig, spec: ServerSpec, parallel: ParallelState, run_dir: Path, *, colocated: bool = False
) -> Iterator[Servers]:
    """The servers of the run, until the end of the body or an error in it. Collective; every rank gives the same.

    Raises:
        ValueError: the machine has too few GPUs, or Ray is asked for and missing.
        EngineError, RunError: on some rank none started (RunError on all of several ranks).
        RunTimeout: a rank that starts servers stayed silent.
    """
    placements = _placements(config, spec, parallel, colocated)
    own = next((placement for placement in placements if placement.owner == parallel.rank), None)
    fleet: Fleet | None = None
    failure: Exception | None = None
    try:
        if own is not None:
            with heartbeat(parallel, _PHASE):
                try:
                    fleet = Fleet(_launches(config, spec, run_dir, own), config)
                    fleet.start()
                except (ValueError, OSError, EngineError) as error:
                    failure = error
        if parallel.world_size > 1:
            owners = [placement.owner for placement in placements]
            wait_for_leaders(parallel, _PHASE, owners, config.ready_timeout_s + config.stop_timeout_s + _GRACE_S)
            agree_ok(parallel, "start of the SGLang servers", None if failure is None else str(failure))
            forget_heartbeat(parallel, _PHASE)
        if failure is not None:
            raise failure
        urls = [url for urls in gather_objects(parallel, fleet.addresses() if fleet else ()) for url in urls]
        yield Servers(tuple(urls), fleet)
    finally:
        if fleet is not None:
            fleet.close()


def computes_on_cpu(config: SGLangLaunchConfig, parallel: ParallelState) -> bool:
    """What ``device`` means for this trainer."""
    return config.device == "cpu" or (config.device == "auto" and not parallel.platform.is_cuda)


def _placements(
    config: SGLangLaunchConfig, spec: ServerSpec, parallel: ParallelState, colocated: bool
) -> tuple[Placement, ...]:
    num_gpus = 0 if spec.on_cpu else torch.cuda.device_count()
    facts = gather_objects(parallel, RankFacts(socket.gethostname(), parallel.is_leader, num_gpus))
    hosts = {fact.node for fact in facts}
    if len(hosts) > 1 and config.host in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"actor_rollout_ref.rollout.sglang.launch.host={config.host} cannot be reached from all of the job's "
            f"{len(hosts)} machines: set it to 0.0.0.0 or to an address of their network"
        )
    if config.backend == "ray":  # Ray finds the machines and the GPUs
        return (Placement(0, tuple(range(config.num_servers)), ((),) * config.num_servers),)
    return place_servers(
        facts, num_servers=config.num_servers, tp_size=config.tp_size, on_cpu=spec.on_cpu, colocated=colocated
    )


def _launches(config: SGLangLaunchConfig, spec: ServerSpec, run_dir: Path, own: Placement) -> list[Launch]:
    if config.backend == "ray":
        from spear_megatron.rollout.sglang.ray_fleet import ray_launches

        return ray_launches(config, spec, run_dir, own.numbers)
    return local_launches(config, spec, run_dir, own.numbers, own.gpus)
