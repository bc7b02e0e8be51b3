"""Evaluate one model on AIME 2024 and 2025: 32 samples per problem, temperature 1.0, top_p 0.6, one report.

    python tools/evaluate_aime.py --model MODEL --aime-2024 SOURCE --aime-2025 SOURCE --out DIR [key=value ...]

A SOURCE is what ``prepare`` takes: a JSONL, JSON or parquet file, a folder of them, or a data set of the hub, in the
form of Maxwell-Jia/AIME_2024, of yentinglin/aime_2025, or of this project's task files (id, problem, answer). Without
any, outputs/data/aime-2024.jsonl and aime-2025.jsonl are taken. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spear_megatron.__main__ import complain, main as spear_megatron
from spear_megatron.data.prepare import prepare_dataset
from spear_megatron.parallel.paths import os_error_text

ROOT = Path(__file__).resolve().parent.parent
YEARS = ("2024", "2025")
NUM_PROBLEMS = 30


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    for year in YEARS:
        parser.add_argument(f"--aime-{year}", metavar="SOURCE", help=f"the problems of {year}")
    parser.add_argument("--out", type=Path, default=Path("outputs/aime"), help="folder of samples and reports")
    parser.add_argument("--config", default=str(ROOT / "configs" / "evaluate_aime.yaml"), help="limits and tools")
    parser.add_argument("--n", type=int, default=32, help="samples per problem (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=0.6, help="default: %(default)s")
    parser.add_argument("--engine", help="embedded, sglang or openai, as for evaluate")
    parser.add_argument("--server", action="append", default=[], metavar="URL", help="as for evaluate")
    parser.add_argument("--served-model", metavar="NAME", help="as for evaluate")
    parser.add_argument("--api-key-env", metavar="VAR", help="as for evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one key of the configuration")
    return parser.parse_args(argv)


def task_files(args: argparse.Namespace) -> list[Path]:
    """Task files of the years that are asked for, written below ``--out`` from whatever form they have.

    Raises:
        ValueError: a source cannot be read, or is another data set.
    """
    given = {year: getattr(args, f"aime_{year}") for year in YEARS}
    if not any(given.values()):
        given = {year: f"outputs/data/aime-{year}.jsonl" for year in YEARS}
    files = []
    for year, source in given.items():
        if source is None:
            continue
        try:
            manifest = prepare_dataset(f"aime-{year}", source, args.out / "data")
        except ValueError as error:
            raise ValueError(f"--aime-{year}={source}: {error}") from error
        files.append(args.out / "data" / manifest.output.name)
        note = "" if manifest.rows_written == NUM_PROBLEMS else f" (an AIME year has {NUM_PROBLEMS})"
        print(f"AIME {year}: {manifest.rows_written} problems from {manifest.source}{note}", flush=True)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data and run ``evaluate`` on it."""
    args = parse(argv)
    try:
        files = task_files(args)
    except (ValueError, OSError) as error:
        told = os_error_text(error) if isinstance(error, OSError) else None
        return complain(f"error: {told or error}", 2)
    command = ["evaluate", "--config", args.config, "--model", args.model, "--out", str(args.out), "--n", str(args.n)]
    command += ["--temperature", str(args.temperature), "--top-p", str(args.top_p)]
    for path in files:
        command += ["--dataset", str(path)]
    for url in args.server:
        command += ["--server", url]
    for name in ("engine", "served_model", "api_key_env"):
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", getattr(args, name)]
    return spear_megatron([*command, *args.overrides])


if __name__ == "__main__":
    sys.exit(main())
