"""Compile csrc/cuda/ into spear_megatron/_cuda.so, a plain shared library without any dependency on torch.

    python tools/build_cuda.py          # what `make cuda` runs

Needs nvcc 12 or newer, found through CUDA_HOME, PATH or /usr/local/cuda; no device. `setup.py` calls :func:`build` too:
there the environment variable SPEAR_CUDA decides (0: never, 1: must succeed, unset: when nvcc is there).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "spear_megatron" / "_cuda.so"
ARCHITECTURES = (80, 90, 100)  # compute capabilities 8.0, 9.0, 10.0; later ones run the PTX of the last


class BuildError(RuntimeError):
    """The CUDA library could not be compiled; nvcc's own messages went to the terminal."""


def main() -> int:
    """Build, or say why not; the exit status."""
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            print("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME", file=sys.stderr)
            return 1
        changed = build(nvcc, LIBRARY)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{LIBRARY.relative_to(ROOT)} {'built' if changed else 'is up to date'}")
    return 0


def find_nvcc() -> str | None:
    """Path of nvcc from CUDA_HOME, PATH or /usr/local/cuda, in this order; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    for candidate in (str(Path(home) / "bin" / "nvcc") if home else "nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found:
            return found
    return None


def sources() -> list[Path]:
    """The files to compile."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def dependencies() -> list[Path]:
    """Everything a change of which makes the library stale."""
    return [*sources(), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), Path(__file__)]


def build(nvcc: str, library: Path) -> bool:
    """Compile unless ``library`` is newer than everything it is made of.

    Returns:
        Whether it was compiled.

    Raises:
        BuildError: nvcc failed or is too old.
    """
    if library.is_file() and all(path.stat().st_mtime <= library.stat().st_mtime for path in dependencies()):
        return False
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        status = subprocess.run(command(nvcc, partial)).returncode
        if status != 0:
            raise BuildError(f"{nvcc} failed with status {status}; CUDA 12 and 13 with their host compilers serve")
        partial.replace(library)  # a process that has the old one loaded keeps it
    finally:
        partial.unlink(missing_ok=True)
    return True


def command(nvcc: str, output: Path) -> list[str]:
    """The compiler's command line: code for every architecture that this nvcc knows, and PTX of the newest."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed.stdout)}
    chosen = [number for number in ARCHITECTURES if number in known]
    if not chosen:
        raise BuildError(f"{nvcc} knows none of the architectures {ARCHITECTURES}; install CUDA 12 or 13")
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    code.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    flags = ["-O3", "-std=c++17", "--threads", "0", "-cudart", "static", "-shared"]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    return [nvcc, *flags, *host, *code, "-o", str(output), *map(str, sources())]


if __name__ == "__main__":
    sys.exit(main())
