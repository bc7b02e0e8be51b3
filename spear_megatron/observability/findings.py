"""What the doctor says: one finding per fact or failure pattern, with its evidence and its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "info", "warning", "error")
_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        level: ok; info, worth knowing; warning, probably wrong; error, will not work.
        name: short name of the fact or pattern.
        evidence: the figures behind it, with the steps where they stand.
        remedy: what to change, naming configuration keys or a command; '' if nothing.
        keys: full configuration keys that the remedy names.
    """

    level: Level
    name: str
    evidence: str
    remedy: str = ""
    keys: tuple[str, ...] = ()


def worst_level(findings: Sequence[Finding]) -> Level:
    """The gravest level among ``findings``; ok if there are none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print them to the terminal, one block each: level, name, evidence, remedy."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for finding in findings:
        text = Text(f"{finding.level:>7}", style=_STYLES[finding.level])
        text.append(f"  {finding.name}: ", style="bold default")
        text.append(finding.evidence, style="default")
        console.print(text, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"         -> {finding.remedy}"), soft_wrap=True)
