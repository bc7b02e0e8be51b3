"""Chained problems: dependent operations, one program each, so that a solution needs several tool calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

CHAIN_LEVELS = {6: 2, 7: 3}
"""Operations of a chain by its level of difficulty."""

_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# Never mutual, as with the other problems: an imitator of mistakes still has to read the operation.
_SLIPS = {"+": "*", "*": "-", "-": "+"}
_MAX_FACTOR, _MAX_TERM = 9, 99


class Call(NamedTuple):
    """A program and the integer that it prints."""

    program: str
    printed: int


class Operation(NamedTuple):
    """``symbol`` is +, - or *; the left operand is the result so far."""

    symbol: str
    operand: int


@dataclass(frozen=True, slots=True)
class Chain:
    """``start``, then the operations from left to right, without precedence."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def family(self) -> str:
        """Names the kind of chain by its length."""
        return f"chain{len(self.operations)}"

    @property
    def question(self) -> str:
        """The problem in words."""
        first, *rest = (f"{symbol} {operand}" for symbol, operand in self.operations)
        return ", then ".join([f"What is {self.start} {first}", *rest]) + "?"

    @property
    def calls(self) -> tuple[Call, ...]:
        """One program per operation, each on what the one before it printed."""
        calls, value = [], self.start
        for symbol, operand in self.operations:
            result = _APPLY[symbol](value, operand)
            calls.append(Call(f"print({value} {symbol} {operand})", result))
            value = result
        return tuple(calls)

    @property
    def answer(self) -> int:
        """The result of the last operation."""
        return self.calls[-1].printed

    @property
    def program(self) -> str:
        """A single program that prints the answer."""
        text = str(self.start)
        for symbol, operand in self.operations:
            text = f"({text} {symbol} {operand})"
        return f"print{text}"

    def slipped(self, position: int) -> Chain:
        """The chain of someone who misread the operation at ``position``."""
        symbol, operand = self.operations[position]
        wrong = Operation(_SLIPS[symbol], operand)
        return replace(self, operations=(*self.operations[:position], wrong, *self.operations[position + 1 :]))


def draw_chain(rng: Random, num_operations: int) -> Chain:
    """A chain of non-negative results in which neither a shorter chain nor one slip gives the answer."""
    while True:
        chain = Chain(rng.randrange(2, _MAX_TERM + 1), tuple(_draw_operation(rng) for _ in range(num_operations)))
        results = [chain.start, *(call.printed for call in chain.calls)]
        slips = [chain.slipped(position).answer for position in range(num_operations)]
        if min(results) >= 0 and chain.answer not in (*results[:-1], *slips):
            return chain


def _draw_operation(rng: Random) -> Operation:
    symbol = rng.choice(tuple(_APPLY))
    return Operation(symbol, rng.randrange(2, (_MAX_FACTOR if symbol == "*" else _MAX_TERM) + 1))
