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

    report = {
        "command": " ".join(["python", *sys.argv]),
        **facts,
        "torch": torch.__version__,
        "kernels": available(),
        "machine": machine(),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    print(f"\nwritten to {path}")


def machine() -> str:
    """Name of the processor, and how many of its cores are here."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in found:
            name = f"{found['model name']} (family {found.get('cpu family', '?')} model {found.get('model', '?')})"
    return f"{name}, {os.cpu_count()} cores"
