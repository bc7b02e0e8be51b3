"""Built-in problems: right, disjoint, reproducible."""

from __future__ import annotations

import contextlib
import io

import pytest
from spear_megatron.data.generator import FAMILIES, LEVELS, GeneratorConfig, generate_problems, split_of

ALL = GeneratorConfig(levels=LEVELS, num_train=800, num_val=200)


def printed(program: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(program, {})
    return output.getvalue()


@pytest.mark.parametrize("split", ["train", "val"])
def test_programs_print_the_answers(split: str) -> None:
    problems = generate_problems(ALL, split)
    assert {problem.family for problem in problems} == {family.name for family in FAMILIES}
    assert {problem.level for problem in problems} == set(LEVELS)
    for problem in problems:
        assert printed(problem.program) == f"{problem.answer}\n"
        assert printed(problem.wrong_program) == f"{problem.wrong_answer}\n"
    assert sum(problem.answer == problem.wrong_answer for problem in problems) < len(problems) / 100


def test_splits_are_disjoint_for_any_seeds() -> None:
    configs = [GeneratorConfig(levels=(1,), num_train=1000, seed=seed) for seed in range(4)]
    train = {problem.text for config in configs for problem in generate_problems(config, "train")}
    val = {problem.text for config in configs for problem in generate_problems(config, "val")}
    assert not train & val
    assert {split_of(text) for text in train} == {"train"} and {split_of(text) for text in val} == {"val"}


def test_problems_differ_and_follow_the_seed() -> None:
    first = generate_problems(ALL, "train")
    assert len({problem.text for problem in first}) == len({problem.id for problem in first}) == 800
    assert generate_problems(ALL, "train") == first
    assert generate_problems(GeneratorConfig(levels=LEVELS, num_train=800, seed=1), "train") != first
    counts = [sum(problem.level == level for problem in first) for level in LEVELS]
    assert counts == [160] * 5


def test_exhausted_levels_and_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lower data.generator.num_val or add levels"):
        generate_problems(GeneratorConfig(levels=(1,), num_val=9000), "val")
    with pytest.raises(ValueError, match="data.generator.levels"):
        GeneratorConfig(levels=(0, 1))
    with pytest.raises(ValueError, match="data.generator.num_train"):
        GeneratorConfig(num_train=0)
