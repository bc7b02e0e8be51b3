"""The command line and the environment of one server, and which GPUs it gets. Starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spear_megatron.rollout.sglang.launch_config import SGLangLaunchConfig

# On a CPU without AMX these are the only kernels that work; an idle scheduler would burn a core.
_CPU_ARGUMENTS: dict[str, object] = {
    "attention-backend": "torch_native", "sampling-backend": "pytorch", "grammar-backend": "none",
    "sleep-on-idle": True,
}  # fmt: skip
_REPLICAS = frozenset({"dp-size", "data-parallel-size"})


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """What every server of a run serves.

    Attributes:
        model_path: Hugging Face folder; its weights are replaced by the trainer's.
        dtype: torch name of the weights' type, such as ``bfloat16``.
        context_length: tokens of prompt and response together.
        max_running_requests: requests computed together.
        memory_saver: whether memory can be released while the trainer uses the same GPUs.
        on_cpu: whether the server computes on the CPU.
    """

    model_path: str
    dtype: str
    context_length: int
    max_running_requests: int
    memory_saver: bool = False
    on_cpu: bool = False


def server_command(config: SGLangLaunchConfig, spec: ServerSpec, port: int, rendezvous_port: int) -> list[str]:
    """Arguments of one server process.

    Args:
        port: that it answers on.
        rendezvous_port: where its own ranks meet. Left to itself, SGLang takes one that is free seconds before it
            listens there, and by then two servers may have the same.
    """
    python = config.python or sys.executable
    launcher = [str(Path(__file__).with_name("serve_cpu.py"))] if spec.on_cpu else ["-m", "sglang.launch_server"]
    own: dict[str, object] = {
        "model-path": spec.model_path,
        "host": config.host,
        "port": port,
        "device": "cpu" if spec.on_cpu else "cuda",
        "tp-size": config.tp_size,
        "dtype": spec.dtype,
        "context-length": spec.context_length,
        "max-running-requests": spec.max_running_requests,
        "enable-memory-saver": spec.memory_saver,
    }
    further = {name.replace("_", "-"): value for name, value in config.args.items()}
    # Replicas within one server need a port each, which only SGLang can choose.
    defaults: dict[str, object] = {} if _REPLICAS & further.keys() else {"nccl-port": rendezvous_port}
    if spec.on_cpu:
        # By itself a server takes most of the memory of the machine for its cache.
        defaults |= {**_CPU_ARGUMENTS, "max-total-tokens": spec.context_length * spec.max_running_requests}
    words = [python, *launcher]
    for name, value in {**defaults, **further, **own}.items():
        words += _words(name, value)
    return words


def _words(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    items = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{name}", *map(str, items)]


def server_environment(config: SGLangLaunchConfig, gpus: Sequence[int], spec: ServerSpec) -> dict[str, str]:
    """Environment of one server on the devices ``gpus`` (indices that the trainer's own environment counts).

    The trainer's torchrun variables are left out: SGLang would take its rank and its master's address from them.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    environment = {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        # /health answers at once and while paused; /health_generate still asks the scheduler.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if spec.on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
    elif gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_devices(os.environ, gpus))
    return {**environment, **config.env}


_TORCHRUN = frozenset(
    {
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
        "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE", "PYTHONPATH",
    }
)  # fmt: skip


def _visible_devices(environment: Mapping[str, str], gpus: Sequence[int]) -> list[str]:
    """Names of devices that this process counts from 0, as a child must be told them."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not visible:
        return [str(gpu) for gpu in gpus]
    return [visible[gpu] for gpu in gpus]
