"""Maps and rules of the grid world: pure functions on a map and a state."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Cell = tuple[int, int]  # row, column

MOVES: Mapping[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
ACTIONS: tuple[str, ...] = (*MOVES, "take", "open")
_PLACES = {"A": "start", "K": "key", "D": "door", "G": "goal"}


@dataclass(frozen=True, slots=True)
class GridState:
    """Where the agent stands and what it has done."""

    cell: Cell
    has_key: bool = False
    door_open: bool = False


@dataclass(frozen=True, slots=True)
class GridMap:
    """A rectangle of ``height`` x ``width`` cells; what lies outside is wall."""

    height: int
    width: int
    walls: frozenset[Cell]
    start: Cell
    key: Cell
    door: Cell
    goal: Cell

    @property
    def start_state(self) -> GridState:
        return GridState(self.start)

    def is_free(self, cell: Cell, *, door_open: bool) -> bool:
        """Whether the agent can stand on ``cell``."""
        inside = 0 <= cell[0] < self.height and 0 <= cell[1] < self.width
        return inside and cell not in self.walls and (door_open or cell != self.door)


def parse_map(rows: Any) -> GridMap:
    """The map drawn in ``rows``, strings of equal length: ``#`` wall, ``.`` floor, ``A`` start, ``K`` key, ``D`` door,
    ``G`` goal, the last four once each.

    Raises:
        ValueError: it is not such a drawing, is larger than 10 x 10, or cannot be solved.
    """
    usable = isinstance(rows, (list, tuple)) and rows and all(isinstance(row, str) for row in rows)
    if not usable or len(rows) > 10 or len(rows[0]) > 10 or len({len(row) for row in rows}) != 1:
        raise ValueError("its 'map' must be a list of up to 10 strings of equal length, up to 10")
    return _parsed(tuple(rows))


@functools.lru_cache(maxsize=4096)  # every sample of a group plays on the same map
def _parsed(rows: tuple[str, ...]) -> GridMap:
    cells = {(y, x): mark for y, row in enumerate(rows) for x, mark in enumerate(row)}
    unknown = sorted(set(cells.values()) - set("#.") - set(_PLACES))
    places = {name: [cell for cell, seen in cells.items() if seen == mark] for mark, name in _PLACES.items()}
    if unknown or any(len(found) != 1 for found in places.values()):
        raise ValueError(f"its 'map' must hold A, K, D and G once each, else # and ., not {unknown or places}")
    grid = GridMap(
        height=len(rows),
        width=len(rows[0]),
        walls=frozenset(cell for cell, mark in cells.items() if mark == "#"),
        **{name: found[0] for name, found in places.items()},
    )
    if grid.start_state not in remaining_steps(grid):
        raise ValueError("its 'map' cannot be solved")
    return grid


def advance(grid: GridMap, state: GridState, action: str) -> GridState:
    """The state after ``action``, one of :data:`ACTIONS`; the same state if the action does nothing there.

    ``take`` works on the key's cell, ``open`` with the key on a cell beside the door.
    """
    if action == "take":
        return GridState(state.cell, has_key=state.has_key or state.cell == grid.key, door_open=state.door_open)
    if action == "open":
        beside = _distance(state.cell, grid.door) == 1
        return GridState(state.cell, state.has_key, door_open=state.door_open or (state.has_key and beside))
    dy, dx = MOVES[action]
    cell = (state.cell[0] + dy, state.cell[1] + dx)
    if not grid.is_free(cell, door_open=state.door_open):
        return state
    return GridState(cell, state.has_key, state.door_open)


def observe(grid: GridMap, state: GridState) -> str:
    """What the agent perceives: the next thing to deal with, where it lies from here, and which ways are blocked.

    For example ``key up2 left1 wall down``. Within one map different states give different texts.
    """
    name = "goal" if state.door_open else "door" if state.has_key else "key"
    target: Cell = getattr(grid, name)
    dy, dx = target[0] - state.cell[0], target[1] - state.cell[1]
    words = [name]
    if dy:
        words.append(f"{'down' if dy > 0 else 'up'}{abs(dy)}")
    if dx:
        words.append(f"{'right' if dx > 0 else 'left'}{abs(dx)}")
    if not (dy or dx):
        words.append("here")
    blocked = [move for move in MOVES if advance(grid, state, move) == state]
    return " ".join([*words, *(["wall", *blocked] if blocked else [])])


def remaining_steps(grid: GridMap) -> dict[GridState, int]:
    """Least number of actions to the goal, for every state from which it can be reached that the start leads to."""
    earlier: dict[GridState, set[GridState]] = {grid.start_state: set()}
    queue = deque(earlier)
    while queue:
        state = queue.popleft()
        if state.cell == grid.goal:  # the episode is over there
            continue
        for action in ACTIONS:
            after = advance(grid, state, action)
            if after not in earlier:
                earlier[after] = set()
                queue.append(after)
            earlier[after].add(state)
    steps = {state: 0 for state in earlier if state.cell == grid.goal}
    queue = deque(steps)
    while queue:
        state = queue.popleft()
        for before in earlier[state]:
            if before not in steps:
                steps[before] = steps[state] + 1
                queue.append(before)
    return steps


def _distance(one: Cell, other: Cell) -> int:
    return abs(one[0] - other[0]) + abs(one[1] - other[1])
