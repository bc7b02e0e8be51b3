"""What the benchmarks of the kernels share: an allocator that is fair to everybody, and the report."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

WARM_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def keep_freed_memory() -> None:
    """Start this script again with an allocator that keeps freed memory, so that no contender pays page faults."""
    if any(os.environ.get(key) != value for key, value in WARM_ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM_ALLOCATOR})  # read at start-up


def write_report(path: Path, results: Any, **facts: Any) -> None:
    """Write results and facts, with those of this installation, as JSON."""
    import torch

    from spear_megatron.kernels import available

    machine = platform.processor() or platform.machine()
    report = {**facts, "torch": torch.__version__, "kernels": available(), "machine": machine, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")
