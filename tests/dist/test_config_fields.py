"""Every field of the configuration has an effect: an observer tells two of its values apart by the real code."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_ranks
from observers.core import Observation, observe_field, table
from observers.files import make_files

from spear_megatron.config.describe import flatten
from spear_megatron.config.schema import Config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return str(folder)


def verdict(ranks: list[list[Observation]]) -> str:
    """What is wrong with the observations of one field (first value, second, first again; by rank), or ''."""
    if any(first.refused for first, _, _ in ranks):
        return f"the first value was refused: {ranks[0][0].seen}"
    if any(first != again for first, _, again in ranks):
        return f"the same configuration gave {ranks[0][0].seen} and then {ranks[0][2].seen}"
    if all(first == other for first, other, _ in ranks):
        return f"both values gave {ranks[0][0].seen}: the field has no effect that its observer can see"
    return ""


def test_every_field_has_exactly_one_observer() -> None:
    assert sorted(table()) == sorted(flatten(Config()))


@pytest.mark.slow
@pytest.mark.parametrize("key", flatten(Config()))
def test_a_field_has_an_effect(key: str, files: str, tmp_path: Path) -> None:
    observer = table()[key]
    ranks = run_ranks(observe_field, observer.ranks, key, files, str(tmp_path))
    assert verdict(ranks) == ""


@pytest.mark.parametrize("key", ["data.max_prompt_length", "trainer.resume_mode", "actor_rollout_ref.rollout.top_p"])
def test_a_refusal_names_the_field(key: str, files: str, tmp_path: Path) -> None:
    (_, other, _), = run_ranks(observe_field, 1, key, files, str(tmp_path))
    assert other.refused and key.rpartition(".")[2] in other.seen


def test_a_field_without_effect_and_an_observer_that_is_not_steady_fail() -> None:
    a, b = Observation(False, 1), Observation(False, 2)
    assert verdict([[a, b, a]]) == "" and verdict([[a, a, a], [a, b, a]]) == ""
    assert "no effect" in verdict([[a, a, a]])
    assert "same configuration" in verdict([[a, b, b]])
    assert "refused" in verdict([[Observation(True, "bad"), a, Observation(True, "bad")]])
