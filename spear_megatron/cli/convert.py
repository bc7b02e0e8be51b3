"""``convert``: between Hugging Face folders and Megatron checkpoints. Training needs no conversion: it reads both."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two directions and their options to ``parser``."""
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    to_mcore = directions.add_parser("hf-to-mcore", help="Hugging Face folder -> Megatron checkpoint")
    to_mcore.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder in Hugging Face format")
    to_mcore.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the checkpoint")
    to_mcore.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size to check and record")
    to_mcore.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallel size to check and record")
    to_hf = directions.add_parser("mcore-to-hf", help="Megatron checkpoint -> Hugging Face folder")
    source = "a step folder, a folder of checkpoints, or a run directory"
    to_hf.add_argument("--mcore", type=Path, required=True, metavar="DIR", help=source)
    to_hf.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from spear_megatron.checkpoint.convert import hf_to_mcore, mcore_to_hf

    if args.direction == "hf-to-mcore":
        print(f"wrote {hf_to_mcore(args.hf, args.out, tp=args.tp, pp=args.pp)}")
    else:
        print(f"wrote {args.out} from {mcore_to_hf(args.mcore, args.out)}")
    return 0
