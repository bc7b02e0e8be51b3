"""The engine that runs inside the trainer's process."""

from __future__ import annotations

from spear_megatron.rollout.embedded.engine import EmbeddedEngine, EngineStats

__all__ = ["EmbeddedEngine", "EngineStats"]
