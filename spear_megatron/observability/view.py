"""Trajectories in a terminal: conversation, tool calls, which tokens were trained on, reward parts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spear_megatron.observability.trajectories import (
    KeptTrajectory,
    Kind,
    Span,
    read_trajectories,
    recorded_steps,
)
from spear_megatron.types import TrajectoryId

_ROLE_STYLES = {"system": "dim", "user": "cyan", "assistant": "green", "tool": "yellow"}
_TOOL_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LEGEND = "green: sampled by the policy and trained on; dim: inserted, masked out of the loss"
_PLAIN_LEGEND = "«...»: sampled by the policy and trained on; the rest was inserted and is masked out of the loss"


def parse_id(text: str, option: str = "--id") -> TrajectoryId:
    """``step-task-sample``, given to ``option``, as an id.

    Raises:
        ValueError: it is not three numbers.
    """
    match = re.fullmatch(r"(\d+)-(\d+)-(\d+)", text.strip())
    if match is None:
        raise ValueError(f"{option} {text!r} is not a trajectory id; give step-task-sample, such as 12-3-0")
    return TrajectoryId(*(int(part) for part in match.groups()))


def pick(kept: Sequence[KeptTrajectory], which: Literal["best", "worst"]) -> KeptTrajectory:
    """The trajectory of largest (smallest) reward; of equals the one of smallest id."""
    sign = -1.0 if which == "best" else 1.0
    return min(kept, key=lambda item: (sign * item.reward, item.trajectory.id))


def find(run_dir: str, trajectory: TrajectoryId, kind: Kind) -> KeptTrajectory:
    """The kept trajectory with this id, of the step that trained on it.

    Raises:
        FileNotFoundError: nothing is kept of its step.
        ValueError: the step is there but not this trajectory; names those that are.
    """
    if (found := find_kept(run_dir, trajectory, kind)) is not None:
        return found
    kept = read_trajectories(run_dir, trajectory.step, kind)
    there = ", ".join(str(item.trajectory.id) for item in kept)
    raise ValueError(f"trajectory {trajectory} is not among those kept of step {trajectory.step}: {there}")


def find_kept(run_dir: str, trajectory: TrajectoryId, kind: Kind = "train") -> KeptTrajectory | None:
    """The kept trajectory with this id; None without it.

    An id carries the step that began its group. With partial rollouts a later step may have trained on it.
    """
    for step in recorded_steps(run_dir, kind):
        if step < trajectory.step:
            continue
        for item in read_trajectories(run_dir, step, kind):
            if item.trajectory.id == trajectory:
                return item
    return None


def last_step(run_dir: str, kind: Kind) -> int:
    """The newest step with kept trajectories.

    Raises:
        FileNotFoundError: the run kept none.
    """
    steps = recorded_steps(run_dir, kind)
    if not steps:
        raise FileNotFoundError(
            f"{run_dir} keeps no {kind} trajectories; train with trainer.num_logged_trajectories above 0"
        )
    return steps[-1]


def show_step(console: Console, kept: Sequence[KeptTrajectory], title: str) -> None:
    """Print one row per trajectory."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0))
    for name in ("id", "reward", "success", "turns", "calls", "failed", "tokens", "stop"):
        table.add_column(name, justify="left" if name in ("id", "stop") else "right", no_wrap=True)
    table.add_column("problem", no_wrap=True, overflow="ellipsis", ratio=1)  # on a narrow terminal this one gives way
    for item in kept:
        run = item.trajectory
        table.add_row(
            str(run.id), f"{item.reward:+.3f}", "yes" if run.reward.success else "no",
            str(run.num_turns), str(run.num_tool_calls), str(run.num_tool_failures), str(run.num_response_tokens),
            run.stop_reason.value, Text(safe(problem_text(item))[:60].replace("\n", " ")),
        )  # fmt: skip
    console.print(table)


def show(console: Console, item: KeptTrajectory, tokens: bool = False) -> None:
    """Print one trajectory: its messages, or with ``tokens`` the verbatim text coloured by the loss mask."""
    colour = console.color_system is not None
    console.print(header(item))
    if tokens:
        console.print(Text(_LEGEND if colour else _PLAIN_LEGEND, style="italic"))
        for index, spans in enumerate(item.spans):
            console.print(Panel(span_text(spans, colour), title=f"segment {index}", title_align="left"))
    else:
        console.print(conversation(item))
    if item.trajectory.error:
        console.print(Text(f"error: {safe(item.trajectory.error)}", style="red"))


def header(item: KeptTrajectory) -> Text:
    """Id, reward parts, stop reason and counts in three lines."""
    run, parts = item.trajectory, item.trajectory.reward
    trained, total = run.num_response_tokens, run.num_tokens
    text = Text(f"{run.id}  {item.prompt.task_id}  ", style="bold")
    text.append("solved" if parts.success else "not solved", style="green" if parts.success else "red")
    text.append(f"  stop: {run.stop_reason.value}  policy version {run.policy_version}\n")
    rest = item.reward - parts.outcome - parts.penalty
    shaping = f", shaping {rest:+.3f} (tool calls, format, KL)" if abs(rest) >= 5e-4 else ""  # not of NaN
    text.append(
        f"reward {item.reward:+.3f} = outcome {parts.outcome:+g}, penalty {parts.penalty:+g}{shaping}\n"
        f"{run.num_turns} turns, {run.num_tool_calls} tool calls "
        f"({run.num_tool_failures} failed), {trained} of {total} tokens trained on",
        style="not bold",
    )
    return text


def conversation(item: KeptTrajectory) -> RenderableType:
    """The messages as panels in the colour of their role; opening messages first where the episode lacks them."""
    messages = item.trajectory.messages
    opening = item.prompt.messages
    if list(messages[: len(opening)]) != list(opening):
        messages = (*opening, *messages)
    panels: list[RenderableType] = [message_panel(message) for message in messages]
    if item.prompt.answer is not None:
        panels.append(Text(f"expected answer: {safe(item.prompt.answer)}", style="italic"))
    return Group(*panels)


def span_text(spans: Sequence[Span], colour: bool) -> Text:
    """Verbatim tokens: trained ones green, inserted ones dim; without colours, trained ones in guillemets."""
    text = Text()
    for span in spans:
        body = safe(span.text)
        text.append(body if colour or not span.trained else f"«{body}»", style="green" if span.trained else "dim")
    return text


def side_by_side(before: KeptTrajectory, after: KeptTrajectory, titles: tuple[str, str]) -> RenderableType:
    """Two attempts at one problem, next to each other, below the problem itself."""
    columns = Table.grid(expand=True, padding=(0, 1))
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    cells = []
    for item, title in zip((before, after), titles):
        solved = item.trajectory.reward.success
        opening = len(item.prompt.messages)
        starts_alike = list(item.trajectory.messages[:opening]) == list(item.prompt.messages)
        messages = item.trajectory.messages[opening:] if starts_alike else item.trajectory.messages
        verdict = Text("solved" if solved else "not solved", style="bold green" if solved else "bold red")
        body = Group(verdict, *(message_panel(message) for message in messages))
        cells.append(Panel(body, title=title, border_style="green" if solved else "red"))
    columns.add_row(*cells)
    answer = f"\nexpected answer: {item.prompt.answer}" if item.prompt.answer is not None else ""
    text = Text(safe(problem_text(before) + answer))
    return Group(Panel(text, title="problem", title_align="left", border_style="cyan"), columns)


def find_learned(run_dir: str, kind: Kind = "val") -> tuple[KeptTrajectory, KeptTrajectory] | None:
    """A problem that failed at the first kept step and was solved at the last one, as (before, after); else None."""
    steps = recorded_steps(run_dir, kind)
    if len(steps) < 2:
        return None
    failed: dict[str, KeptTrajectory] = {}
    for item in read_trajectories(run_dir, steps[0], kind):
        if item.trajectory.valid and not item.trajectory.reward.success:
            failed.setdefault(item.prompt.task_id, item)
    for item in read_trajectories(run_dir, steps[-1], kind):
        if item.trajectory.reward.success and item.prompt.task_id in failed:
            return failed[item.prompt.task_id], item
    return None


def problem_text(item: KeptTrajectory) -> str:
    """Text of the last opening user message."""
    contents = [str(message.get("content") or "") for message in item.prompt.messages if message.get("role") == "user"]
    return contents[-1] if contents else ""


def message_panel(message: Mapping[str, Any]) -> Panel:
    """One chat message in a frame that says who speaks and whether its tokens are trained on."""
    role = str(message.get("role", "?"))
    style = _ROLE_STYLES.get(role, "white")
    body = Text(safe(str(message.get("content") or "")), style=style)
    body.highlight_regex(_TOOL_CALL, "bold magenta")
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        shown = arguments.get("code") if isinstance(arguments, Mapping) and set(arguments) == {"code"} else None
        text = shown if isinstance(shown, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        if body:
            body.append("\n")
        body.append(safe(f"{function.get('name', '?')}: {text}"), style="bold magenta")
    titles = {"assistant": "assistant (trained)", "tool": "tool response (masked)"}
    return Panel(body, title=titles.get(role, f"{role} (masked)"), title_align="left", border_style=style)


def safe(text: str) -> str:
    """Model output may hold terminal control codes: shown, not obeyed."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
