"""Latency and throughput of the code sandbox on this machine, as a table and JSON.

    python tools/bench_sandbox.py [--backend namespaces landlock] [--repeat 100] [--workers 4] [--json FILE]

Latency is one program at a time; throughput keeps ``--workers`` programs running. The first run of each backend,
which starts the server and preloads numpy and sympy, is given apart. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from spear_megatron.environments.sandbox import ExecutionStatus, Sandbox, SandboxConfig, open_sandbox

PROGRAMS = {
    "print(1)": "print(1)",
    "sympy solve": "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**3 - 6*x**2 + 11*x - 6, x))",
    "numpy matmul": "import numpy as np\na = np.arange(10000.0).reshape(100, 100)\nprint((a @ a).sum())",
    "exception": "def f(n):\n    return 1 / n\n\nf(0)",
}


async def run_checked(sandbox: Sandbox, name: str) -> float:
    """Run one of the programs and return its latency in seconds; raises RuntimeError if it ends in another way."""
    started = time.perf_counter()
    result = await sandbox.run(PROGRAMS[name])
    elapsed = time.perf_counter() - started
    expected = ExecutionStatus.ERROR if name == "exception" else ExecutionStatus.OK
    if result.status is not expected:
        raise RuntimeError(f"{name} ended as {result.status.value}: {result.detail or result.stderr}")
    return elapsed


async def measure(backend: str, repeat: int, workers: int) -> list[dict[str, object]]:
    """One row per program: first-run, median, 10th and 90th percentile latency in ms, programs per second."""
    sandbox = open_sandbox(SandboxConfig(backend=backend, workers=workers))
    rows: list[dict[str, object]] = []
    try:
        first_s = await run_checked(sandbox, "print(1)")
        for name in PROGRAMS:
            latencies = sorted([await run_checked(sandbox, name) for _ in range(repeat)])
            started = time.perf_counter()
            await asyncio.gather(*(run_checked(sandbox, name) for _ in range(repeat)))
            per_s = repeat / (time.perf_counter() - started)
            rows.append(
                {
                    "backend": backend,
                    "program": name,
                    "start_ms": round(1e3 * first_s, 1),
                    "median_ms": round(1e3 * statistics.median(latencies), 2),
                    "p10_ms": round(1e3 * latencies[len(latencies) // 10], 2),
                    "p90_ms": round(1e3 * latencies[len(latencies) * 9 // 10], 2),
                    "per_s": round(per_s, 1),
                }
            )
    finally:
        await sandbox.close()
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows with their keys as the header."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    """Measure every backend asked for; exit code 1 when none of them works here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", default=["namespaces", "landlock"], choices=["namespaces", "landlock"])
    parser.add_argument("--repeat", type=int, default=100, help="runs of each program")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="programs at a time for throughput")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine to this file")
    arguments = parser.parse_args()
    if arguments.repeat < 1 or arguments.workers < 1:
        parser.error("--repeat and --workers must be at least 1")
    rows = []
    for backend in arguments.backend:
        try:
            rows += asyncio.run(measure(backend, arguments.repeat, arguments.workers))
        except ValueError as error:
            print(error, file=sys.stderr)
    if not rows:
        return 1
    print_table(rows)
    machine = {"processors": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    report = {"machine": {**machine, "load": os.getloadavg()[0]}, "rows": rows}
    print(json.dumps(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
