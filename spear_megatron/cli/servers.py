"""SGLang servers of a run: started where none are named, told of new weights, sharing the trainer's GPUs if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spear_megatron.config.schema import Config
from spear_megatron.model.shape import ModelShape
from spear_megatron.parallel.agreement import agree_ok
from spear_megatron.parallel.launch import local_world_size
from spear_megatron.parallel.state import ParallelState
from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.colocation import SharedGpus
from spear_megatron.rollout.sglang.command import ServerSpec
from spear_megatron.rollout.sglang.config import SGLangConfig
from spear_megatron.rollout.sglang.fleet import restore_from_disk
from spear_megatron.rollout.sglang.servers import RESERVED_TOKENS
from spear_megatron.rollout.sglang.start import Servers, computes_on_cpu, open_servers
from spear_megatron.trainer.offload import StateOffload
from spear_megatron.trainer.optimizer import PolicyOptimizer
from spear_megatron.weights.publisher import Published


@contextlib.contextmanager
def open_rollout_servers(
    config: Config, parallel: ParallelState, shape: ModelShape, max_model_len: int
) -> Iterator[Servers]:
    """The servers that leaders generate with: the configured ones, or those started here. Collective.

    Raises: as ``rollout.sglang.start.open_servers``.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "sglang" or rollout.sglang.servers:
        yield Servers(rollout.sglang.servers, None)
        return
    spec = server_spec(config, parallel, shape, max_model_len)
    run_dir = Path(config.trainer.default_local_dir)
    with open_servers(
        rollout.sglang.launch, spec, parallel, run_dir, colocated=rollout.sglang.colocated
    ) as servers:
        yield servers


def server_spec(config: Config, parallel: ParallelState, shape: ModelShape, max_model_len: int) -> ServerSpec:
    """What a started server serves.

    Raises:
        ValueError: weights cannot reach servers on the trainer's GPUs in the way that is configured.
    """
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    on_cpu = computes_on_cpu(rollout.sglang.launch, parallel)
    if not on_cpu:
        _check_weights(rollout.sglang, parallel)
    return ServerSpec(
        model_path=model.path,
        dtype=str(model.torch_dtype).removeprefix("torch."),
        context_length=min(max_model_len + RESERVED_TOKENS, shape.max_position_embeddings),
        max_running_requests=rollout.sglang.max_in_flight or rollout.max_num_seqs,
        memory_saver=rollout.sglang.colocated and not on_cpu,  # there is no such library for the CPU
        on_cpu=on_cpu,
    )


def _check_weights(sglang: SGLangConfig, parallel: ParallelState) -> None:
    """Refuse ways of weights that cannot work between this trainer and servers that it starts on GPUs."""
    prefix, launch, weights = "actor_rollout_ref.rollout.sglang", sglang.launch, sglang.weights
    if sglang.colocated and weights.way == "distributed":
        raise ValueError(
            f"{prefix}.weights.way=distributed makes a group of trainer and servers, and NCCL takes no two members on "
            f"one GPU, which {prefix}.colocated=true asks for: set way=tensor or way=disk"
        )
    one_machine = local_world_size(parallel.world_size) == parallel.world_size
    last_leader = (parallel.dp_size - 1) * parallel.tp_size * parallel.cp_size
    sees_all = sglang.colocated and launch.backend == "process" and launch.num_servers == 1 and one_machine
    if weights.transport == "cuda_ipc" and not (sees_all and last_leader < launch.tp_size):
        raise ValueError(
            f"{prefix}.weights.transport=cuda_ipc hands over memory of the data-parallel leaders' GPUs, and a started "
            f"server sees no GPUs but its own: set {prefix}.colocated=true with one server on one machine whose "
            f"launch.tp_size={launch.tp_size} takes in GPU {last_leader}, or transport=http or shared_memory"
        )


def shared_gpus(
    config: Config, parallel: ParallelState, servers: Servers, optimizer: PolicyOptimizer
) -> SharedGpus | None:
    """How trainer and servers take turns on the same GPUs; None where they do not share any."""
    sglang = config.actor_rollout_ref.rollout.sglang
    if not sglang.colocated:
        return None
    return SharedGpus(
        parallel,
        servers.fleet,
        StateOffload(optimizer),
        timeout_s=sglang.control_timeout_s,
        cache_first=sglang.weights.probe_prompts > 0,  # a probe is scored by the servers within the publication
    )


@dataclass(frozen=True)
class Publishing:
    """Publications with all that goes with them.

    Attributes:
        parallel: coordinates of this rank.
        servers: those of the run; the fleet of this rank learns which weights are out.
        send: gives every server the weights of a version, and says which took them. Collective.
        gpus: the turns of trainer and servers, where they share GPUs.
    """

    parallel: ParallelState
    servers: Servers
    send: Callable[[int], Published | None]
    gpus: SharedGpus | None

    def publish(self, version: int) -> Published | None:
        """Send the weights of ``version``, and what came of it; raises what ``send`` raises."""
        fleet = self.servers.fleet
        with contextlib.ExitStack() as stack:
            if self.gpus is not None:
                stack.enter_context(self.gpus.publishing())
            agree_ok(self.parallel, "waiting for SGLang servers that are being replaced", self._await_servers())
            if fleet is not None:
                stack.enter_context(fleet.quiet())
            outcome = self.send(version)
            if fleet is not None and outcome is not None:
                restore = None if outcome.folder is None else restore_from_disk(outcome.folder, version)
                fleet.took(version, outcome.fresh, outcome.stale, restore)
            return outcome

    def _await_servers(self) -> str | None:
        """Wait for servers that are just being replaced; why none came."""
        fleet = self.servers.fleet
        if fleet is None:
            return None
        try:
            fleet.wait_reachable(fleet.longest_outage_s)
        except EngineError as error:
            return str(error)
        return None

    def to_training(self) -> None:
        """Generation is over until the next publication."""
        if self.gpus is not None:
            self.gpus.to_training()
