"""Tasks and demonstrations of the built-in grid world, written as JSON lines.

``python -m spear_megatron.data.grid_tasks OUT --num 400 --num-val 100 --size 4`` writes ``train.jsonl`` and
``val.jsonl``: rows of id, problem, answer (the least number of steps) and map, no map twice. ``--demonstrations N``
also writes ``demonstrations.jsonl``, conversations for ``sft.train_files``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from spear_megatron.environments.grid_map import ACTIONS, GridState, advance, observe, parse_map, remaining_steps
from spear_megatron.environments.grid_world import step_text
from spear_megatron.parallel.seeds import derive_key

PROBLEM = "Take the key, open the door, reach the goal."
_ATTEMPTS = 1000


@dataclass(frozen=True, slots=True)
class GridTask:
    """One map (see :func:`spear_megatron.environments.grid_map.parse_map`) and the least number of steps it takes."""

    id: str
    rows: tuple[str, ...]
    num_steps: int


def draw_tasks(
    count: int, *, seed: int, size: int, num_obstacles: int = 2, min_steps: int = 1, max_steps: int = 100
) -> list[GridTask]:
    """``count`` different maps of ``size`` x ``size`` cells: two rooms, a wall with a door between them, obstacles.

    Start and key lie in one room, the goal in the other; the shortest way takes ``min_steps`` to ``max_steps`` steps.
    Equal arguments give equal maps, and fewer maps are the first of more.

    Raises:
        ValueError: a size outside 3..10, or so many different maps of that kind were not found.
    """
    if not 3 <= size <= 10:
        raise ValueError(f"--size must lie between 3 and 10, got {size}")
    rng = Random(derive_key(seed, "grid/maps", size))
    tasks: list[GridTask] = []
    seen: set[tuple[str, ...]] = set()
    failures = 0
    while len(tasks) < count:
        rows = _draw_map(rng, size, num_obstacles)
        num_steps = _solution_length(rows)
        if rows in seen or num_steps is None or not min_steps <= num_steps <= max_steps:
            failures += 1
            if failures > _ATTEMPTS:
                raise ValueError(
                    f"found {len(tasks)} of {count} maps: lower --num, --obstacles or --min-steps, "
                    "or raise --size or --max-steps"
                )
            continue
        failures = 0
        seen.add(rows)
        tasks.append(GridTask(f"grid{size}-{seed}-{len(tasks)}", rows, num_steps))
    return tasks


def demonstrations(
    tasks: Sequence[GridTask], *, skill: float, seed: int, max_steps: int, history: int
) -> Iterator[list[dict[str, Any]]]:
    """One episode per task by a half-skilled demonstrator, as one conversation (prompt, action) per step.

    With probability ``skill`` it takes an action that brings it nearer to the goal, else any action that changes
    something: an imitator acts validly and knows what can be done, but rarely gets there.

    Raises:
        ValueError: ``skill`` is not a probability.
    """
    if not 0 <= skill <= 1:
        raise ValueError(f"--skill must lie between 0 and 1, got {skill}")
    for index, task in enumerate(tasks):
        yield from _episode(task, skill, Random(derive_key(seed, "grid/demonstrations", index)), max_steps, history)


def _episode(
    task: GridTask, skill: float, rng: Random, max_steps: int, history: int
) -> Iterator[list[dict[str, Any]]]:
    grid = parse_map(task.rows)
    remaining, state = remaining_steps(grid), grid.start_state
    steps: list[tuple[str, str]] = []
    while state.cell != grid.goal and len(steps) < max_steps:
        after: dict[str, GridState] = {action: advance(grid, state, action) for action in ACTIONS}
        choices = [action for action in ACTIONS if after[action] != state]
        if rng.random() < skill:
            choices = [action for action in choices if remaining.get(after[action], len(remaining)) < remaining[state]]
        action, seen = rng.choice(choices), observe(grid, state)
        shown = steps[len(steps) - min(history, len(steps)) :]
        yield [
            {"role": "user", "content": step_text(PROBLEM, shown, seen)},
            {"role": "assistant", "content": action},
        ]
        steps.append((seen, action))
        state = after[action]


def _draw_map(rng: Random, size: int, num_obstacles: int) -> tuple[str, ...]:
    """Two rooms side by side or one above the other, everything in them placed at random."""
    middle, gap = rng.randrange(1, size - 1), rng.randrange(size)
    near = [(y, x) for y in range(size) for x in range(middle)]
    far = [(y, x) for y in range(size) for x in range(middle + 1, size)]
    if rng.random() < 0.5:
        near, far = far, near
    marks = dict.fromkeys(((y, middle) for y in range(size)), "#")
    marks[gap, middle] = "D"
    marks.update(zip(rng.sample(near, 2), "AK", strict=True))
    marks[rng.choice(far)] = "G"
    floor = [cell for cell in (*near, *far) if cell not in marks]
    marks.update(dict.fromkeys(rng.sample(floor, min(num_obstacles, len(floor))), "#"))
    across = rng.random() < 0.5
    return tuple(
        "".join(marks.get((x, y) if across else (y, x), ".") for x in range(size)) for y in range(size)
    )


def _solution_length(rows: tuple[str, ...]) -> int | None:
    try:
        grid = parse_map(rows)
    except ValueError:  # an obstacle shuts the way
        return None
    return remaining_steps(grid)[grid.start_state]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m spear_megatron.data.grid_tasks", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the files")
    parser.add_argument("--num", type=int, default=4000, help="training maps")
    parser.add_argument("--num-val", type=int, default=100, help="held-out maps")
    parser.add_argument("--seed", type=int, default=0, help="keys the maps and the demonstrator")
    parser.add_argument("--size", type=int, default=4, help="cells per side")
    parser.add_argument("--obstacles", type=int, default=2, help="single walls in the rooms")
    parser.add_argument("--min-steps", type=int, default=8, help="leave out maps that take fewer steps")
    parser.add_argument("--demonstrations", type=int, default=0, help="episodes, on the first training maps")
    parser.add_argument("--skill", type=float, default=0.2, help="share of steps on a shortest way")
    parser.add_argument("--max-steps", type=int, default=16, help="of tasks and demonstrations: env.kwargs.max_steps")
    parser.add_argument("--history", type=int, default=2, help="steps that a prompt shows (env.kwargs.history)")
    args = parser.parse_args(argv)
    try:
        written = write_files(args)
    except ValueError as error:
        parser.error(str(error))
    for path, count in written.items():
        print(f"wrote {path}: {count} rows")
    return 0


def write_files(args: argparse.Namespace) -> dict[Path, int]:
    """Draw and write everything; returns the number of rows per file. ValueError as in the functions above."""
    if args.num < 1 or args.num_val < 0 or not 0 <= args.demonstrations <= args.num:
        raise ValueError("--num must be at least 1, --num-val at least 0 and --demonstrations at most --num")
    tasks = draw_tasks(
        args.num + args.num_val,
        seed=args.seed, size=args.size, num_obstacles=args.obstacles,
        min_steps=args.min_steps, max_steps=args.max_steps,
    )  # fmt: skip
    train = tasks[: args.num]
    files: dict[str, list[Any]] = {"train": [_row(task) for task in train]}
    if args.num_val:
        files["val"] = [_row(task) for task in tasks[args.num :]]
    if args.demonstrations:
        shown = demonstrations(
            train[: args.demonstrations],
            skill=args.skill, seed=args.seed, max_steps=args.max_steps, history=args.history,
        )  # fmt: skip
        files["demonstrations"] = [{"messages": messages} for messages in shown]
    args.out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        written[path] = len(rows)
    return written


def _row(task: GridTask) -> dict[str, Any]:
    return {"id": task.id, "problem": PROBLEM, "answer": task.num_steps, "map": list(task.rows)}


if __name__ == "__main__":
    raise SystemExit(main())
