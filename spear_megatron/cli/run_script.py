"""``--from-spear-script``: a released run script as overrides, with a table of what became of its keys."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def script_overrides(path: str) -> list[str]:
    """The overrides that a run script stands for; the table goes to standard error, once for all ranks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the script needs a shell, or has a key or value without a counterpart; names the file.
    """
    from spear_megatron.config.spear_script import parse_run_script
    from spear_megatron.config.spear_translate import describe_rows, overrides_of, translate
    from spear_megatron.parallel.once import is_first_to_say

    file = Path(path)
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"run script {path!r} {problem}: name a shell script")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: name a shell script") from error
    try:
        script = parse_run_script(text, {"PWD": os.getcwd(), **os.environ})
        rows = translate(script)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    table = describe_rows(rows, path, script)
    if is_first_to_say(table):
        print(table, file=sys.stderr, flush=True)
    return overrides_of(rows)
