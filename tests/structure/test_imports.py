"""Imports go one way through the packages, and the light modules need no heavy dependency."""

from __future__ import annotations

import subprocess
import sys

import pytest
from source import SourceFile, imported_modules, source_files

# A package imports only from itself and from packages before it.
ORDER = (
    "types", "device", "parallel", "kernels", "observability", "algorithms", "rewards", "environments", "data",
    "model", "rollout", "replay", "weights", "checkpoint", "evaluation", "plan", "trainer", "testing", "config", "cli",
    "__main__",
)  # fmt: skip
# What stands outside the order: the protocols that rewards implement.
ALLOWED = {"rewards": {"spear_megatron.environments.protocol"}}
PURE = {"algorithms": {"types", "kernels"}, "rewards": {"types", "environments"}}
HEAVY = (
    "ray", "sglang", "transformer_engine", "nvidia", "apex", "transformers", "megatron", "tensorboard", "matplotlib",
    "alfworld", "textworld", "wandb",
)  # fmt: skip


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def own_imports(file: SourceFile) -> set[str]:
    modules = {name for name in imported_modules(file) if name.startswith("spear_megatron.")}
    return {name for name in modules if package_of(name) in ORDER}


@pytest.mark.parametrize("file", source_files(), ids=lambda file: file.name)
def test_imports_go_one_way(file: SourceFile) -> None:
    package = package_of(file.module)
    if not package:
        assert own_imports(file) == set()
        return
    assert package in ORDER, f"{file.name}: the package {package} has no place in the order"
    allowed = ALLOWED.get(package, set())
    wrong = {
        name
        for name in own_imports(file)
        if ORDER.index(package_of(name)) > ORDER.index(package) and not any(name.startswith(top) for top in allowed)
    }
    assert wrong == set(), f"{file.name} imports from packages that stand after {package}"


@pytest.mark.parametrize("package", PURE)
def test_pure_packages_stay_pure(package: str) -> None:
    for file in source_files():
        if package_of(file.module) == package:
            used = {package_of(name) for name in own_imports(file)} - {package}
            assert used <= PURE[package], f"{file.name} uses {used - PURE[package]}"


def run_blocked(code: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where importing any of ``blocked`` fails."""
    prelude = (
        "import sys\n"
        f"blocked = {blocked!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=300)


def test_the_package_itself_needs_nothing() -> None:
    blocked = (*HEAVY, "torch", "omegaconf", "numpy", "rich")
    done = run_blocked("import spear_megatron, spear_megatron.__main__", blocked)
    assert done.returncode == 0, done.stderr


# Required dependencies, which modules that are nothing without them import at their top.
REQUIRED = {"megatron", "transformers"}


def test_every_module_imports_without_the_optional_parts() -> None:
    modules = [file.module for file in source_files() if not file.module.endswith("__main__")]
    code = (
        "import importlib, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = run_blocked(code, tuple(name for name in HEAVY if name not in REQUIRED))
    assert done.returncode == 0, done.stderr


def test_light_packages_import_without_any_heavy_part() -> None:
    light = "types parallel observability algorithms environments data config rewards evaluation".split()
    modules = [file.module for file in source_files() if package_of(file.module) in light]
    code = f"import importlib\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    done = run_blocked(code, HEAVY)
    assert done.returncode == 0, done.stderr
