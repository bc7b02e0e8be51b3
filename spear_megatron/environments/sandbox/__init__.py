"""Isolated execution of model-written Python, behind one protocol: ``open_sandbox(SandboxConfig(...))``."""

from __future__ import annotations

from spear_megatron.environments.sandbox.config import SandboxConfig
from spear_megatron.environments.sandbox.factory import BackendProbe, open_sandbox, probe
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus, Sandbox

__all__ = ["BackendProbe", "ExecutionResult", "ExecutionStatus", "Sandbox", "SandboxConfig", "open_sandbox", "probe"]
