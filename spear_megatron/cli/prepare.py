"""``prepare``: a published data set as the files that ``train``, ``evaluate`` and ``sft`` read."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prepare`` to ``parser``."""
    names = "dapo-math-17k, aime-2024, aime-2025 or retool-sft"
    parser.add_argument("--dataset", required=True, metavar="NAME", help=names)
    source = "a .parquet, .jsonl or .json file, a folder of such files, or a data set of the hub as owner/name"
    parser.add_argument("--source", required=True, metavar="SOURCE", help=source)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a data set of the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of NAME.jsonl and its manifest")


def run(args: argparse.Namespace) -> int:
    """Write the data and its manifest, and say what was left out."""
    from spear_megatron.data.prepare import prepare_dataset

    manifest = prepare_dataset(args.dataset, args.source, args.out, revision=args.revision)
    print(f"wrote {args.out / manifest.output.name}: {manifest.rows_written} of {manifest.rows_read} rows")
    for reason, count in manifest.dropped.items():
        print(f"  left out: {count} {reason}, such as {manifest.examples[reason][0]}")
    return 0
