"""The machine's diagnosis: versions, probes that fail, optional parts, broken or unrelated packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spear_megatron.__main__ import main
from spear_megatron.observability.findings import Finding, worst_level
from spear_megatron.observability.machine import MEGATRON_VERSION, diagnose_machine, installed


def package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def findings(**probes: Finding) -> dict[str, Finding]:
    checks = {name: lambda item=item: item for name, item in probes.items()}
    return {item.name: item for item in diagnose_machine(checks)}


@pytest.fixture()
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "transformer_engine"):
            del sys.modules[name]


def test_the_tested_environment_is_fine() -> None:
    found = findings()
    for name in ("python", "torch", "megatron-core", "cores"):
        assert found[name].level == "ok", found[name]
    assert MEGATRON_VERSION in found["megatron-core"].evidence
    assert worst_level(list(found.values())) != "error"
    assert all(item.remedy for item in found.values() if item.level in ("warning", "error"))


def test_probes_are_shown_and_one_that_raises_is_an_error() -> None:
    def broken() -> Finding:
        raise OSError("no such device")

    checks = {"good": lambda: Finding("ok", "good", "yes"), "bad": broken}
    found = {item.name: item for item in diagnose_machine(checks)}
    assert found["good"].evidence == "yes"
    assert found["bad"].level == "error" and "OSError: no such device" in found["bad"].evidence


@pytest.mark.skipif(installed("transformer_engine"), reason="a real transformer-engine is installed")
def test_transformer_engine_that_cannot_be_imported(packages: Path) -> None:
    package(packages, "transformer_engine", "")
    (packages / "transformer_engine" / "pytorch.py").write_text("raise RuntimeError('cudnn shared object not found')")
    finding = findings()["transformer-engine"]
    assert finding.level == "warning" and "RuntimeError: cudnn shared object not found" in finding.evidence


@pytest.mark.parametrize(("nvidia", "level"), [(True, "info"), (False, "warning")])
@pytest.mark.skipif(installed("apex"), reason="an apex is installed")
def test_apex_is_told_from_its_namesake(packages: Path, nvidia: bool, level: str) -> None:
    package(packages, "apex", "" if nvidia else "import no_such_web_framework")
    if nvidia:
        package(packages / "apex", "multi_tensor_apply", "")
    if torch.cuda.is_available() and nvidia:
        level = "ok"
    assert findings()["apex"].level == level


@pytest.mark.skipif(installed("sglang"), reason="SGLang is installed beside the trainer")
def test_sglang_is_found_in_an_environment_of_its_own(tmp_path: Path) -> None:
    def finding() -> Finding:
        return next(item for item in diagnose_machine({}, tmp_path) if item.name == "sglang")

    assert finding().level == "info" and "make sglang-server" in finding().remedy
    (tmp_path / ".venv-sglang/lib/python3.11/site-packages/sglang-0.5.21.dist-info").mkdir(parents=True)
    assert finding().level == "ok" and finding().evidence.startswith("0.5.21, in an environment of its own")
    assert "launch.python=.venv-sglang/bin/python" in finding().evidence


def test_missing_parts_come_with_an_install_command() -> None:
    assert not installed("no_such_module") and not installed("no_such_package.part") and installed("json")
    for item in findings().values():
        if item.evidence.startswith("not installed:"):
            assert item.level == "info" and item.remedy.startswith("pip install")


def test_the_doctor_prints_what_can_make_training_faster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) in (0, 1)
    shown = capsys.readouterr().out
    for text in ("turned on by", "fused weight", "megatron.overlap_grad_reduce", "FP8, delayed", "CUDA graphs"):
        assert text in shown


def test_doctor_command(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if any(item["level"] == "error" for item in found) else 0)
    assert {"python", "torch", "megatron-core", "compiled kernels", "code sandbox"} <= {item["name"] for item in found}
