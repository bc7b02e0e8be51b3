"""Build and install spear_megatron with its compiled kernels (csrc/)."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Pinned requirements of one file, without comments and includes."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and line[0] not in "#-"]


extension = Pybind11Extension(
    "spear_megatron._C",
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno"],
    extra_link_args=["-fopenmp"],
)

setup(
    name="spear-megatron",
    version="0.1.0",
    description="Reinforcement learning of LLM agents with SPEAR on megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["spear_megatron", "spear_megatron.*"]),
    ext_modules=[extension],
    python_requires=">=3.11",
    install_requires=requirements("cpu.txt"),
    extras_require={
        "dev": requirements("dev.txt"),
        "sglang": ["sglang==0.5.21"],
        "ray": ["ray==2.60.0"],
        "dali": ["nvidia-dali-cuda130==2.4.0"],
    },
)
