"""The kernels of csrc/cuda/ as they stand, compiled for the host on an emulation of CUDA's threads (cuda_emulation/).

A test module imports both fixtures; each of its tests then runs them on CPU tensors.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spear_megatron.kernels import backends, cuda_library, logprobs_cuda, policy_loss_cuda, policy_loss_ops

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
_LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<(.*?), 0, (\w+)>>>\((.*?)\);", re.DOTALL)


def translated(source: Path) -> str:
    """A CUDA source with every launch of a kernel turned into a call of the emulation."""
    text = source.read_text()
    launches = text.count("<<<")
    text, found = _LAUNCH.subn(r"emulation::launch(\2, [&] { \1(\4); });", text)
    assert found == launches > 0, f"{source.name}: {found} of {launches} launches understood"
    return text


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library of all kernels, compiled once for all modules that import this."""
    folder = tmp_path_factory.getbasetemp() / "emulated"
    if (folder / "emulated.so").is_file():
        return folder / "emulated.so"
    folder.mkdir(exist_ok=True)
    names = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        names.append(f"{source.stem}.cpp")
        (folder / names[-1]).write_text(translated(source))
    includes = [f"-I{path}" for path in (TESTS / "cuda_emulation", CSRC / "cuda", CSRC)]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, *includes, *names, "-o", "emulated.so"], cwd=folder, check=True, timeout=600)
    return folder / "emulated.so"


@pytest.fixture(autouse=True)
def emulation(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled implementation of CPU tensors is the emulated CUDA one."""
    monkeypatch.setattr(cuda_library, "LIBRARY", emulated_library)
    monkeypatch.setitem(backends._COMPILED, "cpu", logprobs_cuda)
    monkeypatch.setitem(policy_loss_ops._COMPILED, "cpu", policy_loss_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    cuda_library._load.cache_clear()
    yield
    monkeypatch.undo()
    cuda_library._load.cache_clear()
