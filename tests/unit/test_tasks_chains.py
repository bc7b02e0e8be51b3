"""Chained problems: right step by step, never solved by stopping early or by one slip."""

from __future__ import annotations

import contextlib
import io
from random import Random

import pytest
from spear_megatron.data.chains import CHAIN_LEVELS, Chain, Operation, draw_chain
from spear_megatron.data.generator import GeneratorConfig, generate_problems, split_of


def printed(program: str) -> int:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(program, {})
    return int(output.getvalue())


def test_a_chain_by_hand() -> None:
    chain = Chain(7, (Operation("*", 12), Operation("-", 5), Operation("+", 31)))
    assert chain.question == "What is 7 * 12, then - 5, then + 31?"
    assert chain.calls == (("print(7 * 12)", 84), ("print(84 - 5)", 79), ("print(79 + 31)", 110))
    assert chain.program == "print(((7 * 12) - 5) + 31)" and chain.answer == 110
    assert chain.slipped(1).calls[1:] == (("print(84 + 5)", 89), ("print(89 + 31)", 120))


@pytest.mark.parametrize("level", CHAIN_LEVELS)
def test_programs_print_what_they_say_and_shortcuts_fail(level: int) -> None:
    rng = Random(level)
    for _ in range(300):
        chain = draw_chain(rng, CHAIN_LEVELS[level])
        assert len(chain.calls) == CHAIN_LEVELS[level]
        for call in chain.calls:
            assert printed(call.program) == call.printed >= 0
        assert printed(chain.program) == chain.answer
        shortcuts = [chain.start, *(call.printed for call in chain.calls[:-1])]
        slips = [chain.slipped(position).answer for position in range(len(chain.operations))]
        assert chain.answer not in (*shortcuts, *slips)


def test_problems_of_chain_levels() -> None:
    config = GeneratorConfig(levels=(2, 6, 7), num_train=300, num_val=60)
    train, val = generate_problems(config, "train"), generate_problems(config, "val")
    assert generate_problems(config, "train") == train
    assert not {problem.id for problem in train} & {problem.id for problem in val}
    for problem in train:
        assert split_of(problem.text) == "train" and (problem.chain is not None) == (problem.level in CHAIN_LEVELS)
        assert printed(problem.program) == problem.answer and printed(problem.wrong_program) == problem.wrong_answer
        assert len({problem.answer, problem.wrong_answer, problem.first_guess}) >= 2
        assert problem.answer not in (problem.wrong_answer, problem.first_guess)
        assert problem.calls()[-1].printed == problem.answer != problem.calls(slip=0)[-1].printed


def test_other_levels_are_named_in_the_refusal() -> None:
    with pytest.raises(ValueError, match=r"chosen from \[1, 2, 3, 4, 5, 6, 7\], got \[8\]"):
        GeneratorConfig(levels=(8,))
