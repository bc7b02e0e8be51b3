"""Build and install spear_megatron with its compiled kernels (csrc/)."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Pinned requirements of one file, without comments and includes."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and line[0] not in "#-"]


def sources(pattern: str) -> list[str]:
    """Files of csrc/ that match `pattern`, relative to this file as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


class BuildKernels(build_ext):
    """Compiles csrc/ with one job per processor and says what is missing when it cannot."""

    def build_extensions(self) -> None:
        try:
            with ParallelCompile(default=os.cpu_count() or 1):
                super().build_extensions()
        except CompileError as error:
            raise CompileError(
                f"{error}\nThe kernels in csrc/ need a GCC with C++17 and OpenMP, and the Python headers "
                "(Debian and Ubuntu: apt-get install g++ libgomp1 python3-dev); CXX chooses the compiler."
            ) from error


# No -march: the kernels are compiled for several instruction sets and choose at run time (csrc/foreach_isa.h).
kernels = Pybind11Extension(
    "spear_megatron._C",
    sources("*.cpp"),
    depends=sources("*.h"),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
)

setup(
    name="spear-megatron",
    version="0.1.0",
    description="Reinforcement learning of LLM agents with SPEAR on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["spear_megatron", "spear_megatron.*"]),
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.11",
    install_requires=requirements("cpu.txt"),
    extras_require={
        "dev": requirements("dev.txt"),
        "sglang": ["sglang==0.5.21"],
        "ray": ["ray==2.60.0"],
        "dali": ["nvidia-dali-cuda130==2.4.0"],
    },
)
