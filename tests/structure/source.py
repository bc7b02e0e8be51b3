"""The package's source files, parsed once, for the structure tests."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "spear_megatron"


@dataclass(frozen=True)
class SourceFile:
    """``module`` is the dotted name, ``name`` the path relative to the repository."""

    name: str
    module: str
    num_lines: int
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.name.endswith("__init__.py")


@functools.cache
def source_files() -> tuple[SourceFile, ...]:
    """Every Python file below spear_megatron/."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(REPOSITORY)
        parts = relative.with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(SourceFile(str(relative), module, text.count("\n"), ast.parse(text)))
    return tuple(found)


def imported_modules(file: SourceFile) -> set[str]:
    """Dotted names of everything ``file`` imports, anywhere in it."""
    names = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = file.module.split(".") if file.is_package else file.module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names
