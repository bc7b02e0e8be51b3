"""The cluster that a plan is made for, with the rates that a step's time is estimated from."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Equal nodes of equal GPUs. Rates are peaks as data sheets state them; efficiencies are assumptions.

    Attributes:
        nodes, gpus_per_node: of the whole run. gpu_bytes: memory of one GPU. host_bytes: memory of one node.
        peak_flops: dense bf16 operations per second of one GPU (default: H100 SXM, 989e12).
        memory_bandwidth: bytes per second of a GPU's memory (3.35e12).
        nvlink_bandwidth: bytes per second and direction between GPUs of a node (450e9).
        network_bandwidth: bytes per second and GPU between nodes (50e9: 400 Gb/s).
        host_flops, host_bandwidth: of the processor cores and memory that one embedded engine has (2e12, 1e11).
        storage_bandwidth: bytes per second and node that a checkpoint is written with (2e9).
        publish_bandwidth: bytes per second of handing the full weights to the engines (8e9).
        compute_efficiency: of the matrix products of training; communication and pipeline bubbles come on top.
        decode_efficiency: of memory bandwidth and operations while tokens are generated.
        link_efficiency: of the peak rates of links.
        reserve_bytes: context, NCCL channels and workspaces per GPU.
        fragmentation: share of the activations that the allocator loses.
    """

    nodes: int
    gpus_per_node: int
    gpu_bytes: int = 80 * GIB
    host_bytes: int = 1024 * GIB
    peak_flops: float = 989e12
    memory_bandwidth: float = 3.35e12
    nvlink_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    host_flops: float = 2e12
    host_bandwidth: float = 1e11
    storage_bandwidth: float = 2e9
    publish_bandwidth: float = 8e9
    compute_efficiency: float = 0.5
    decode_efficiency: float = 0.5
    link_efficiency: float = 0.75
    reserve_bytes: int = 4 * GIB
    fragmentation: float = 0.05

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "gpu_bytes", "host_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_bytes', '_memory_gb')} must be positive, got {getattr(self, name)}")
        for name in ("compute_efficiency", "decode_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in (0, 1], got {getattr(self, name)}")
        if self.peak_flops <= 0 or self.reserve_bytes < 0 or self.fragmentation < 0:
            raise ValueError("peak_flops must be positive, reserve_bytes and fragmentation must not be negative")

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node
