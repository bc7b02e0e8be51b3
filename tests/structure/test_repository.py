"""What is tracked: no paths of a developer's machine, no unfinished marks, plain English names; types check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from source import REPOSITORY, source_files

_ABSOLUTE = re.compile(r"(?<![A-Za-z0-9_.$}])/(?:" + "|".join(("work", "root", "farm", "home")) + r")/[A-Za-z0-9_]")
_UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
_TEXT = {".py", ".md", ".yaml", ".yml", ".txt", ".toml", ".ini", ".cfg", ".sh", ".cpp", ".cu", ".h", ".cuh", ""}


def tracked_texts() -> list[tuple[str, str]]:
    """(name, text) of every tracked text file."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    paths = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    chosen = [path for path in paths if path.is_file() and path.suffix in _TEXT]
    return [(str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8", errors="replace")) for path in chosen]


def matches(pattern: re.Pattern[str], name_prefix: str = "") -> list[str]:
    found = []
    for name, text in tracked_texts():
        if name.startswith(name_prefix) and name != "LICENSE":
            lines = enumerate(text.splitlines(), 1)
            found += [f"{name}:{number}: {line.strip()[:80]}" for number, line in lines if pattern.search(line)]
    return found


def test_no_paths_of_a_machine() -> None:
    assert matches(_ABSOLUTE) == []


def test_no_unfinished_marks() -> None:
    assert matches(_UNFINISHED) == []
    words = "NotImplemented" + "Error"
    assert matches(re.compile(rf"raise {words}"), "spear_megatron/") == []


def test_lines_fit() -> None:
    long = [
        f"{name}:{number}"
        for name, text in tracked_texts()
        if name.endswith(".py")
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    skipped = pytestconfig.getini("norecursedirs")
    names = {part for name, _ in tracked_texts() for part in name.split("/")[:-1] if name.startswith("tests/")}
    assert {name for name in names if any(fnmatch(name, pattern) for pattern in skipped)} == set()


def test_every_file_states_its_annotations_are_lazy() -> None:
    missing = []
    for file in source_files():
        imports = [node for node in file.tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        if not imports and not file.is_package:
            missing.append(file.name)
    assert missing == []


@pytest.mark.slow
def test_types_check() -> None:
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
