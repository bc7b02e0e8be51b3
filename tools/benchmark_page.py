"""Write docs/benchmarks.md and docs/benchmarks.json from the reports of the kernel benchmarks in outputs/bench/.

The page has a part for every instruction set; the part of the one that was measured is replaced, the others stay.

    make bench-kernels                     # measure on an idle machine, then write the page
    python tools/benchmark_page.py         # write the page from the reports that are there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ("kernels", "policy_loss", "lm_head")
HEAD = """# Benchmarks of the kernels

Written by `tools/benchmark_page.py` from `docs/benchmarks.json`; `make bench-kernels` measures anew. Every contender is
called once per round, so that a disturbance hits all of them alike; a ratio is the median over the rounds of
(contender / kernel) within one round: above 1 the kernel is faster; Clip-Cov's table says how many times as fast as the
official formulation a contender is. The allocator keeps freed memory, so that no contender pays page faults. There is a
part for every instruction set, measured on a machine that has no wider one, and what is compared is what stands in one
part. On a CUDA device `make gpu-check` measures the CUDA kernels; no figure of one is here yet.
"""


def main() -> int:
    """Write both files; the exit status."""
    folder = ROOT / "outputs" / "bench"
    missing = [name for name in REPORTS if not (folder / f"{name}.json").is_file()]
    if missing:
        print(f"{folder} lacks {', '.join(missing)}: run `make bench-kernels`", file=sys.stderr)
        return 1
    reports: dict[str, Any] = {name: json.loads((folder / f"{name}.json").read_text()) for name in REPORTS}
    for report in reports.values():
        for result in report["results"]:
            result.pop("samples_ms", None)
    sets = {report["kernels"]["isa"] for report in reports.values()}
    if len(sets) > 1:
        print(f"{folder} has reports of several instruction sets: run `make bench-kernels`", file=sys.stderr)
        return 1
    stored = ROOT / "docs" / "benchmarks.json"
    parts = json.loads(stored.read_text()) | {sets.pop(): reports}
    stored.write_text(json.dumps(parts, indent=1) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(page(parts))
    return 0


def page(parts: dict[str, dict[str, Any]]) -> str:
    """The text of docs/benchmarks.md: instruction set -> its reports by name and, where there is one, a note."""
    lines = [HEAD]
    for isa, reports in sorted(parts.items(), reverse=True):
        lines += [f"## {isa}", ""]
        lines += [f"{reports['note']}\n"] if "note" in reports else []
        lines += log_probs(reports["kernels"]) + policy(reports["policy_loss"]) + lm_head(reports["lm_head"])
    return "\n".join(lines)


def facts(report: dict[str, Any]) -> str:
    """Where and how a report was measured."""
    return (
        f"`{report['command']}`: {report['machine']}, {report['threads']} threads, torch {report['torch']}, "
        f"{report['kernels']['isa']}, {report['rounds']} rounds.\n"
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def log_probs(report: dict[str, Any]) -> list[str]:
    """Contenders by row, type and pass by column."""
    lines = ["### Log-prob and entropy from logits", "", f"Logits {report['shape']}. {facts(report)}"]
    for entropy in (False, True):
        cases = [result for result in report["results"] if result["entropy"] == entropy]
        names = list(dict.fromkeys(name for case in cases for name in case["median_ms"]))
        header = [f"{case['dtype']} {'forward + backward' if case['backward'] else 'forward'}" for case in cases]
        rows = []
        for name in names:
            cells = [
                f"{case['median_ms'][name]:.1f} ms, {case['ratio'][name]:.2f}x" if name in case["median_ms"] else ""
                for case in cases
            ]
            rows.append([name, *cells])
        lines += [f"#### {'Log-prob and entropy' if entropy else 'Log-prob alone'}", ""]
        lines += table(["", *header], rows)
    return lines


def policy(report: dict[str, Any]) -> list[str]:
    """Selection and loss."""
    lines = ["### Clip-Cov: selection, loss and its gradient", "", facts(report)]
    rows = [
        [str(result["tokens"]), name, f"{milliseconds:.3f}", f"{result['official_by_this'][name]:.2f}"]
        for result in report["results"]
        for name, milliseconds in result["median_ms"].items()
    ]
    return lines + table(["tokens", "contender", "median ms", "official formulation / this"], rows)


def lm_head(report: dict[str, Any]) -> list[str]:
    """Time and memory of the LM head."""
    rows, hidden, vocab = report["shape"]
    lines = ["### LM head with log-probs of sampled tokens, forward and backward", ""]
    lines += [f"Hidden states [{rows}, {hidden}], head [{vocab}, {hidden}], with entropy. {facts(report)}"]
    cells = [
        [
            result["dtype"],
            f"{result['density']:.0%}",
            result["contender"],
            f"{result['median_ms']:.1f}",
            f"{result['ratio']:.2f}",
            f"{result['peak_mib']:.0f}",
        ]
        for result in report["results"]
    ]
    return lines + table(["dtype", "sampled", "contender", "", "time / kept logits of all", "peak MiB"], cells)


if __name__ == "__main__":
    sys.exit(main())
