"""``convert``: between Hugging Face folders and Megatron checkpoints. Training needs no conversion: it reads both."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two directions, the comparison and their options to ``parser``."""
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    to_mcore = directions.add_parser("hf-to-mcore", help="Hugging Face folder -> Megatron checkpoint")
    to_mcore.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder in Hugging Face format")
    to_mcore.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the checkpoint")
    to_mcore.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size to check and record")
    to_mcore.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallel size to check and record")
    to_hf = directions.add_parser("mcore-to-hf", help="Megatron checkpoint -> Hugging Face folder")
    source = "a step folder, a folder of checkpoints, a run directory, or a checkpoint of Megatron-LM (torch_dist)"
    to_hf.add_argument("--mcore", type=Path, required=True, metavar="DIR", help=source)
    to_hf.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the model")
    for direction in (to_mcore, to_hf):
        direction.add_argument(
            "--shard-size", type=parse_size, default="1GB", metavar="SIZE", help="size of the files written (1GB)"
        )
    verify = directions.add_parser("verify", help="compare a Hugging Face folder and a checkpoint, tensor by tensor")
    verify.add_argument("--hf", type=Path, required=True, metavar="DIR", help="model folder in Hugging Face format")
    without = "; without it the folder is compared with its own model.checksums.json"
    verify.add_argument("--mcore", type=Path, metavar="DIR", help=source + without)
    to_hf.add_argument(
        "--hf-config", type=Path, metavar="DIR", help="config.json and tokenizer, if the checkpoint brings none"
    )


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from spear_megatron.checkpoint.convert import hf_to_mcore, mcore_to_hf, verify
    from spear_megatron.parallel.paths import check_output_folder

    if args.direction != "verify":
        check_output_folder(args.out, "--out")
    if args.direction == "hf-to-mcore":
        step = hf_to_mcore(args.hf, args.out, tp=args.tp, pp=args.pp, shard_bytes=args.shard_size, say=_say)
        done = f"wrote {step}"
    elif args.direction == "mcore-to-hf":
        folder = mcore_to_hf(args.mcore, args.out, hf_config=args.hf_config, shard_bytes=args.shard_size, say=_say)
        done = f"wrote {args.out} from {folder}"
    else:
        count = verify(args.hf, args.mcore, say=_say)
        done = f"{count} tensors are equal"
    if _is_first_rank():
        _say(done)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``500MB`` (ArgumentTypeError for anything else)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number of bytes, or one with KB, MB or GB")
    return int(match[1]) * _UNITS[match[2] or ""]
