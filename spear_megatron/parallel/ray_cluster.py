"""Ray, where somebody asks for it. The trainer itself never needs it."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

INSTALL = "pip install 'spear-megatron[ray]'"


def require_ray() -> Any:
    """The module ``ray``.

    Raises:
        ValueError: it is not installed; names the command.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"backend=ray needs Ray, which cannot be imported ({error}): {INSTALL}") from error


def connected_ray() -> Any:
    """``ray``, connected to the cluster of RAY_ADDRESS, or to one of this machine that is started and ends with us."""
    ray = require_ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False if "RAY_ADDRESS" not in os.environ else None, log_to_driver=False)
    return ray


def actor_environment() -> dict[str, Any]:
    """Runtime environment of an actor that imports what this process can import, at the same paths."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
