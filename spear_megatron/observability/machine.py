"""What this machine offers: versions, devices, optional parts with their install commands, room to work in."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from spear_megatron.device.optional import NO_DEVICE, TE_INSTALL, Part, apex, transformer_engine
from spear_megatron.observability.findings import Finding, Level

MEGATRON_VERSION = "0.16.1"
_GIB = 1024**3
_SERVER_ENVIRONMENT = ".venv-sglang"

_EXTRAS = {
    "tensorboard": ("tensorboard", "pip install tensorboard", "TensorBoard curves (trainer.logger)"),
    "matplotlib": ("matplotlib", "pip install matplotlib", "learning curves as PNG"),
    "math_verify": ("math-verify", "pip install math-verify", "answers beyond integers and strings"),
    "ray": ("ray", "pip install -e '.[ray]'", "servers and environment workers on several machines"),
    "nvidia.dali": ("DALI", "pip install -e '.[dali]'", "reading corpora (sft.data_source)"),
}


def diagnose_machine(probes: Mapping[str, Callable[[], Finding]], work_dir: str | Path = ".") -> list[Finding]:
    """Look at this machine.

    Args:
        probes: further checks by name, such as the compiled kernels and the sandbox backends. One that raises becomes
            an error finding.
        work_dir: folder whose disk space counts.
    """
    found = [
        _python(),
        *_torch(),
        _megatron(),
        _part(transformer_engine(), "the plain layers are used"),
        _part(apex(), "nothing here needs it"),
    ]
    for name, probe in probes.items():
        try:
            found.append(probe())
        except Exception as error:  # a broken part is what the doctor is here to report
            found.append(Finding("error", name, f"the check itself failed: {type(error).__name__}: {error}"))
    return [*found, _memory(), _cores(), _disk(Path(work_dir)), _sglang(Path(work_dir)), *_extras()]


def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing more than its parent packages."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):
        return Finding("error", "python", version, "use Python 3.11 or newer")
    return Finding("ok", "python", version)


def _torch() -> list[Finding]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return [Finding("error", "torch", f"cannot be imported: {error}", "run 'make setup'")]
    found = [Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        kinds = ", ".join(sorted(set(names)))
        found.append(Finding("ok", "CUDA", f"{torch.version.cuda}, {len(names)} devices: {kinds}"))
    elif torch.version.cuda is None:
        found.append(Finding("info", "CUDA", "this torch is built for CPU; training runs on CPU with gloo"))
    else:
        remedy = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        evidence = f"torch is built for CUDA {torch.version.cuda} but sees no device"
        found.append(Finding("warning", "CUDA", evidence, remedy))
    return found


def _megatron() -> Finding:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return Finding("error", "megatron-core", "not installed", f"pip install megatron-core=={MEGATRON_VERSION}")
    if version != MEGATRON_VERSION:
        remedy = f"pip install megatron-core=={MEGATRON_VERSION}"
        return Finding("warning", "megatron-core", f"{version}; tested with {MEGATRON_VERSION}", remedy)
    return Finding("ok", "megatron-core", version)


def _part(part: Part, unneeded: str) -> Finding:
    """An optional package: missing is worth knowing, installed and useless is probably wrong."""
    if not part.installed:
        return Finding("info", part.name, f"not installed; {unneeded}", part.remedy)
    if part.usable:
        evidence = "; ".join(filter(None, (part.version, part.reason))) or "installed"
        return Finding("warning" if part.reason else "ok", part.name, evidence, TE_INSTALL if part.reason else "")
    # A good package on a machine without a GPU is hidden from megatron-core and harms nobody.
    level: Level = "info" if part.reason == NO_DEVICE else "warning"
    return Finding(level, part.name, f"installed but not usable, and hidden: {part.reason}", part.remedy)


def _memory() -> Finding:
    psutil = importlib.import_module("psutil")
    memory = psutil.virtual_memory()
    evidence = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    if memory.available < 2 * _GIB:
        return Finding("warning", "memory", evidence, "close other programs, or use fewer ranks")
    return Finding("ok", "memory", evidence)


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    return Finding("ok", "cores", f"{usable} usable of {os.cpu_count()}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    evidence = f"{free / _GIB:.1f} GiB free at {folder.resolve()}"
    if free < 2 * _GIB:
        return Finding("warning", "disk", evidence, "make room, or put trainer.default_local_dir on another disk")
    return Finding("ok", "disk", evidence)


def _sglang(folder: Path) -> Finding:
    """SGLang may be installed here, or in an environment of its own, where launched servers find it."""
    if installed("sglang"):
        return Finding("ok", "sglang", f"{_version('sglang')}installed here: servers of the run's own")
    for metadata in sorted(folder.glob(f"{_SERVER_ENVIRONMENT}/lib/python3*/site-packages/sglang-*.dist-info")):
        version = metadata.name.removeprefix("sglang-").removesuffix(".dist-info")
        python = f"rollout.sglang.launch.python={_SERVER_ENVIRONMENT}/bin/python"
        return Finding("ok", "sglang", f"{version}, in an environment of its own: {python}")
    command = "pip install -e '.[sglang]' on GPU machines, 'make sglang-server' on others"
    return Finding("info", "sglang", "not installed: servers of the run's own", command)


def _version(distribution: str) -> str:
    try:
        return f"{importlib.metadata.version(distribution)}, "
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extras() -> list[Finding]:
    found = []
    for module, (name, command, purpose) in _EXTRAS.items():
        if installed(module):
            found.append(Finding("ok", name, f"{_version(name)}installed: {purpose}"))
        else:
            found.append(Finding("info", name, f"not installed: {purpose}", command))
    return found
