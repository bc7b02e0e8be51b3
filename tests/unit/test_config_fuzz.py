"""Thousands of bad keys and values: each is exactly one ValueError, one sentence that names the key."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spear_megatron.config.describe import flatten
from spear_megatron.config.loader import load, valid_keys

NUM_CASES = 3000


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    count: int = 2
    pair: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    first: Inner = field(default_factory=Inner)
    second: Inner | None = None
    flag: bool = False
    limit: int | None = None
    text: str = "x"
    extra: dict[str, Any] = field(default_factory=dict)


GARBAGE = [
    '[1', '{a', '{a: 1}', '[1, 2, 3]', '[[]]', 'yes', '1e400', '.nan', '.inf', '-7', '1.5', "'q", '"', '&a', '*a',
    '!!python/name:os.system x', '!x', '${', '${}', '${nope}', '${first}', '${first.rate}',
    '${oc.env:NO_SUCH_VARIABLE_X}', '${a b}', '${${text}}', 'null', '~', 'a: b: c', '? x', '- 1', '|', '>', '%',
    '@', '`', '\t', '{1: 2}', '{null: 1}', '{? [a] : b}', '2020-01-01', '0x', '\x00', '\u2028', '🦙', "[" * 200,
    '???', "'???'",
]  # fmt: skip


def bad_key(rng: random.Random, keys: list[str]) -> str:
    key = rng.choice(keys)
    place = rng.randrange(len(key) + 1)
    return rng.choice([
        key[:place] + rng.choice("abcxyz._-[]0 ") + key[place:],
        key[:place] + key[place + 1 :],
        key + "." + rng.choice(keys),
        "".join(rng.choice("abcdefgh.") for _ in range(rng.randrange(1, 12))),
        key.upper(),
    ])  # fmt: skip


def outcome(overrides: list[str], path: Path | None = None) -> str | None:
    """None when it loads, else the sentence. Anything but a ValueError fails the test."""
    try:
        flatten(load(Outer, path, overrides))
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 600, text
        return text
    return None


def test_bad_keys_on_the_command_line() -> None:
    rng, keys = random.Random(1), valid_keys(Outer)
    refused = 0
    for _ in range(NUM_CASES):
        key = bad_key(rng, keys)
        text = outcome([f"{key}=1"])
        stripped = key.strip()
        if stripped in keys or stripped.startswith("extra.") or (text is not None and "must be" in text):
            continue
        assert text is not None, key
        assert "did you mean" in text or "key=value" in text, text
        assert stripped.split(".")[0] in text, (key, text)
        refused += 1
    assert refused > NUM_CASES * 0.7


def test_bad_values_on_the_command_line() -> None:
    rng, keys = random.Random(2), valid_keys(Outer)
    refused = 0
    for _ in range(NUM_CASES):
        key = rng.choice(keys)
        value = rng.choice(GARBAGE) + rng.choice(["", "", "", rng.choice(GARBAGE)])
        text = outcome([f"{key}={value}"])
        if text is not None:
            refused += 1
            assert key.split(".")[0] in text or "???" in value or "${" in value, (key, value, text)
    assert refused > NUM_CASES * 0.5


def test_bad_files(tmp_path: Path) -> None:
    rng, keys = random.Random(3), valid_keys(Outer)
    path = tmp_path / "run.yaml"
    for _ in range(NUM_CASES // 10):
        lines = []
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice([*keys, bad_key(rng, keys)])
            depth = key.split(".")
            lines += ["  " * level + part + ":" for level, part in enumerate(depth)]
            lines[-1] += " " + rng.choice(GARBAGE)
        path.write_text("\n".join(lines), encoding="utf-8")
        text = outcome([], path)
        assert text is None or "run.yaml" in text or "${" in text, (lines, text)


def test_random_bytes_in_a_file(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = tmp_path / "run.yaml"
    for _ in range(NUM_CASES // 10):
        alphabet = bytes(range(256)) if rng.random() < 0.3 else b"abc: \n[]{}-&*!|'\"#%@"
        path.write_bytes(bytes(rng.choice(alphabet) for _ in range(rng.randrange(60))))
        outcome([], path)
