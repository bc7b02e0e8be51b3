"""A stand-in for the control client of one server: keeps the weights it is sent, and fails as it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spear_megatron.rollout.engine import EngineError
from spear_megatron.rollout.sglang.control import ServerInfo
from spear_megatron.testing.payloads import read_payload


def toy_log_probs(weights: dict[str, torch.Tensor], prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Something that depends on every weight and every token, in place of a model."""
    total = sum(float(tensor.double().abs().mean()) * (1 + i) for i, (_, tensor) in enumerate(sorted(weights.items())))
    return [[-total / (100 + token) for token in prompt[1:]] for prompt in prompts]


class FakeControl:
    """What :class:`ControlClient` offers to the publisher.

    Args:
        weights: what it starts with.
        model_path: the folder it says it was started with.
        fails_at: number of the tensor update that fails, from 1.
        keeps_label: never changes the version it names.
        has_checksums: offers checksums, of tensors under names of its own.
    """

    def __init__(
        self,
        url: str,
        weights: dict[str, torch.Tensor] | None = None,
        *,
        model_path: str = "",
        tp_size: int = 1,
        fails_at: int = 0,
        keeps_label: bool = False,
        has_checksums: bool = False,
    ) -> None:
        self.url = url
        self.weights = dict(weights or {})
        self.model_path = model_path
        self.tp_size = tp_size
        self.fails_at = fails_at
        self.keeps_label = keeps_label
        self.has_checksums = has_checksums
        self.label = "default"
        self.paused = False
        self.in_session = False
        self.num_updates = 0
        self.num_probes = 0
        self.largest_payload = 0
        self.flushed_with_update = False
        self.calls: list[str] = []

    def close(self) -> None:
        self.calls.append("close")

    def server_info(self) -> ServerInfo:
        return ServerInfo((0, 5, 21), self.model_path, self.label, None, None, self.tp_size)

    def pause(self, mode: str) -> None:
        self.calls.append(f"pause {mode}")
        self.paused = True

    def resume(self) -> None:
        self.calls.append("resume")
        self.paused = False

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        self.calls.append("flush")

    def begin_update(self) -> None:
        if self.in_session:
            raise EngineError("a weight-update session is already open")
        self.in_session = True

    def end_update(self) -> None:
        if not self.in_session:
            raise EngineError("no weight-update session is open")
        self.in_session = False

    def update_from_tensors(
        self, serialized: Sequence[str], *, load_format: str | None = None, version: str | None = None, flush: bool
    ) -> None:
        assert self.in_session and len(serialized) == self.tp_size
        self.num_updates += 1
        self.flushed_with_update |= flush
        if self.num_updates == self.fails_at:
            raise EngineError(f"{self.url}/update_weights_from_tensor: HTTP 400: out of memory")
        for text in serialized:
            self.largest_payload = max(self.largest_payload, len(text))
            tensors, _ = read_payload(text)
            self.weights.update(tensors)
        self._label(version)

    def update_from_disk(self, folder: str, version: str, *, flush: bool = True) -> None:
        from safetensors.torch import load_file

        self.flushed_with_update |= flush
        assert (Path(folder) / "config.json").is_file() and (Path(folder) / "model.safetensors.index.json").is_file()
        for file in Path(folder).glob("*.safetensors"):
            self.weights.update(load_file(file))
        self._label(version)

    def _label(self, version: str | None) -> None:
        if version is not None and not self.keeps_label:
            self.label = version

    def prompt_log_probs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        assert not self.paused
        self.num_probes += 1
        return toy_log_probs(self.weights, prompts)

    def checksums(self) -> Any:
        if not self.has_checksums:
            return None
        digests = {f"server.{n}": hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in self.weights.items()}
        return {"success": True, "ranks": [{"checksums": digests}]}
