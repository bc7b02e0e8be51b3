"""Built-in tasks: arithmetic and number theory with integer answers, in five levels of difficulty, and chains.

Everything follows from the seed. Whether a problem belongs to the training or to the validation split is decided by a
hash of its text, so that the splits are disjoint for any seeds and sizes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from spear_megatron.data.chains import CHAIN_LEVELS, Call, Chain, draw_chain
from spear_megatron.parallel.seeds import derive_key

Split = Literal["train", "val"]
LEVELS = (1, 2, 3, 4, 5)
_VAL_SHARE = 5  # one text in five belongs to the validation split
_MAX_MISSES = 2_000  # draws without a new problem after which a level counts as exhausted


@dataclass(frozen=True, slots=True)
class Problem:
    """``program`` prints ``answer``; ``wrong_program`` misreads the operation and prints ``wrong_answer``.

    A chained problem is solved with one program per operation; ``chain`` holds them, and is None for all others.
    """

    id: str
    text: str
    answer: int
    program: str
    wrong_program: str
    wrong_answer: int
    level: int
    family: str
    chain: Chain | None = None

    def calls(self, slip: int | None = None) -> tuple[Call, ...]:
        """The programs of a solution in order; with ``slip``, of one that misreads the operation at that position."""
        if self.chain is not None:
            return (self.chain if slip is None else self.chain.slipped(slip)).calls
        right, wrong = Call(self.program, self.answer), Call(self.wrong_program, self.wrong_answer)
        return (right if slip is None else wrong,)

    @property
    def first_guess(self) -> int:
        """A wrong answer that needs no tool: the number that a chain starts with, else that of the wrong program."""
        return self.wrong_answer if self.chain is None else self.chain.start


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of problem: how to draw its numbers, the question, the right program and its result.

    ``slip`` is the program of someone who misread the operation, and ``slip_solve`` what it prints.
    """

    name: str
    level: int
    draw: Callable[[Random], tuple[int, ...]]
    question: str
    program: str
    solve: Callable[..., int]
    slip: str
    slip_solve: Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Keys under ``data.generator``.

    ``levels`` of difficulty (1 to 5; 6 and 7 are chains of 2 and 3 operations) are drawn equally often.
    ``num_train`` and ``num_val`` problems, all different.
    """

    levels: tuple[int, ...] = (1, 2)
    """Difficulty levels of the built-in tasks, in equal shares."""
    num_train: int = 4096
    """Built-in training tasks."""
    num_val: int = 256
    """Built-in held-out tasks, disjoint from the training tasks."""
    seed: int = 0
    """Keys the built-in tasks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        known = [*LEVELS, *CHAIN_LEVELS]
        if not self.levels or not set(self.levels) <= set(known):
            raise ValueError(f"data.generator.levels must be chosen from {known}, got {list(self.levels)}")
        for key in ("num_train", "num_val"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.generator.{key} must be at least 1, got {getattr(self, key)}")


def generate_problems(config: GeneratorConfig, split: Split) -> list[Problem]:
    """The problems of one split, in the order in which they were drawn.

    Raises:
        ValueError: the levels do not hold that many different problems.
    """
    rng = Random(derive_key(config.seed, f"generator/{split}"))
    count = config.num_train if split == "train" else config.num_val
    return draw_problems(rng, levels=config.levels, count=count, split=split)


def draw_problems(rng: Random, *, levels: Sequence[int], count: int, split: Split) -> list[Problem]:
    """``count`` different problems of ``split``, the levels in turn, families of a level equally often."""
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < count:
        level = levels[len(problems) % len(levels)]
        problem = _draw_problem(rng, level)
        if problem.text in problems or split_of(problem.text) != split:
            misses += 1
            if misses > _MAX_MISSES:
                raise ValueError(
                    f"the generator found only {len(problems)} different {split} problems of level {level}: "
                    f"lower data.generator.num_{split} or add levels"
                )
            continue
        misses = 0
        problems[problem.text] = problem
    return list(problems.values())


def split_of(text: str) -> Split:
    """The split that a problem's text belongs to."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") % _VAL_SHARE == 0 else "train"


def _draw_problem(rng: Random, level: int) -> Problem:
    if level in CHAIN_LEVELS:
        return _chained_problem(draw_chain(rng, CHAIN_LEVELS[level]), level)
    family = rng.choice([family for family in FAMILIES if family.level == level])
    numbers = family.draw(rng)
    while family.slip_solve(*numbers) == family.solve(*numbers):
        numbers = family.draw(rng)
    text = family.question.format(*numbers)
    return Problem(
        id=_problem_id(family.name, text),
        text=text,
        answer=family.solve(*numbers),
        program=family.program.format(*numbers),
        wrong_program=family.slip.format(*numbers),
        wrong_answer=family.slip_solve(*numbers),
        level=family.level,
        family=family.name,
    )


def _chained_problem(chain: Chain, level: int) -> Problem:
    slip = chain.slipped(len(chain.operations) - 1)
    return Problem(
        id=_problem_id(chain.family, chain.question),
        text=chain.question,
        answer=chain.answer,
        program=chain.program,
        wrong_program=slip.program,
        wrong_answer=slip.answer,
        level=level,
        family=chain.family,
        chain=chain,
    )


def _problem_id(family: str, text: str) -> str:
    return f"{family}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def _digits(*lengths: int) -> Callable[[Random], tuple[int, ...]]:
    """Numbers with the given counts of decimal digits, none below 2."""
    return lambda rng: tuple(rng.randrange(max(2, 10 ** (n - 1)), 10**n) for n in lengths)


def _multiples(rng: Random) -> tuple[int, ...]:
    """Two three-digit numbers with a common factor."""
    factor = rng.randrange(4, 40)
    low, high = -(-100 // factor), 999 // factor
    return factor * rng.randrange(low, high + 1), factor * rng.randrange(low, high + 1)


def _divisors(number: int) -> int:
    return sum(1 for candidate in range(1, number + 1) if number % candidate == 0)


def _multiple_sum(step: int, limit: int) -> int:
    return sum(range(step, limit + 1, step))


def _add(a: int, b: int) -> int:
    return a + b


def _subtract(a: int, b: int) -> int:
    return a - b


def _multiply(a: int, b: int) -> int:
    return a * b


def _remainder(a: int, b: int) -> int:
    return a % b


def _quotient(a: int, b: int) -> int:
    return a // b


_ADD = ("print({} + {})", _add)
_SUBTRACT = ("print({} - {})", _subtract)
_MULTIPLY = ("print({} * {})", _multiply)
_REMAINDER = ("print({} % {})", _remainder)
_QUOTIENT = ("print({} // {})", _quotient)
_GCD = ("import math\nprint(math.gcd({}, {}))", math.gcd)
_LCM = ("import math\nprint(math.lcm({}, {}))", math.lcm)

# A slip is never mutual (add -> multiply -> subtract -> add): an imitator of mistakes still has to read the operation.
FAMILIES: tuple[Family, ...] = (
    Family("add2", 1, _digits(2, 2), "What is {} + {}?", *_ADD, *_MULTIPLY),
    Family("sub2", 1, _digits(2, 2), "What is {} - {}?", *_SUBTRACT, *_ADD),
    Family("mul1", 1, _digits(3, 1), "What is {} * {}?", *_MULTIPLY, *_SUBTRACT),
    Family("add3", 2, _digits(3, 3), "What is {} + {}?", *_ADD, *_MULTIPLY),
    Family("sub3", 2, _digits(3, 3), "What is {} - {}?", *_SUBTRACT, *_ADD),
    Family("mul2", 2, _digits(2, 2), "What is {} * {}?", *_MULTIPLY, *_SUBTRACT),
    Family("mod", 2, _digits(3, 2), "What is {} modulo {}?", *_REMAINDER, *_QUOTIENT),
    Family(
        "expr3", 3, _digits(2, 2, 2), "What is ({} + {}) * {}?",
        "print(({} + {}) * {})", lambda a, b, c: (a + b) * c,
        "print({} + {} * {})", lambda a, b, c: a + b * c,
    ),
    Family(
        "expr4", 3, _digits(2, 2, 2, 2), "What is {} * {} - {} * {}?",
        "print({} * {} - {} * {})", lambda a, b, c, d: a * b - c * d,
        "print({} * ({} - {}) * {})", lambda a, b, c, d: a * (b - c) * d,
    ),
    Family("div", 3, _digits(4, 2), "What is the quotient of {} by {}?", *_QUOTIENT, *_MULTIPLY),
    Family("gcd", 4, _multiples, "Find the greatest common divisor of {} and {}.", *_GCD, *_LCM),
    Family("lcm", 4, _multiples, "Find the least common multiple of {} and {}.", *_LCM, *_MULTIPLY),
    Family(
        "digitsum", 4, _digits(3, 3), "Find the digit sum of {} * {}.",
        "print(sum(map(int, str({} * {}))))", lambda a, b: sum(map(int, str(a * b))),
        "print(sum(map(int, str({} + {}))))", lambda a, b: sum(map(int, str(a + b))),
    ),
    Family(
        "modpow", 5, _digits(2, 3, 2), "Find {} to the power {} modulo {}.", "print(pow({}, {}, {}))", pow,
        "print({} * {} % {})", lambda a, b, m: a * b % m,
    ),
    Family(
        "divisors", 5, _digits(3), "How many divisors has {}?",
        "n = {}\nprint(sum(n % d == 0 for d in range(1, n + 1)))", _divisors,
        "n = {}\nprint(sum(n % d == 0 for d in range(1, n)))", lambda n: _divisors(n) - 1,
    ),
    Family(
        "multiples", 5, _digits(1, 3), "Find the sum of the multiples of {} up to {}.",
        "step, limit = {}, {}\nprint(sum(range(step, limit + 1, step)))", _multiple_sum,
        "step, limit = {}, {}\nprint(sum(range(step, limit - step + 1, step)))",
        lambda step, limit: _multiple_sum(step, limit - step),
    ),
)
