"""One training step and the whole training loop on every parallel layout, compared with one rank, as two tables.

    python tools/layouts.py            # exit status 1 when any layout differs

One step: same Hugging Face weights, same rows, fp32, policy loss with entropy bonus and KL term, also with other
packings. Shown are the loss, the global gradient norm with their relative differences to one rank, and the worst
gradient error |g - g0| / |g0| over all parameters by Hugging Face name.

The loop: three steps of the command ``train`` with a tool-calling agent. Shown are in how many steps all trajectories
are token-equal to those on one rank, and the largest difference among all recorded figures, timings aside.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "dist")]

TOLERANCE = 1e-5
FIELDS: dict[str, Any] = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.05, "clip_ratio_high": 0.28}


def step_table(folder: str) -> tuple[list[list[str]], bool]:
    """Rows of the one-step table and whether every layout agrees."""
    from harness import run_ranks
    from train_step import BASELINE, LAYOUTS, largest_gradient_error, step_on_rank

    expected = run_ranks(step_on_rank, 1, folder, BASELINE, FIELDS)[0]
    table, all_agree = [], True
    for layout in (BASELINE, *LAYOUTS):
        result = run_ranks(step_on_rank, layout.world_size, folder, layout, FIELDS)[0]
        loss = abs(result["loss"] / expected["loss"] - 1)
        norm = abs(result["grad_norm"] / expected["grad_norm"] - 1)
        error, name = largest_gradient_error(result["gradients"], expected["gradients"])
        agrees = max(loss, norm, error) <= TOLERANCE
        all_agree &= agrees
        table.append(
            [
                layout.name,
                f"{result['loss']:.7f}",
                f"{loss:.1e}",
                f"{result['grad_norm']:.6f}",
                f"{norm:.1e}",
                f"{error:.1e}",
                name,
                "ok" if agrees else "DIFFERS",
            ]
        )
    return table, all_agree


def loop_table(work: Path) -> tuple[list[list[str]], bool]:
    """Rows of the table of the training loop and whether every layout agrees."""
    from train_loop import LOOP_BASELINE, LOOP_LAYOUTS, STEPS, compare, make_agent, run_loop

    folder = make_agent(work)
    expected = run_loop(folder, work / LOOP_BASELINE.name, LOOP_BASELINE)
    num_tokens = sum(len(ids) for step in expected.tokens.values() for rows in step.values() for ids in rows)
    all_agree = True
    table = [[LOOP_BASELINE.name, f"{num_tokens} tokens", f"{len(expected.metrics[1])} figures", "", ""]]
    for layout in LOOP_LAYOUTS:
        result = compare(run_loop(folder, work / layout.name, layout), expected)
        all_agree &= result.agrees
        tokens = f"equal in {result.equal_steps} of {STEPS} steps"
        table.append([layout.name, tokens, f"{result.error:.2f}", result.worst, "ok" if result.agrees else "DIFFERS"])
    return table, all_agree


def show(title: str, header: list[str], table: list[list[str]]) -> None:
    """Print aligned columns."""
    widths = [max(len(row[i]) for row in [header, *table]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    """Print the tables; 0 when every layout agrees within the tolerances."""
    from tiny import make_tiny_hf
    from train_loop import ABSOLUTE, RELATIVE, STEPS

    with tempfile.TemporaryDirectory() as directory:
        folder = str(make_tiny_hf(Path(directory) / "model"))
        table, steps_agree = step_table(folder)
        header = ["layout", "loss", "rel. diff", "grad norm", "rel. diff", "worst gradient", "parameter", ""]
        show(f"One training step against one rank (tolerance {TOLERANCE:g})", header, table)
        table, loops_agree = loop_table(Path(directory))
        header = ["layout", "trajectories", "largest diff", "of", ""]
        tolerance = f"differences in units of the tolerance, {RELATIVE:g} relative + {ABSOLUTE:g}"
        show(f"{STEPS} steps of `train` against one rank ({tolerance})", header, table)
    return 0 if steps_agree and loops_agree else 1


if __name__ == "__main__":
    sys.exit(main())
