"""Starts torch.distributed and Megatron's process groups; coordinates and groups of this rank as one frozen object."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from spear_megatron.device.optional import protect_megatron
from spear_megatron.device.platform import Platform, detect_platform
from spear_megatron.parallel.errors import RunError
from spear_megatron.parallel.launch import check_launch, local_rank
from spear_megatron.parallel.launch import world_size as launched_ranks
from spear_megatron.parallel.waits import WaitClock


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """Where this process stands. Ranks vary fastest in tensor, then context, data, and pipeline parallelism.

    ``model_group`` holds the tp * cp * pp ranks that work on the same rows; its leader (tp_rank 0, cp_rank 0, pp_rank
    0) is ``leader_rank``. ``leader_group`` (gloo) holds the leaders of all data-parallel ranks, and is None elsewhere.
    ``cpu_group`` (gloo) holds every rank: it moves Python objects and CPU tensors. ``store`` is the key-value store
    of the whole job. Only the main thread may use a group; the store may be used from any thread. ``waits`` counts
    what this rank waits for others on the host.
    """

    platform: Platform
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int | None
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    leader_group: dist.ProcessGroup | None
    cpu_group: dist.ProcessGroup
    leader_rank: int
    store: dist.Store
    waits: WaitClock = field(default_factory=WaitClock)

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0 and self.cp_rank == 0 and self.pp_rank == 0

    @property
    def model_size(self) -> int:
        """Ranks that work on the same rows."""
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage, the one that computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def destroy(self) -> None:
        """Tear down Megatron's groups and torch.distributed; the object must not be used afterwards."""
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def initialize(
    tp: int = 1,
    pp: int = 1,
    *,
    cp: int = 1,
    vpp: int | None = None,
    seed: int = 0,
    timeout_s: float = 600.0,
    platform: Platform | None = None,
) -> ParallelState:
    """Start torch.distributed (if it is not yet) and Megatron's groups.

    Rank and address come from the environment that ``torchrun`` sets; without it this process is a world of its own.

    Args:
        tp, pp, vpp: tensor, pipeline and virtual pipeline sizes; the rest of the world is data parallel.
        cp: context parallel size.
        seed: of Megatron's per-rank random states (dropout is off everywhere: they only have to exist).
        timeout_s: deadline of every collective.
        platform: device and backend; detected from LOCAL_RANK if not given.

    Raises:
        ValueError: the sizes do not divide the world, or ask for something unsupported, or the environment variables
            of the launcher do not go together.
        RunError: the other ranks were not met.
    """
    check_launch()
    world_size = launched_ranks()
    _check_sizes(world_size, tp=tp, pp=pp, cp=cp, vpp=vpp)
    protect_megatron()
    platform = platform or detect_platform(local_rank())
    timeout = timedelta(seconds=timeout_s)
    store = _start_distributed(world_size, platform, timeout)
    _start_megatron(tp=tp, pp=pp, cp=cp, vpp=vpp, seed=seed, timeout_s=timeout_s)
    return _describe(platform, store, vpp, timeout)


def _check_sizes(world_size: int, *, tp: int, pp: int, cp: int, vpp: int | None) -> None:
    if min(tp, pp, cp) < 1:
        raise ValueError(f"tensor, pipeline and context parallel sizes must be at least 1, got {tp}, {pp} and {cp}")
    if world_size % (tp * pp * cp):
        context = f" x context_parallel_size={cp}" if cp > 1 else ""
        raise ValueError(
            f"{world_size} processes cannot hold models of tensor_model_parallel_size={tp} x "
            f"pipeline_model_parallel_size={pp}{context}: start a multiple of {tp * pp * cp} processes"
        )
    if vpp is not None and (vpp < 2 or pp < 2):
        raise ValueError(
            f"virtual_pipeline_model_parallel_size={vpp} needs a value of at least 2 and "
            f"pipeline_model_parallel_size > 1 (got {pp})"
        )


def _start_distributed(world_size: int, platform: Platform, timeout: timedelta) -> dist.Store:
    if platform.is_cuda:
        torch.cuda.set_device(platform.device)
    if dist.is_initialized():
        raise ValueError("torch.distributed is already initialised: call ParallelState.destroy() of the earlier state")
    store: dist.Store
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        store, rank = dist.HashStore(), 0
    else:
        store, rank, world_size = _meet(timeout)
    store.set_timeout(timeout)
    # torchrun's store outlives a destroyed state: keys of an earlier one must not be met again
    generation = store.add(f"spear_megatron/generation/{rank}", 1)
    # No device_id: torch would split every later group off the world's NCCL communicator, with all ranks. A gloo group
    # of the leaders alone, or one with servers, which makes no such split on its members, would hang the others.
    dist.init_process_group(
        platform.backend,
        store=dist.PrefixStore(f"groups/{generation}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return dist.PrefixStore(f"spear_megatron/{generation}", store)


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all ranks, this one's number and how many there are."""
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0].rstrip(".")
        raise RunError(
            f"rank {os.environ['RANK']} cannot meet the others at MASTER_ADDR:MASTER_PORT={where}: {reason}. Start all "
            "ranks, with an address that reaches the host of rank 0 and a port that is free there"
        ) from error


def _start_megatron(*, tp: int, pp: int, cp: int, vpp: int | None, seed: int, timeout_s: float) -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from spear_megatron.device.cpu_shim import megatron_on_cpu

    with megatron_on_cpu():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            distributed_timeout_minutes=timeout_s / 60,  # any number: it goes into a timedelta
        )
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _describe(platform: Platform, store: dist.Store, vpp: int | None, timeout: timedelta) -> ParallelState:
    from megatron.core import parallel_state as mpu

    rank = dist.get_rank()
    model_group = _model_group(timeout)
    leader_rank = min(dist.get_process_group_ranks(model_group))
    leaders: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(leaders, leader_rank)
    leader_ranks = sorted(set(leaders))
    leader_group = dist.new_group(leader_ranks, backend="gloo", timeout=timeout)
    world = dist.distributed_c10d._get_default_group()
    return ParallelState(
        platform=platform,
        rank=rank,
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        vpp_size=vpp,
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        model_group=model_group,
        leader_group=leader_group if rank == leader_rank else None,
        cpu_group=world if platform.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout),
        leader_rank=leader_rank,
        store=store,
    )


def _model_group(timeout: timedelta) -> dist.ProcessGroup:
    """The ranks of this rank's model copy; Megatron knows them without context parallelism only."""
    from megatron.core import parallel_state as mpu

    if mpu.get_context_parallel_world_size() == 1:
        return mpu.get_model_parallel_group()
    copies: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(copies, mpu.get_data_parallel_rank())
    own = None
    for copy in sorted(set(copies)):  # every rank takes part in making every group
        group = dist.new_group([rank for rank, number in enumerate(copies) if number == copy], timeout=timeout)
        own = group if copy == mpu.get_data_parallel_rank() else own
    assert own is not None
    return own
