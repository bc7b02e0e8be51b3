"""The real configuration: defaults load, round-trip, are documented; the doctor names keys that exist."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from spear_megatron.config.describe import field_table, flatten, to_yaml
from spear_megatron.config.loader import load, valid_keys
from spear_megatron.config.schema import Config

REPOSITORY = Path(__file__).parents[2]
PATTERNS = ("policy", "rollout", "mismatch")
DOCTOR = [REPOSITORY / "spear_megatron" / "observability" / f"patterns_{part}.py" for part in PATTERNS]


def test_defaults_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load(Config)))
    assert load(Config, path) == load(Config) == Config()


def test_every_field_is_in_the_table_and_documented() -> None:
    rows = {row.key: row for row in field_table(Config)}
    assert set(rows) == set(flatten(Config()))
    assert [key for key, row in rows.items() if not row.doc] == []


OF_TOOLS = {"study_arms.yaml"}  # read by tools/study.py; tests/unit/test_study_tool.py loads every run of it
SHIPPED = [path for path in sorted((REPOSITORY / "configs").glob("**/*.yaml")) if path.name not in OF_TOOLS]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load(path: Path) -> None:
    load(Config, path)


def test_the_doctor_names_keys_that_exist() -> None:
    from spear_megatron.observability import patterns_mismatch, patterns_policy, patterns_rollout

    keys = set(valid_keys(Config))
    named = set()
    for path, module in zip(DOCTOR, (patterns_policy, patterns_rollout, patterns_mismatch)):
        text = path.read_text()
        for name in ("_ACTOR", "_ROLLOUT", "_LR", "_GATE", "_DTYPE"):
            text = text.replace(f"{{{name}}}", getattr(module, name, ""))
        pattern = r"(?:actor_rollout_ref|data|trainer|env|reward|algorithm)\.[a-z_]+(?:\.[a-z_]+)*"
        named |= set(re.findall(pattern, text))
    assert len(named) > 15
    assert named - keys == set()


def test_fuzzed_values_of_the_real_configuration() -> None:
    rng, keys = random.Random(0), list(flatten(Config()))
    values = ["-1", "0", "null", "x", "[]", "{}", "1e9", "true", "[1, x]", "1.5", "'quoted'", "${trainer.seed}", "[1"]
    refused = 0
    for _ in range(1500):
        key, value = rng.choice(keys), rng.choice(values)
        try:
            load(Config, None, [f"{key}={value}"])
        except ValueError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text and key.split(".")[0] in text, (key, value, text)
    assert refused > 500


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", REPOSITORY / "tools" / "reference_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_lists_every_key_once_below_its_section(pages: ModuleType) -> None:
    section, listed = "", []
    for line in pages.configuration().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("`")
        elif line.startswith("| `"):
            listed.append(f"{section}.{line.split('`')[1]}")
    assert sorted(listed) == sorted(row.key for row in field_table(Config))


@pytest.mark.parametrize("name", ["configuration.md", "metrics.md"])
def test_the_reference_in_docs_is_up_to_date(pages: ModuleType, name: str) -> None:
    assert pages.written(name) == pages.PAGES[name](), "run make docs"
