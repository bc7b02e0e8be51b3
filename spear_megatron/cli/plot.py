"""``plot RUN_DIR...``: success, reward, entropy, schedules, replay and covariance selection of runs over the steps."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plot`` to ``parser``."""
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR",
        help="directories of runs; NAME/seed_3 or NAME-s3 and other seeds of NAME form one curve",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE.png", help="where to draw; RUN_DIR/plot.png of the first run if absent")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average over the last N steps")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME",
        help="name of a curve, once for each RUN_DIR and in their order; runs of one name form one curve",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="heading of the picture")
    parser.add_argument("--text", action="store_true", help="print to the terminal; draws only with --out")


def run(args: argparse.Namespace) -> int:
    """Draw or print the panels for which the runs have data."""
    from pathlib import Path

    from spear_megatron.observability.arms import load_arms
    from spear_megatron.observability.draw import panels_text, save_panels
    from spear_megatron.observability.panels import build_panels

    if args.smooth < 1:
        raise ValueError(f"--smooth averages over at least 1 step, got {args.smooth}")
    if args.out is not None and Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"--out writes PNG files, got {args.out}: give a name that ends in .png")
    arms = load_arms(args.run_dirs, args.label)
    panels = build_panels(arms, args.smooth)
    if args.text:
        print(panels_text(panels, arms))
    if args.out is not None or not args.text:
        path = save_panels(panels, arms, args.out or Path(args.run_dirs[0]) / "plot.png", args.title, args.smooth)
        print(f"{len(panels)} panels of {len(arms)} curve{'s' if len(arms) > 1 else ''}: {path}")
    return 0
