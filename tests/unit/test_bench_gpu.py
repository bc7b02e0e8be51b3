"""The GPU benchmarks and the GPU check without a device: every contender on the emulation, every step of the check."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_cuda import emulated_library, emulation  # noqa: F401

from spear_megatron.kernels import cov_select_cuda

REPOSITORY = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


class HostClock:
    """Milliseconds on the host, with the interface of the benchmark's clock."""

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        started = time.perf_counter()
        result = work()
        return 1e3 * (time.perf_counter() - started), result


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module


@pytest.mark.slow
@needs_compiler
def test_every_contender_of_the_logits_runs(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tool("bench_gpu_kernels")
    monkeypatch.setattr(bench, "megatron_cross_entropy", lambda: "not here")
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *arguments: 1 / 0)
    samplers, skipped = bench.contenders()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 300, generator=generator).bfloat16()
    report = bench.measure(samplers, HostClock(), logits, torch.tensor([0, 7, 299]), 2)
    assert report["shape"] == [3, 300] and report["failed"] == {"torch.compile": "ZeroDivisionError: division by zero"}
    ran = {item["contender"] for item in report["passes"]}
    assert ran == {bench.KERNEL, bench.KERNEL_INPLACE, bench.KERNEL_ALONE, "eager implementation", "torch eager"}
    assert all(len(item["samples_ms"]) == 2 and item["median_ms"] > 0 for item in report["passes"])
    bench.print_table([report], skipped)
    printed = capsys.readouterr().out
    assert printed.count("| forward |") == 5 and "torch.compile: ZeroDivisionError" in printed
    with pytest.raises(IndexError):  # a kernel of ours that fails is no missing contender
        bench.fitting({bench.KERNEL: lambda *arguments: [][0]}, HostClock(), logits, None)


@pytest.mark.slow
@needs_compiler
def test_every_contender_of_the_policy_loss_runs(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tool("bench_gpu_policy")
    monkeypatch.setattr(cov_select_cuda, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(bench, "captured", lambda work: work)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(bench, "TOKENS", (4096, 8192))
    results = [bench.measure(HostClock().time, tokens, 1) for tokens in bench.TOKENS]
    works = bench.contenders(bench.make_inputs(4096))
    _, sums, gradient = works[bench.LOSS_ALONE]()
    assert sums.shape == (6,) and gradient.ne(0).any()
    for name in (bench.LOSS, bench.BOTH, bench.GRAPH):
        assert torch.equal(works[name]()[0], gradient)
    assert works[bench.OFFICIAL]()[0].isfinite().all()
    assert [len(result["median_us"]) for result in results] == [6, 6]
    bench.print_table(results)
    assert [line.split(",")[0] for line in bench.targets(results)] == [
        "selection and policy_loss", "policy_loss kernel"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_contenders_of_the_training_step_compute_the_same(tmp_path: Path) -> None:
    report = tmp_path / "step.json"
    settings = ["--model", "tiny", "--rows", "3", "--length", "48", "--micro-batch-tokens", "96", "--steps", "1"]
    command = [sys.executable, "tools/bench_step.py", *settings, "--phases", "1", "--json", str(report)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())["results"]["tiny"]
    ours, *peers = result["contenders"].values()
    assert len(peers) == 2 and ours["mfu"] is None and ours["peak_gib"] is None  # no device
    for item in (ours, *peers):
        assert item["entropy"] == pytest.approx(ours["entropy"], rel=1e-5)
        assert item["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert item["tflops"] * 1e12 == pytest.approx(result["operations"] / item["seconds"])
        assert item["share_of_products"] == pytest.approx(item["tflops"] / result["products_tflops"])
    # 6 per weight of the layers and token, causal attention, and the head for the 16 sampled tokens of each row
    layer = 64 * (64 + 2 * 32 + 64) + 64 + 2 * 32 + 3 * 64 * 128 + 2 * 64
    attention = 3 * 2 * 2 * 64 * 48
    assert result["operations"] == 3 * 48 * (6 * (2 * layer + 64) + attention) + 6 * 3 * 16 * 512 * 64


def test_the_check_says_what_a_machine_lacks(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = tool("gpu_check")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in check.unfit_machine()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu130")
    assert "older than 2.11" in check.unfit_machine()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in check.unfit_machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "MODULES", ("pytest", "no_such_module_anywhere"))
    assert check.unfit_machine().startswith("no_such_module_anywhere cannot be imported")
    monkeypatch.setattr(check, "MODULES", ("pytest",))
    monkeypatch.setattr(check, "find_nvcc", lambda: None)
    monkeypatch.setattr(check, "LIBRARY", tmp_path / "_cuda.so")
    assert "nvcc was not found" in check.unfit_machine()
    (tmp_path / "_cuda.so").write_text("")
    assert check.unfit_machine() == ""


@pytest.mark.parametrize(("nvcc", "absent"), [("/usr/bin/nvcc", ""), (None, ""), (None, "megatron")])
def test_the_check_builds_anew_or_takes_the_library_as_it_is(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvcc: str | None, absent: str
) -> None:
    check = tool("gpu_check")
    library, runs = tmp_path / "_cuda.so", list[tuple[str, bool, dict[str, str] | None]]()
    library.write_text("")

    def run(name: str, arguments: list[str], variables: dict[str, str] | None = None) -> Any:
        assert all((REPOSITORY / item).exists() for item in arguments if item.startswith(("tools/", "tests/", "setup")))
        runs.append((name, library.exists(), variables))
        return check.Step(name, True, 1.0, "")

    for name, value in (
        ("unfit_machine", str), ("find_nvcc", lambda: nvcc), ("run", run), ("missing_of", lambda modules: absent)
    ):  # fmt: skip
        monkeypatch.setattr(check, name, value)
    monkeypatch.setattr(check, "LIBRARY", library)
    monkeypatch.setattr(check, "OUTPUT", tmp_path)
    assert check.main() == 0
    assert runs == [
        ("build", nvcc is None, {"SPEAR_CUDA": "0" if nvcc is None else "1"}),
        ("tests", nvcc is None, None),
        ("benchmark", nvcc is None, None),
        *([] if absent else [("training step", nvcc is None, None)]),
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on PATH")
def test_make_takes_python3_where_there_is_no_environment(tmp_path: Path) -> None:
    def command(*settings: str) -> str:
        outer = ("PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of a make that runs the tests
        variables = {name: value for name, value in os.environ.items() if name not in outer}
        made = subprocess.run(
            ["make", "-n", "gpu-check", *settings], cwd=REPOSITORY, env=variables, capture_output=True, text=True
        )
        return made.stdout.split()[0]

    assert command(f"VENV={tmp_path}") == "python3"
    assert command(f"VENV={tmp_path}", "PYTHON=/opt/python3.12") == "/opt/python3.12"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert command(f"VENV={tmp_path}") == f"{tmp_path}/bin/python"
