"""Write docs/configuration.md from the configuration's dataclasses: every key with type, default and meaning."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration reference

Written by `python tools/config_reference.py` from the dataclasses; do not edit by hand.

A YAML file (`--config run.yaml`) only overrides these defaults, and `key=value` arguments override the file. A file may
start from another one with `base: other.yaml` (relative to itself). A value may refer to another as `${a.b}`.
`--dry-run` prints the resolved configuration.
"""


def render() -> str:
    """The whole page as Markdown, one table per section."""
    from spear_megatron.config.describe import field_table
    from spear_megatron.config.schema import Config

    sections = defaultdict(list)
    for row in field_table(Config):
        sections[row.key.rpartition(".")[0]].append(row)
    parts = [INTRODUCTION]
    for section, rows in sections.items():
        lines = [f"## `{section}`", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for row in rows:
            cells = (f"`{row.key.rpartition('.')[2]}`", row.type, f"`{row.default}`", row.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="file to write")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    args = parser.parse_args()
    text = render()
    if args.check:
        current = args.out.read_text(encoding="utf-8") if args.out.is_file() else ""
        if current != text:
            print(f"{args.out} is out of date: run python tools/config_reference.py")
        return int(current != text)
    args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
