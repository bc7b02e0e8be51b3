"""Build and install spear_megatron with its compiled kernels (csrc/)."""

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_cuda  # noqa: E402


def requirements(name: str) -> list[str]:
    """Pinned requirements of one file, without comments and includes."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and line[0] not in "#-"]


def sources(pattern: str) -> list[str]:
    """Files of csrc/ that match `pattern`, relative to this file as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


class BuildKernels(build_ext):
    """Compiles csrc/ with one job per processor and says what is missing when it cannot."""

    def run(self) -> None:
        super().run()
        # An editable installation and --inplace use the library from the source tree, others from what is installed.
        compile_cuda((ROOT if self.inplace else Path(self.build_lib)) / "spear_megatron" / "_cuda.so")

    def build_extensions(self) -> None:
        try:
            with ParallelCompile(default=os.cpu_count() or 1):
                super().build_extensions()
        except CompileError as error:
            raise CompileError(
                f"{error}\nThe kernels in csrc/ need a GCC with C++17 and OpenMP, and the Python headers "
                "(Debian and Ubuntu: apt-get install g++ libgomp1 python3-dev); CXX chooses the compiler."
            ) from error


def digest_of_headers() -> str:
    """Tells builds of csrc/*.h apart: extensions that share structs compare it."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in sources("*.h"))).hexdigest()[:16]


def compile_cuda(library: Path) -> None:
    """Compile csrc/cuda/ where nvcc is there; SPEAR_CUDA=0 skips it, SPEAR_CUDA=1 requires it."""
    wish = os.environ.get("SPEAR_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"SPEAR_CUDA={wish} must be 0 (skip), 1 (require) or unset (where nvcc is found)")
    nvcc = None if wish == "0" else build_cuda.find_nvcc()
    if nvcc is None:
        reason = "SPEAR_CUDA=0" if wish == "0" else "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
        if wish == "1":
            raise CompileError(f"SPEAR_CUDA=1, but {reason}")
        print(f"CUDA kernels are not compiled: {reason}")
        return
    try:
        build_cuda.build(nvcc, library)
    except build_cuda.BuildError as error:
        if wish == "1":
            raise CompileError(str(error)) from error
        print(f"CUDA kernels are not compiled: {error}")


HEADERS = [("SPEAR_HEADERS", f'"{digest_of_headers()}"')]

# No -march: the kernels are compiled for several instruction sets and choose at run time (csrc/foreach_isa.h).
kernels = Pybind11Extension(
    "spear_megatron._C",
    sources("*.cpp"),
    depends=sources("*.h"),
    include_dirs=["csrc"],
    define_macros=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
)


def autograd_extensions() -> list[Extension]:
    """spear_megatron._autograd, compiled against the torch of this environment; none where there is no torch."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        print(
            "spear_megatron._autograd is not compiled, as there is no torch here: autograd functions in Python stand "
            "in. Build with --no-build-isolation."
        )
        return []
    torch = Path(found.origin).parent
    includes = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
    return [
        Extension(
            "spear_megatron._autograd",
            sources("autograd/*.cpp"),
            # Another torch is another build.
            depends=sources("*.h") + sources("autograd/*.h") + [str(torch / "version.py")],
            define_macros=HEADERS,
            library_dirs=[str(torch / "lib")],
            libraries=["c10", "torch_cpu", "torch_python"],
            extra_compile_args=["-O2", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"]
            + [flag for path in includes for flag in ("-isystem", str(path))],
            language="c++",
            optional=True,  # a torch that this does not fit must not keep the kernels away
        )
    ]


setup(
    name="spear-megatron",
    version="0.1.0",
    description="Reinforcement learning of LLM agents with SPEAR on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["spear_megatron", "spear_megatron.*"]),
    package_data={"spear_megatron.evaluation": ["page.html"]},
    ext_modules=[kernels, *autograd_extensions()],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.11",
    install_requires=requirements("cpu.txt"),
    extras_require={
        "dev": requirements("dev.txt"),
        "sglang": ["sglang==0.5.21"],
        "ray": ["ray==2.60.0"],
        "parquet": ["pyarrow==26.0.1"],
        "dali": ["nvidia-dali-cuda130==2.4.0"],  # on a CUDA 12 cluster nvidia-dali-cuda120==2.4.0 instead
    },
)
