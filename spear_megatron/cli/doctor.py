"""``doctor [RUN_DIR]``: check this machine, or look for failure patterns in the record of a run."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.device.features import Feature
    from spear_megatron.observability.findings import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor`` to ``parser``."""
    parser.add_argument("run_dir", nargs="?", help="directory of a run; without it the machine is checked")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; the exit code is 1 if one of them is an error, else 0."""
    from spear_megatron.observability.findings import print_findings, worst_level

    findings = _machine() if args.run_dir is None else _run(args.run_dir)
    features = _features() if args.run_dir is None else []
    if args.json:
        import dataclasses
        import json

        found = (*findings, *map(_as_finding, features))
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        print_findings(findings)
        if features:
            _print_features(features)
        if not findings:
            print("no failure pattern found" + _too_early(args.run_dir))
    return 1 if worst_level(findings) == "error" else 0


def _run(run_dir: str) -> list[Finding]:
    from spear_megatron.observability.doctor import diagnose_run

    return diagnose_run(run_dir)


def _too_early(run_dir: str | None) -> str:
    """What most patterns still miss in a short record, or ''."""
    from spear_megatron.observability.record import read_record
    from spear_megatron.observability.trends import WINDOW

    steps = sum(line["step"] > 0 for line in read_record(run_dir)) if run_dir is not None else WINDOW
    return f" in {steps} steps; most patterns take {WINDOW} or more to tell" if steps < WINDOW else ""


def _machine() -> list[Finding]:
    from spear_megatron.observability.machine import diagnose_machine

    return diagnose_machine(
        {
            "compiled kernels": _kernels,
            "autograd functions": _autograd,
            "CUDA kernels": _cuda_kernels,
            "code sandbox": _sandbox,
        }
    )


def _features() -> list[Feature]:
    from spear_megatron.device.features import probe_features

    return list(probe_features().values())


def _as_finding(feature: Feature) -> Finding:
    """ok where the feature is available, info where it is not."""
    from spear_megatron.observability.findings import Finding

    return Finding(
        "ok" if feature.available else "info",
        feature.name,
        f"{feature.turns_on}: {'available' if feature.available else 'not available'}, {feature.reason}",
        "" if feature.available else feature.remedy,
        (feature.key,) if feature.key else (),
    )


def _print_features(features: list[Feature]) -> None:
    """Feature, whether it is there and why not, what turns it on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What can make training faster")
    for name in ("feature", "state", "reason", "turned on by"):
        table.add_column(name, overflow="fold")
    for feature in features:
        unasked = "itself, where it is there" if feature.available or feature.remedy else "nothing"
        key = feature.key.removeprefix("actor_rollout_ref.actor.") or unasked
        state = "available" if feature.available else "no"
        table.add_row(f"{feature.name}\n  {feature.turns_on}", state, feature.reason, key)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _kernels() -> Finding:
    from spear_megatron.kernels import available
    from spear_megatron.observability.findings import Finding

    state = available()
    if not state["compiled"]:
        return Finding("warning", "compiled kernels", "not usable, slower eager torch stands in", state["reason"])
    return Finding("ok", "compiled kernels", f"loaded, instruction set {state['isa']}")


def _autograd() -> Finding:
    from spear_megatron.kernels import available
    from spear_megatron.observability.findings import Finding

    if reason := available()["autograd_reason"]:
        said = "in Python, which takes a tenth of a millisecond more per micro-batch"
        return Finding("info", "autograd functions", said, reason)
    return Finding("ok", "autograd functions", "compiled for this torch, loaded")


def _cuda_kernels() -> Finding:
    import torch

    from spear_megatron.kernels import available
    from spear_megatron.observability.findings import Finding, Level

    state = available()
    if not state["cuda_reason"]:
        return Finding("ok", "CUDA kernels", "compiled, loaded")
    # Without a device nothing is slower for their absence.
    level: Level = "warning" if torch.cuda.is_available() else "info"
    return Finding(level, "CUDA kernels", "not usable, eager torch stands in on CUDA devices", state["cuda_reason"])


def _sandbox() -> Finding:
    from spear_megatron.environments.sandbox import probe
    from spear_megatron.observability.findings import Finding

    backends = probe()
    works = [item.backend for item in backends if item.available]
    fails = "; ".join(f"{item.backend} does not work: {item.reason}" for item in backends if not item.available)
    if not works:
        remedy = "allow unprivileged user namespaces or Landlock, or set env.sandbox.backend=remote and env.sandbox.url"
        return Finding("error", "code sandbox", fails, remedy, ("env.sandbox.backend", "env.sandbox.url"))
    evidence = f"{' and '.join(works)} work{'s' if len(works) == 1 else ''}"
    return Finding("ok", "code sandbox", f"{evidence}; {fails}" if fails else evidence)
