"""The environments of other SGLang versions: the pinned requirements but for some lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from sglang_versions import PINNED, VERSIONS, requirements  # noqa: E402


@pytest.mark.parametrize("version", VERSIONS)
def test_only_the_named_lines_differ(version: str) -> None:
    pinned, other = (text.splitlines() for text in (PINNED.read_text(), requirements(version, VERSIONS[version])))
    changed = {new for old, new in zip(pinned, other, strict=True) if old != new}
    assert changed == {f"sglang=={version}", *(f"{name}=={wanted}" for name, wanted in VERSIONS[version].items())}


def test_a_package_that_is_not_pinned_is_refused() -> None:
    with pytest.raises(ValueError, match="pins no-such-package 0 times, not once"):
        requirements("0.5.23", {"no-such-package": "1.0"})
