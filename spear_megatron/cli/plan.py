"""``plan``: memory of every kind of rank, time of a step, and the layouts that suit the model and the cluster."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from spear_megatron.cli.common import add_config_arguments, load_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from spear_megatron.config.schema import Config
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.plan.assess import Assessment
    from spear_megatron.plan.machine import Machine
    from spear_megatron.plan.search import Proposals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan`` to ``parser``."""
    add_config_arguments(parser, dry_run=False)
    parser.add_argument(
        "--stage", choices=("train", "sft"), default="train", help="which command of the configuration to plan"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the trainer (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument("--gpu-memory-gb", type=float, default=80.0, help="GiB of one GPU (default: 80)")
    parser.add_argument("--host-memory-gb", type=float, default=1024.0, help="GiB of one node (default: 1024)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of a GPU (default: 989)")
    parser.add_argument("--compute-efficiency", type=float, default=0.5, help="share of it that training reaches")
    parser.add_argument(
        "--layers", choices=("plain", "transformer_engine"), default="plain",
        help="which layers and Adam to count (default: plain, which takes more memory)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("colocated", "separate", "embedded"), default="colocated",
        help="where tokens are generated: on the trainer's GPUs, on nodes of their own, or in process on the host",
    )  # fmt: skip
    parser.add_argument("--engine-tp", type=int, default=4, help="GPUs of one engine (default: 4)")
    parser.add_argument("--engine-nodes", type=int, default=0, help="further nodes for separate engines")
    parser.add_argument("--engine-keeps-memory", action="store_true", help="a colocated engine never frees its memory")
    parser.add_argument("--mean-tokens", type=int, help="of a trajectory; default: half of the longest")
    parser.add_argument("--sampled-share", type=float, default=0.7, help="of a trajectory's tokens (default: 0.7)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to propose; 0 does not search")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the memory of every rank and phase")


def run(args: argparse.Namespace) -> int:
    """Print the plan of the configured layout and the proposals; fails when the configured layout does not fit.

    Raises:
        ValueError: options or configuration are wrong; where another layout could run, proposals are printed first.
        RunError: the configured layout lacks memory.
    """
    from pathlib import Path

    from spear_megatron.parallel.errors import RunError
    from spear_megatron.plan.report import save_picture

    if args.picture is not None and Path(args.picture).suffix.lower() != ".png":
        raise ValueError(f"--picture writes PNG files, got {args.picture}: give a name that ends in .png")
    if args.top < 0:
        raise ValueError(f"--top must not be negative, got {args.top}")
    found, machine, proposals = _plan(args)
    _print(found, machine, proposals)
    if args.json is not None:
        _write_json(Path(args.json), found, machine, proposals)
    if args.picture is not None:
        print(f"picture: {save_picture(found, machine, Path(args.picture))}")
    if found.shortages:
        raise RunError(f"the plan does not fit: {found.shortages[0].describe()}")
    return 0


def _plan(args: argparse.Namespace) -> tuple[Assessment, Machine, Proposals | None]:
    from spear_megatron.cli.planning import planned_run
    from spear_megatron.cli.sft import as_supervised
    from spear_megatron.config.checks import check_config
    from spear_megatron.model.shape import ModelShape
    from spear_megatron.plan.assess import assess
    from spear_megatron.plan.layout import Layout
    from spear_megatron.plan.machine import GIB, Machine
    from spear_megatron.plan.report import proposals_table
    from spear_megatron.plan.run import EnginePlan
    from spear_megatron.plan.search import propose

    config = load_config(args)
    path = config.actor_rollout_ref.model.path
    if not path:
        raise ValueError("actor_rollout_ref.model.path is not set: give a folder with the model's config.json")
    shape = ModelShape.from_folder(path)
    machine = Machine(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu_bytes=int(args.gpu_memory_gb * GIB),
        host_bytes=int(args.host_memory_gb * GIB),
        peak_flops=args.peak_tflops * 1e12,
        compute_efficiency=args.compute_efficiency,
    )
    supervised = args.stage == "sft"
    config = as_supervised(config) if supervised else config
    engine = EnginePlan(
        kind="none" if supervised else args.engine,
        tp=args.engine_tp,
        nodes=0 if supervised else args.engine_nodes,
        sleeps=not args.engine_keeps_memory,
        max_num_seqs=config.actor_rollout_ref.rollout.max_num_seqs,
    )
    refused = None
    try:
        check_config(config, shape, world_size=machine.num_gpus)
    except ValueError as error:
        if not (args.top and _only_the_layout_is_wrong(config, shape, machine)):
            raise
        refused = error
    planned = planned_run(
        config,
        shape,
        engine,
        transformer_engine=args.layers == "transformer_engine",
        mean_tokens=args.mean_tokens,
        sampled_share=args.sampled_share,
        supervised=supervised,
    )
    proposals = propose(planned, machine, machine.num_gpus, keep=args.top) if args.top else None
    if refused is not None:
        assert proposals is not None
        _print_tables([proposals_table(proposals)])
        raise refused
    layout = Layout(megatron=config.actor_rollout_ref.actor.megatron, world_size=machine.num_gpus)
    return assess(planned, layout, machine), machine, proposals


def _only_the_layout_is_wrong(config: Config, shape: ModelShape, machine: Machine) -> bool:
    """Whether a configuration that was refused could run in another layout."""
    from dataclasses import replace

    from spear_megatron.config.checks import check_config
    from spear_megatron.parallel.config import MegatronConfig

    ref = config.actor_rollout_ref
    ref = replace(ref, actor=replace(ref.actor, megatron=MegatronConfig()))
    try:
        check_config(replace(config, actor_rollout_ref=ref), shape, world_size=machine.num_gpus)
    except ValueError:
        return False
    return True


def _print(found: Assessment, machine: Machine, proposals: Proposals | None) -> None:
    from spear_megatron.plan.report import (
        assumption_lines,
        host_table,
        memory_table,
        proposals_table,
        terms_table,
        time_lines,
    )

    tables = [memory_table(found, machine), terms_table(found), host_table(found, machine)]
    if proposals is not None:
        tables.append(proposals_table(proposals))
    console = _print_tables(tables)
    for line in (*time_lines(found), *(f"assumed: {line}" for line in assumption_lines(found, machine))):
        console.print(line)
    for shortage in found.shortages:
        console.print(f"does not fit: {shortage.describe()}")


def _print_tables(tables: Sequence[Table]) -> Console:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)
    return console


def _write_json(path: Path, found: Assessment, machine: Machine, proposals: Proposals | None) -> None:
    import json

    from spear_megatron.observability.files import write_atomically
    from spear_megatron.plan.report import as_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(as_json(found, machine, proposals), indent=1) + "\n").encode())
    print(f"plan: {path}")
