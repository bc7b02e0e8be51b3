"""The planner's prediction against live tensor bytes on the CPU: a tiny and a 100M-parameter model, several layouts.

    python tools/plan_error.py                       # exit status 1 when a phase is off by more than 10 %
    python tools/plan_error.py --models tiny         # seconds instead of minutes
    python tools/plan_error.py --markdown FILE.md    # also write the table as Markdown

Every rank counts the bytes of all storages that are alive (``plan.measure.LiveBytes``) and takes the peak of each phase
of its second training step. Sizes do not depend on the speed of the machine. Shown are the largest measured peak of a
phase over the ranks, the prediction for that rank, and the error that is largest over all ranks. For the 100M model a
second run, in processes that did nothing before, compares the resident memory above what there was before the model
was built (``process``): beside tensors it holds the allocator's losses, buffers inside of operations and libraries, and
it lacks pages that nobody wrote to.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "dist")]

TOLERANCE = 0.10
MIB = 1 << 20
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "num_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 384, "vocab_size": 2000, "tie_word_embeddings": False,
    },
    "100M": {
        "hidden_size": 640, "num_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 1920, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 1024,
    },
}  # fmt: skip
PROCESS_MODELS = ("100M",)  # of smaller ones the libraries take more than the tensors
LENGTHS = {"tiny": 129, "100M": 257}


def cases(model: str) -> list[Any]:
    """The layouts that are measured."""
    from plan_measure import Case

    sizes = {"length": LENGTHS[model], "rows": 4}
    return [
        Case("1 rank", **sizes),
        Case("1 rank, bf16", bf16=True, **sizes),
        Case("1 rank, full recomputation", recompute=True, **sizes),
        Case("TP2", world_size=2, tp=2, **sizes),
        Case("TP2 SP", world_size=2, tp=2, sequence_parallel=True, **sizes),
        Case("PP2", world_size=2, pp=2, **sizes),
        Case("DP2, distributed optimizer", world_size=2, **sizes),
        Case("CP2", world_size=2, cp=2, **sizes),
    ]


def compare(folder: str, model: str, case: Any, *, process: bool = False) -> list[list[str]]:
    """Rows of the table of one layout: live tensor bytes, or with ``process`` the resident memory."""
    from harness import Pool, run_ranks
    from plan_measure import measure_on_rank, measure_process_on_rank, predict

    if process:
        with contextlib.closing(Pool()) as fresh:
            measured = fresh.run(measure_process_on_rank, case.world_size, (folder, case), 1800.0)
    else:
        measured = run_ranks(measure_on_rank, case.world_size, folder, case, deadline_s=1800.0)
    predicted = [
        {phase: sum(size for _, size in terms) for phase, terms in predict(folder, case, rank, process=process).items()}
        for rank in range(case.world_size)
    ]
    rows = []
    for phase in measured[0]:
        fullest = max(range(case.world_size), key=lambda rank: measured[rank][phase])
        errors = [predicted[rank][phase] / measured[rank][phase] - 1 for rank in range(case.world_size)]
        worst = max(errors, key=abs)
        sizes = [f"{found[fullest][phase] / MIB:.1f}" for found in (measured, predicted)]
        rows.append([f"{model} process" if process else model, case.name, phase, *sizes, f"{worst:+.1%}"])
    return rows


def markdown(table: list[list[str]]) -> str:
    """One line per layout, a column per phase: measured MiB and the error."""
    phases = list(dict.fromkeys(row[2] for row in table))
    lines = ["| model | layout | " + " | ".join(phases) + " |", "| --- | --- |" + " ---: |" * len(phases)]
    for model, layout in dict.fromkeys((row[0], row[1]) for row in table):
        cells = {row[2]: f"{row[3]} ({row[5]})" for row in table if row[:2] == [model, layout]}
        lines.append(f"| {model} | {layout} | " + " | ".join(cells[phase] for phase in phases) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and tell whether every phase is within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="only these, by their names in the table")
    parser.add_argument("--markdown", metavar="FILE.md", help="write the table as Markdown")
    args = parser.parse_args()
    known = [case.name for model in args.models for case in cases(model)]
    unknown = sorted(set(args.layouts or ()) - set(known))
    if unknown:
        parser.error(f"--layouts {', '.join(unknown)}: the table has {', '.join(dict.fromkeys(known))}")
    from tiny import make_tiny_hf

    header = ["model", "layout", "phase", "measured MiB", "predicted MiB", "worst error"]
    table: list[list[str]] = []
    print("  ".join(header), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for model in args.models:
            folder = str(make_tiny_hf(Path(directory) / model, "qwen3", std=0.02, **MODELS[model]))
            for case in cases(model):
                if args.layouts and case.name not in args.layouts:
                    continue
                rows = compare(folder, model, case)
                if model in PROCESS_MODELS:
                    rows += compare(folder, model, case, process=True)
                table += rows
                for row in rows:
                    print("  ".join(row), flush=True)
    if args.markdown is not None:
        Path(args.markdown).write_text(markdown(table), encoding="utf-8")
    far = [row for row in table if abs(float(row[-1].rstrip("%"))) > 100 * TOLERANCE]
    print(f"{len(table) - len(far)} of {len(table)} phases within {TOLERANCE:.0%}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
