"""tools/build_cuda.py: what is passed to nvcc, when it runs again, what is said when it fails; a real compilation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "build_cuda.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda_under_test", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def stand_in(folder: Path, architectures: str, status: int = 0) -> str:
    """A program that answers as nvcc does; it logs its arguments beside itself and writes the output file."""
    program = folder / "nvcc"
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --list-gpu-arch ]; then printf "{architectures}"; exit 0; fi\n'
        'echo "$@" >> "$(dirname "$0")/log"\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done\n'
        f"exit {status}\n"
    )
    program.chmod(0o755)
    return str(program)


def test_compiles_once_until_a_source_changes(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = stand_in(tmp_path, "compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n")
    library, source = tmp_path / "out" / "_cuda.so", tmp_path / "kernel.cu"
    source.write_text("")
    monkeypatch.setattr(tool, "dependencies", lambda: [source])
    assert tool.build(nvcc, library) and library.read_text() == "built\n"
    assert not tool.build(nvcc, library)
    later = library.stat().st_mtime + 5
    os.utime(source, (later, later))
    assert tool.build(nvcc, library)
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == 2 and "-cudart static" in calls[0] and str(PATH.parents[1] / "csrc") in calls[0]
    targets = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_100,code=sm_100"]
    assert all(f"-gencode={target}" in calls[0] for target in [*targets, "arch=compute_100,code=compute_100"])
    assert "sm_120" not in calls[0] and list(library.parent.iterdir()) == [library]


def test_older_compilers_get_only_what_they_know(tool: ModuleType, tmp_path: Path) -> None:
    found = " ".join(tool.command(stand_in(tmp_path, "compute_80\\ncompute_90\\n"), tmp_path / "x.so"))
    assert "sm_90" in found and "compute_90,code=compute_90" in found
    assert "compute_100" not in found and "sm_100" not in found
    with pytest.raises(tool.BuildError, match="knows none of the architectures"):
        tool.command(stand_in(tmp_path, "compute_50\\n"), tmp_path / "x.so")


def test_failures_leave_nothing_behind(tool: ModuleType, tmp_path: Path) -> None:
    library = tmp_path / "out" / "_cuda.so"
    with pytest.raises(tool.BuildError, match="failed with status 2"):
        tool.build(stand_in(tmp_path, "compute_90\\n", status=2), library)
    assert list(library.parent.iterdir()) == []


def test_cuda_home_comes_first(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = stand_in(tmp_path / "bin", "compute_90\\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tool.find_nvcc() == nvcc


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_kernels_compile_for_every_architecture(tool: ModuleType, tmp_path: Path) -> None:
    library = tmp_path / "_cuda.so"
    assert tool.build(tool.find_nvcc(), library)
    assert library.stat().st_size > 100_000
