"""Write docs/configuration.md and docs/metrics.md from the code: every configuration key, every recorded metric.

    python tools/reference_pages.py            # write both
    python tools/reference_pages.py --check    # write nothing, exit with 1 when one is out of date
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONFIGURATION = """# Configuration reference

Written by `make docs` from the dataclasses; do not edit by hand.

A YAML file (`--config run.yaml`) only overrides these defaults, and `key=value` arguments override the file. A file may
start from another one with `base: other.yaml` (relative to itself). A value may refer to another as `${a.b}`.
`--dry-run` prints the resolved configuration.
"""
METRICS = """# Metrics of a run

Written by `make docs` from `spear_megatron/observability/schema.py`; do not edit by hand.

Every step is one line of `<run directory>/metrics.jsonl`: `schema_version`, `step` (1-based; 0 is the evaluation before
training), `unix_time` (seconds), then the metrics by name. A value that is not finite is written as null. Console and
TensorBoard show the same figures. In names, `<k>` stands for a number and any other `<word>` for a word.
"""


def configuration() -> str:
    """The configuration reference as Markdown, one table per section."""
    from spear_megatron.config.describe import field_table
    from spear_megatron.config.schema import Config

    sections = defaultdict(list)
    for row in field_table(Config):
        sections[row.key.rpartition(".")[0]].append(row)
    parts = [CONFIGURATION]
    for section, rows in sections.items():
        lines = [f"## `{section}`", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for row in rows:
            cells = (f"`{row.key.rpartition('.')[2]}`", row.type, f"`{row.default}`", row.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def metrics() -> str:
    """The metrics page as Markdown."""
    from spear_megatron.observability.schema import describe

    return f"{METRICS}\n{describe()}"


PAGES = {"configuration.md": configuration, "metrics.md": metrics}


def main() -> int:
    """Write the pages, or with ``--check`` tell which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    args = parser.parse_args()
    outdated = [name for name, render in PAGES.items() if written(name) != render()]
    for name in outdated:
        if args.check:
            print(f"{DOCS / name} is out of date: run make docs")
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return int(args.check and bool(outdated))


def written(name: str) -> str | None:
    """The page as it stands in docs/, or None."""
    path = DOCS / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    raise SystemExit(main())
