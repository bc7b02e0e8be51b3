"""Transformer Engine and Apex: whether they can be used, why not, and how megatron-core is kept from broken ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

TE_MIN, TE_BELOW = (2, 9), (2, 12)
"""The versions of Transformer Engine that megatron-core 0.16.1 names."""
TE_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.9,<2.12'"
APEX_INSTALL = (
    "build NVIDIA's from its repository with the C++ and CUDA extensions; 'pip install apex' is another package"
)
UNRELATED = "not NVIDIA's: it has no apex.multi_tensor_apply (the apex of PyPI is an unrelated web toolkit)"
NO_DEVICE = "no CUDA device"
# What megatron-core imports without a guard once `import transformer_engine` succeeds.
_TE_MODULES = ("", ".pytorch", ".pytorch.fp8", ".pytorch.tensor", ".pytorch.optimizers")


@dataclass(frozen=True, slots=True)
class Part:
    """An optional package.

    Attributes:
        installed: something of that name can be imported. usable: it serves on this machine.
        version: '' if unknown. reason: why it is not usable, or what to know although it is; may be ''.
        remedy: what to do about ``reason``; '' if nothing.
    """

    name: str
    installed: bool
    usable: bool
    version: str = ""
    reason: str = ""
    remedy: str = ""


_hidden: dict[str, Part] = {}


def transformer_engine() -> Part:
    """Import Transformer Engine and say how that went.

    Without cuDNN its import raises RuntimeError, not ImportError. Modules of a failed import are forgotten, so that a
    later import fails in the same way instead of finding half of them.
    """
    name, module = "transformer-engine", "transformer_engine"
    if module in _hidden:
        return _hidden[module]
    if _find(module) is None:
        return Part(name, False, False, reason="not installed", remedy=TE_INSTALL)
    problem, version = _import_problem(), _version_of(name)
    if problem:
        remedy = "uninstall it on machines without a GPU, else rebuild it for this torch and CUDA"
        return Part(name, True, False, version, f"does not import: {problem}", remedy)
    numbers = _numbers(version)
    wanted = f"megatron-core 0.16.1 is made for {_dotted(TE_MIN)} and later, below {_dotted(TE_BELOW)}"
    if numbers and numbers < TE_MIN:
        return Part(name, True, False, version, f"version {version} is too old: {wanted}", TE_INSTALL)
    if not torch.cuda.is_available():
        return Part(name, True, False, version, NO_DEVICE)
    if numbers and numbers >= TE_BELOW:
        return Part(name, True, True, version, f"version {version} is newer than that: {wanted}")
    return Part(name, True, True, version)


def apex() -> Part:
    """Look at the installed ``apex`` without importing it: its namesake on PyPI has no ``multi_tensor_apply``."""
    if "apex" in _hidden:
        return _hidden["apex"]
    spec = _find("apex")
    if spec is None:
        return Part("apex", False, False, reason="not installed", remedy=APEX_INSTALL)
    if not _is_nvidia(spec):
        return Part("apex", True, False, reason=UNRELATED, remedy="pip uninstall apex")
    if not torch.cuda.is_available():
        return Part("apex", True, False, _version_of("apex"), NO_DEVICE)
    return Part("apex", True, True, _version_of("apex"))


def protect_megatron() -> None:
    """Hide a Transformer Engine or an Apex that cannot be used from the first import of megatron-core.

    megatron-core takes either as soon as its import does not raise ImportError: one without cuDNN or the namesake of
    Apex would end that import, a good one on a host without a GPU would put CUDA kernels on CPU tensors. Hidden means
    that importing it raises ModuleNotFoundError in this process from now on. Does nothing once megatron-core is there.
    """
    if "megatron.core" in sys.modules:
        return
    for module, probe in (("transformer_engine", transformer_engine), ("apex", apex)):
        if module in _hidden or _find(module) is None:
            continue
        if module == "transformer_engine" and not torch.cuda.is_available():
            # No need to wait for the import of several hundred megabytes.
            part = Part("transformer-engine", True, False, _version_of("transformer-engine"), NO_DEVICE)
        else:
            part = probe()
        if not part.usable:
            _hidden[module] = part
            _forget(module)
            sys.modules[module] = None  # type: ignore[assignment]  # Python's own way to make an import fail


def found(module: str) -> bool:
    """Whether ``module`` (a top-level name) can be found; nothing is imported."""
    return _find(module) is not None


def _find(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _import_problem() -> str:
    """Why Transformer Engine does not import, as ``ErrorType: first line``; '' if it does."""
    for part in _TE_MODULES:
        try:
            importlib.import_module(f"transformer_engine{part}")
        except (ImportError, RuntimeError, OSError, AssertionError, AttributeError) as error:
            _forget("transformer_engine")
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def _forget(module: str) -> None:
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        del sys.modules[name]


def _is_nvidia(spec: ModuleSpec) -> bool:
    folders = [Path(folder) / "multi_tensor_apply" for folder in spec.submodule_search_locations or ()]
    return any(folder.is_dir() or folder.with_suffix(".py").is_file() for folder in folders)


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(distribution.replace("-", "_"))
        return str(getattr(module, "__version__", ""))


def _numbers(version: str) -> tuple[int, int] | None:
    """(major, minor) of ``2.9.0+abc``; None for what does not read like that."""
    parts = version.split("+")[0].split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else None


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
