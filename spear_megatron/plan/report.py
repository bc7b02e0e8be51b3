"""Shows an assessment: text tables, JSON, a picture of stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spear_megatron.observability.files import named_errors
from spear_megatron.plan.assess import Assessment
from spear_megatron.plan.machine import GIB, Machine
from spear_megatron.plan.rank import total
from spear_megatron.plan.search import Proposals
from spear_megatron.plan.terms import Term

if TYPE_CHECKING:
    from rich.table import Table

TIMES = ("rollout", "old_log_prob", "ref", "update", "publish", "save")


def memory_table(found: Assessment, machine: Machine) -> Table:
    """GiB of every kind of rank in every phase."""
    from rich.table import Table

    table = Table(title=f"GPU memory in GiB, {found.layout.describe()} ({machine.gpu_bytes / GIB:.0f} GiB per GPU)")
    names = list(dict.fromkeys(name for phases in found.kinds.values() for name in phases))
    table.add_column("rank")
    for name in names:
        table.add_column(name, justify="right")
    for kind, phases in found.kinds.items():
        cells = [
            _gib(total(phases[name])) + ("!" if total(phases[name]) > machine.gpu_bytes else "")
            if name in phases
            else ""
            for name in names
        ]
        table.add_row(kind, *cells)
    return table


def terms_table(found: Assessment) -> Table:
    """Terms of the update on every kind of rank."""
    from rich.table import Table

    table = Table(title="Terms of the update in GiB")
    columns = {kind: by_label(phases["update"]) for kind, phases in found.kinds.items() if "update" in phases}
    labels = list(dict.fromkeys(label for terms in columns.values() for label in terms))
    table.add_column("term")
    for kind in columns:
        table.add_column(kind, justify="right")
    for label in labels:
        table.add_row(label, *(_gib(terms.get(label, 0)) for terms in columns.values()))
    return table


def host_table(found: Assessment, machine: Machine) -> Table:
    """Terms of the fullest node's memory."""
    from rich.table import Table

    table = Table(title=f"Memory of the fullest node in GiB ({machine.host_bytes / GIB:.0f} GiB per node)")
    table.add_column("term")
    table.add_column("GiB", justify="right")
    for label, size in by_label(found.host).items():
        table.add_row(label, _gib(size))
    table.add_row("total", _gib(total(found.host)))
    return table


def proposals_table(proposals: Proposals) -> Table:
    """The fastest layouts that fit."""
    from rich.table import Table

    what = "Fastest layouts that fit" if proposals.ranked else "None fits"
    table = Table(title=f"{what}, of {proposals.considered} layouts considered")
    for name in ("layout", "recompute", "micro-batch tokens", "fullest GPU GiB", "step s", "update s", "MFU"):
        table.add_column(name, justify="left" if name in ("layout", "recompute") else "right")
    for item in proposals.ranked:
        table.add_row(
            item.layout.describe(),
            item.layout.megatron.recompute_granularity or "none",
            f"{item.run.micro_batch_tokens:,}",
            _gib(training_peak(item)),
            f"{item.time.total:.0f}",
            f"{item.time.update:.0f}",
            f"{item.time.mfu:.2f}",
        )
    return table


def training_peak(found: Assessment) -> int:
    """Bytes of the fullest rank outside of the rollout, where the cache takes whatever is left."""
    return max(
        total(terms) for phases in found.kinds.values() for name, terms in phases.items() if name != "rollout"
    )


def time_lines(found: Assessment) -> list[str]:
    """The estimate of a step's time in words."""
    time = found.time
    parts = ", ".join(f"{name} {getattr(time, name):.1f}" for name in TIMES if getattr(time, name))
    return [
        f"estimated step {time.total:.1f} s: {parts}",
        f"update: model operations at {time.mfu:.2f} of peak, bubble {time.bubble:.1%}, tensor-parallel collectives "
        f"{time.tensor_parallel:.1f} s, data-parallel {time.data_parallel:.1f} s",
    ]


def assumption_lines(found: Assessment, machine: Machine) -> list[str]:
    """What the plan takes for granted."""
    run = found.run
    unit = "conversations" if run.engine.kind == "none" else "trajectories"
    lines = [
        f"{run.trajectories} {unit} of {run.mean_tokens} tokens on average (longest {run.max_tokens}), "
        f"{run.sampled_share:.0%} of them trained on, {run.replayed} replayed, {run.optimizer_steps} optimizer steps",
        f"{machine.peak_flops / 1e12:.0f} TFLOP/s per GPU at {machine.compute_efficiency:.0%}; decoding at "
        f"{machine.decode_efficiency:.0%} of {machine.memory_bandwidth / 1e12:.2f} TB/s; links at "
        f"{machine.link_efficiency:.0%} of {machine.nvlink_bandwidth / 1e9:.0f} GB/s within a node and "
        f"{machine.network_bandwidth / 1e9:.0f} GB/s between nodes",
        f"reserve {machine.reserve_bytes / GIB:.0f} GiB per GPU and {machine.fragmentation:.0%} of the activations; "
        f"layers: {run.spec.replace('_', ' ')}; Adam: {run.optimizer}",
    ]
    if run.engine.on_gpus:
        lines.append(
            f"engines: {run.engine.kind}, {run.engine.tp} GPUs each, cache for {found.cache_tokens:,} tokens per engine"
        )
    return lines


def as_json(found: Assessment, machine: Machine, proposals: Proposals | None) -> dict[str, Any]:
    """Everything as plain values; bytes and seconds."""
    return {
        "layout": _layout(found),
        "machine": asdict(machine),
        "fits": found.fits,
        "shortages": [asdict(item) | {"message": item.describe()} for item in found.shortages],
        "ranks": {
            kind: {name: by_label(terms) for name, terms in phases.items()} for kind, phases in found.kinds.items()
        },
        "host": by_label(found.host),
        "cache_tokens": found.cache_tokens,
        "time": asdict(found.time) | {"total": found.time.total},
        "assumptions": assumption_lines(found, machine),
        "proposals": [
            _layout(item) | {"step_s": item.time.total, "peak_bytes": training_peak(item), "mfu": item.time.mfu}
            for item in (proposals.ranked if proposals else ())
        ],
    }


def save_picture(found: Assessment, machine: Machine, path: Path) -> Path:
    """Stacked bars of every phase on every kind of rank, with the GPU's memory as a line; written as PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["tab20"]
    bars = [(kind, name, by_label(terms)) for kind, phases in found.kinds.items() for name, terms in phases.items()]
    labels = list(dict.fromkeys(label for _, _, terms in bars for label in terms))
    labels.sort(key=lambda label: label == "reserve")  # on top
    figure = Figure(figsize=(max(6.0, 0.42 * len(bars) + 3), 5.0), layout="constrained")
    axes = figure.add_subplot()
    bottoms = [0.0] * len(bars)
    for index, label in enumerate(labels):
        heights = [terms.get(label, 0) / GIB for _, _, terms in bars]
        axes.bar(range(len(bars)), heights, bottom=bottoms, label=label, color=colours(index))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if not found.run.on_host:
        axes.axhline(machine.gpu_bytes / GIB, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.08 * max(bottoms))
    axes.set_xticks(range(len(bars)), [f"{kind}: {name}" for kind, name, _ in bars], rotation=60, ha="right", size=7)
    axes.set_ylabel("GiB per rank")
    axes.set_title(f"{found.layout.describe()}, micro-batches of {found.run.micro_batch_tokens} tokens", size=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        figure.savefig(path, dpi=130)
    return path


def by_label(terms: Sequence[Term]) -> dict[str, int]:
    """Bytes by label, in order; terms of one label together, empty ones left out."""
    found: dict[str, int] = {}
    for term in terms:
        if term.nbytes:
            found[term.label] = found.get(term.label, 0) + term.nbytes
    return found


def _layout(found: Assessment) -> dict[str, Any]:
    megatron, layout = found.layout.megatron, found.layout
    return {
        "world_size": layout.world_size,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": megatron.context_parallel_size,
        "data_parallel_size": layout.dp,
        "sequence_parallel": megatron.sequence_parallel,
        "recompute_granularity": megatron.recompute_granularity,
        "micro_batch_tokens": found.run.micro_batch_tokens,
    }


def _gib(size: int) -> str:
    """GiB with digits that suit tiny models too."""
    value = size / GIB
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.3f}"
