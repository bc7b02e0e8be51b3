"""The lineage of a trajectory as one page of a terminal, and the trajectories that a run replayed most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spear_megatron.observability.lineage import Lineage, Use, most_replayed, read_lineage, trace
from spear_megatron.observability.trajectories import KeptTrajectory
from spear_megatron.observability.view import find_kept, header, problem_text, safe
from spear_megatron.types import TrajectoryId

_ACTOR = "actor_rollout_ref.actor"
_RULES = {
    "advantage": f"its advantage was not above {_ACTOR}.trajectory_score_threshold",
    "requirement": f"it lacked what {_ACTOR}.replay.require asks for",
}
_REASONS = ("overlong", "incomplete", "repetitive", "unreadable")
_LISTED = 20
_EXCERPT = 400


def show_lineage(console: Console, run_dir: str, id: TrajectoryId) -> None:
    """Print how ``id`` came about, whether it was pushed, every use of it in the loss, and how it left the buffer.

    Raises:
        FileNotFoundError: the run has no lineage.
        ValueError: neither the lineage nor the kept trajectories know ``id``.
    """
    lineage = trace(run_dir, id)
    item = find_kept(run_dir, id)
    if item is None and not lineage.known:
        raise ValueError(
            f"the lineage of {run_dir}, up to step {lineage.last_step}, does not mention trajectory {id}; "
            "'view RUN_DIR --lineage' lists the most replayed ones"
        )
    if item is None:
        console.print(Text(str(id), style="bold"))
        console.print(Text("conversation not kept: trainer.num_logged_trajectories bounds how many are", style="dim"))
    else:
        console.print(header(item))
        _show_conversation(console, item)
    console.print()
    console.print(_entry(lineage))
    if lineage.uses:
        console.print(_uses(lineage.uses))
        console.print(Text("cov: tokens that lost their gradient; weight: of a token in the loss", style="dim"))
    if lineage.pushed or lineage.uses:
        console.print(_exit(lineage))


def show_most_replayed(console: Console, run_dir: str) -> None:
    """Print one row for each of the trajectories that were replayed most.

    Raises:
        FileNotFoundError: the run has no lineage.
    """
    events = read_lineage(run_dir)
    lineages = most_replayed(events, _LISTED)
    last = events[-1].step if events else 0
    pushed = sum(len(event.pushed) for event in events)
    replayed = len({item.id for event in events for item in event.used})
    console.print(Text(f"{run_dir}: {pushed} trajectories pushed and {replayed} of them replayed up to step {last}"))
    if not lineages:
        console.print(Text("nothing was replayed; 'doctor RUN_DIR' looks for the reason"))
        return
    table = _table("id", "uses", "steps", "age", "base", "bonus", "A", "A~", "tokens", "cov", "buffer")
    for lineage in lineages:
        uses, entry = lineage.uses, lineage.pushed
        at_push = (None, None, None) if entry is None else (entry.base, entry.bonus, entry.advantage)
        table.add_row(
            str(lineage.id), str(len(uses)), f"{uses[0].step}-{uses[-1].step}", str(max(use.used.age for use in uses)),
            *map(_signed, at_push), _signed(uses[-1].used.advantage), str(uses[-1].used.tokens),
            str(sum(use.used.selected for use in uses)),
            f"{lineage.left[1]} {lineage.left[0]}" if lineage.left else "in",
        )  # fmt: skip
    console.print(table)
    console.print(Text(
        "age: largest; A: in its group; A~: recalibrated, last use; cov: tokens that lost their gradient, all uses.\n"
        "--lineage ID shows one trajectory", style="dim",
    ))  # fmt: skip


def _show_conversation(console: Console, item: KeptTrajectory) -> None:
    """The problem, and each later message in one line."""
    console.print(Text(f"problem: {_excerpt(problem_text(item), _EXCERPT)}", style="cyan"))
    opening = len(item.prompt.messages)
    starts_alike = list(item.trajectory.messages[:opening]) == list(item.prompt.messages)
    for number, message in enumerate(item.trajectory.messages[opening if starts_alike else 0 :], 1):
        text = Text(f"{number:>3} {message.get('role', '?'):<9} ", style="bold")
        text.append(_excerpt(_said(message), _EXCERPT), style="not bold")
        console.print(text, no_wrap=True, overflow="ellipsis")
    if item.prompt.answer is not None:
        console.print(Text(f"expected answer: {safe(item.prompt.answer)}", style="italic"))


def _said(message: Mapping[str, Any]) -> str:
    parts = [str(message.get("content") or "")]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        parts.append(f"{function.get('name', '?')}({function.get('arguments', '')})")
    return " ".join(part for part in parts if part)


def _excerpt(text: str, limit: int) -> str:
    """``text`` in one line, its start and, as an answer stands at the end, its end."""
    line = " ".join(safe(text).split())
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[-limit // 3 :]}"


def _entry(lineage: Lineage) -> Text:
    """Pushed, rejected or filtered, and why."""
    mu = "" if lineage.mu is None else f"  mu {lineage.mu:.3f}"
    step = lineage.id.step if lineage.step is None else lineage.step
    text = Text(f"step {step}{mu}  ", style="bold")
    if lineage.filtered is not None:
        key = f" (algorithm.filter_{lineage.filtered}_responses)" if lineage.filtered in _REASONS else ""
        text.append(f"filtered: {lineage.filtered}{key}, carries no loss", style="yellow")
    elif lineage.pushed is not None:
        entry = lineage.pushed
        text.append("pushed into the replay buffer", style="green")
        text.append(
            f"\ngroup advantage {entry.advantage:+.3f}, {entry.tokens} sampled tokens\n"
            f"reward {entry.reward:+.3f} = base {entry.base:+.3f} + mu * tool bonus {entry.bonus:.3f}",
            style="not bold",
        )
    elif lineage.rejected is not None:
        why = _RULES.get(lineage.rejected)
        text.append(f"not pushed, rule '{lineage.rejected}'{f': {why}' if why else ''}", style="yellow")
    else:
        text.append("the lineage does not say whether it was pushed", style="yellow")
    return text


def _uses(uses: tuple[Use, ...]) -> Table:
    table = _table("replayed", "update", "age", "mu", "gamma", "P50", "reward", "A~", "tokens", "cov", "weight")
    for use in uses:
        item = use.used
        table.add_row(
            f"step {use.step}", str(item.update), str(item.age), f"{use.mu:.3f}", f"{use.gamma:.3f}",
            "-" if use.p50 is None else f"{use.p50:+.3f}", _signed(item.reward), _signed(item.advantage),
            str(item.tokens), str(item.selected), f"{item.weight:.2e}",
        )  # fmt: skip
    return table


def _exit(lineage: Lineage) -> Text:
    if lineage.left is None:
        return Text(f"still in the buffer at step {lineage.last_step}, the last of the lineage")
    step, way = lineage.left
    why = {"expired": "too old", "evicted": "the buffer was full or cleared after use"}[way]
    times = f"{len(lineage.uses)} use{'' if len(lineage.uses) == 1 else 's'}"
    return Text(f"left the buffer at step {step}: {way} ({why}), after {times}")


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _signed(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:+.3f}"
