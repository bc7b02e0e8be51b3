"""``view RUN_DIR``: show the trajectories that a run kept."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``view`` to ``parser``."""
    parser.add_argument("run_dir", help="directory of the run (trainer.default_local_dir)")
    parser.add_argument("--step", type=int, help="training step to show; the newest one if not given")
    parser.add_argument("--kind", choices=("train", "val"), default="train", help="from training or from evaluation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", help="one trajectory: step-task-sample")
    which.add_argument("--best", action="store_true", help="the trajectory of largest reward (the default)")
    which.add_argument("--worst", action="store_true", help="the trajectory of smallest reward")
    which.add_argument(
        "--lineage", nargs="?", const="", metavar="ID",
        help="what became of one trajectory (step-task-sample) in the replay buffer; without ID the most replayed ones",
    )  # fmt: skip
    which.add_argument("--all", action="store_true", help="every trajectory kept of the step")
    parser.add_argument("--tokens", action="store_true", help="verbatim text, coloured by the loss mask")


def run(args: argparse.Namespace) -> int:
    """Print a table of the step's trajectories and then those asked for."""
    from rich.console import Console

    from spear_megatron.observability import view
    from spear_megatron.observability.trajectories import read_trajectories
    from spear_megatron.parallel.paths import check_input_folder

    check_input_folder(args.run_dir, "give the directory of a run")
    console = Console(highlight=False)
    if args.lineage is not None:
        from spear_megatron.observability import lineage_view

        if args.lineage:
            lineage_view.show_lineage(console, args.run_dir, view.parse_id(args.lineage, "--lineage"))
        else:
            lineage_view.show_most_replayed(console, args.run_dir)
        return 0
    if args.id is not None:
        view.show(console, view.find(args.run_dir, view.parse_id(args.id), args.kind), args.tokens)
        return 0
    step = view.last_step(args.run_dir, args.kind) if args.step is None else args.step
    kept = read_trajectories(args.run_dir, step, args.kind)
    view.show_step(console, kept, f"{args.run_dir}: step {step}, {args.kind}")
    for item in kept if args.all else [view.pick(kept, "worst" if args.worst else "best")]:
        console.rule()
        view.show(console, item, args.tokens)
    return 0
