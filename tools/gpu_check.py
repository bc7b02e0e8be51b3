"""Check the CUDA kernels on this machine: build them, test them on the device, measure them and a training step.

    python tools/gpu_check.py           # what `make gpu-check` runs

Needs a CUDA device, a C++ compiler, nvcc (or a spear_megatron/_cuda.so that was built elsewhere), and an environment
with a CUDA build of torch, numpy, pytest and what setup.py needs (setuptools, pybind11); no network. The training step
is measured where megatron-core and transformers are installed too. The exit status is 0 only if every step succeeded.
Results go to outputs/gpu_check/.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_cuda import LIBRARY, find_nvcc  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "outputs" / "gpu_check"
MIN_TORCH = (2, 11)
MODULES = ("numpy", "pybind11", "pytest", "setuptools")
STEP_MODULES = ("megatron", "omegaconf", "transformers")
KERNEL_TARGET = 0.9  # fraction of the copy bandwidth that the kernels alone are built to reach


@dataclass(frozen=True)
class Step:
    """One part of the check and its result; ``seconds`` is wall time."""

    name: str
    passed: bool
    seconds: float
    detail: str


def main() -> int:
    """Run the steps; 0 if all passed."""
    missing = unfit_machine()
    if missing:
        print(f"gpu-check: {missing}", file=sys.stderr)
        return 1
    OUTPUT.mkdir(parents=True, exist_ok=True)
    benchmark = OUTPUT / "gpu_kernels.json"
    benchmark.unlink(missing_ok=True)
    has_nvcc = find_nvcc() is not None
    if has_nvcc:
        LIBRARY.unlink(missing_ok=True)  # where files were copied their times do not tell whether it is up to date
    else:
        print(f"nvcc was not found: spear_megatron/{LIBRARY.name} is tested as it stands", flush=True)
    steps = [run("build", ["setup.py", "build_ext", "--inplace"], {"SPEAR_CUDA": str(int(has_nvcc))})]
    if steps[0].passed:
        tests = ["tests/gpu", "tests/unit/test_kernels_cuda_library.py"]
        steps.append(run("tests", ["-m", "pytest", "-q", "-rs", *tests]))
        steps.append(run("benchmark", ["tools/bench_gpu_kernels.py", "--json", str(benchmark)]))
        absent = missing_of(STEP_MODULES)
        if absent:
            print(f"--- training step: not measured, {absent} cannot be imported", flush=True)
        else:
            steps.append(run("training step", ["tools/bench_step.py", "--json", str(OUTPUT / "step.json")]))
    print_summary(steps, benchmark)
    (OUTPUT / "summary.json").write_text(json.dumps([asdict(step) for step in steps], indent=1))
    return 0 if all(step.passed for step in steps) else 1


def unfit_machine() -> str:
    """Why this machine cannot run the check; empty if it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}); install a CUDA build of torch"
    if torch.version.cuda is None:
        return f"there is no CUDA device to use: torch {torch.__version__} is built without CUDA; install a CUDA build"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, MIN_TORCH))}"
    if not torch.cuda.is_available():
        return "there is no CUDA device on this machine (torch.cuda.is_available() is False)"
    absent = missing_of(MODULES)
    if absent:
        return f"{absent} cannot be imported; install what requirements/build.txt and dev.txt have"
    if find_nvcc() is None and not LIBRARY.is_file():
        return "nvcc was not found; install the CUDA toolkit, set CUDA_HOME, or bring spear_megatron/_cuda.so along"
    return ""


def missing_of(modules: tuple[str, ...]) -> str:
    """Those that cannot be imported, as a text."""
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


def run(name: str, arguments: list[str], variables: dict[str, str] | None = None) -> Step:
    """Run this Python with ``arguments`` from the repository; what it prints goes to the terminal and to a log."""
    print(f"--- {name}: python {' '.join(arguments)}", flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    started, last = time.monotonic(), ""
    with (
        (OUTPUT / f"{name}.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            last = line.strip() or last
    return Step(name, process.returncode == 0, time.monotonic() - started, last)


def print_summary(steps: list[Step], benchmark: Path) -> None:
    """One line per step, then what the kernels reached."""
    print("\n=== gpu-check")
    for step in steps:
        print(f"{'passed' if step.passed else 'FAILED'}  {step.name}, {step.seconds:.0f} s: {step.detail}")
    if benchmark.is_file():
        report = json.loads(benchmark.read_text())
        print(f"{report['device']}, torch {report['torch']}")
        for result in report["results"]:
            for item in result["passes"]:
                if item["contender"].startswith("kernels alone"):
                    reached = item["fraction_of_copy"]
                    mark = "reached" if reached >= KERNEL_TARGET else f"below {KERNEL_TARGET}"
                    print(f"{result['shape']} {item['pass']}: {reached:.2f} of the copy bandwidth, {mark}")
        print("\n".join(report["policy_targets"]))


if __name__ == "__main__":
    sys.exit(main())
