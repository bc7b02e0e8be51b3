"""The batch scripts on a real SLURM, where its daemons are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("munge", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root")
def test_a_job_is_stopped_requeued_and_continued(tmp_path: Path) -> None:
    command = [sys.executable, "tools/slurm_check.py", "disaggregated", "--work", str(tmp_path / "check")]
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["recorded steps"] == list(range(1, 41)) and len(result["logs"]) == 2
