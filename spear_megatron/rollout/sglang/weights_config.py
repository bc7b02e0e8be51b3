"""How weights reach SGLang servers, and how their arrival is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_PREFIX = "actor_rollout_ref.rollout.sglang.weights"


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Keys under ``actor_rollout_ref.rollout.sglang.weights``."""

    way: Literal["tensor", "distributed", "disk"] = "tensor"
    """tensor: by HTTP or shared memory; distributed: broadcast in a process group; disk: a folder that all can read."""
    transport: Literal["http", "shared_memory", "cuda_ipc"] = "http"
    """Of way tensor: bytes in the request, or handles to memory of the same host (cuda_ipc: of the same GPUs)."""
    folder: str | None = None
    """Of way disk: where weights are written; null takes `weights` in trainer.default_local_dir."""
    keep: int = 2
    """Of way disk: newest versions that are kept."""
    master_address: str | None = None
    """Of way distributed: name of a leader's host that servers can reach; null takes its host name."""
    max_gather_mb: int = 1536
    """MiB of gathered weights that a leader holds at a time; buckets are a third of it."""
    timeout_s: float = 300.0
    """Deadline of one request, of joining a group and of a turn to send, in seconds."""
    pause: Literal["retract", "abort", "in_place"] = "retract"
    """What happens to requests during an update: computed again, ended, or kept with their old cache."""
    probe_prompts: int = 4
    """Fixed prompts whose log-probs every server must share with the trainer after an update; 0 checks none."""
    probe_tolerance: float | None = None
    """Largest difference of a log-prob; null takes 0.002 in float32, 0.3 in bfloat16, 0.1 in float16."""
    resend_on_mismatch: bool = True
    """Send everything once more where the probe fails, before the run stops."""

    def __post_init__(self) -> None:
        choices = {
            "way": ("tensor", "distributed", "disk"),
            "transport": ("http", "shared_memory", "cuda_ipc"),
            "pause": ("retract", "abort", "in_place"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{_PREFIX}.{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.transport != "http" and self.way != "tensor":
            raise ValueError(f"{_PREFIX}.transport={self.transport} applies only to way=tensor, set it to http")
        for name, least in (("keep", 1), ("max_gather_mb", 1), ("probe_prompts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{_PREFIX}.{name} must be an integer of at least {least}, got {value!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"{_PREFIX}.timeout_s must be positive, got {self.timeout_s}")
        if self.probe_tolerance is not None and not self.probe_tolerance > 0:
            raise ValueError(f"{_PREFIX}.probe_tolerance must be positive or null, got {self.probe_tolerance}")

    @property
    def bucket_bytes(self) -> int:
        """Most bytes of a bucket: one is sent, one is gathered, and its messages take as much again."""
        return (self.max_gather_mb << 20) // 3
