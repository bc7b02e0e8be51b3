"""Kept trajectories: exact round trip, selection, resume; and how they look in a terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spear_megatron.__main__ import main
from spear_megatron.observability import view
from spear_megatron.observability.trajectories import (
    TrajectoryStore,
    decode_line,
    encode,
    evenly_spaced,
    read_trajectories,
    recorded_steps,
    select,
)
from spear_megatron.types import Group, Prompt, RewardParts, Segment, StopReason, Trajectory, TrajectoryId


CALL = {"function": {"name": "run", "arguments": {"code": "f(1)"}}}
FIELDS = ("id", "reward", "stop_reason", "policy_version", "num_turns", "num_tool_calls", "messages", "error")


def decode(ids: Any) -> str:
    return "".join(chr(96 + token) for token in ids)


def make(step: int, task: int, sample: int, success: bool, text: str = "ok") -> Trajectory:
    generator = torch.Generator().manual_seed(step * 100 + task * 10 + sample)
    mask = torch.tensor([False, False, True, True, False, True])
    messages = (
        {"role": "user", "content": f"problem {task}"},
        {"role": "assistant", "content": f'{text}<tool_call>{{"name": "code_interpreter"}}</tool_call>'},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    )
    return Trajectory(
        id=TrajectoryId(step, task, sample),
        segments=(Segment(torch.arange(1, 7, dtype=torch.int32), mask, torch.randn(6, generator=generator) * mask),),
        reward=RewardParts(outcome=float(success), num_tool_calls=2, penalty=-0.5, success=success),
        stop_reason=StopReason.ANSWER,
        policy_version=step,
        num_turns=2,
        num_tool_calls=2,
        num_tool_failures=1,
        messages=messages,
    )


def groups(step: int, solved: bool = False, tasks: int = 3) -> list[Group]:
    made = []
    for task in range(tasks):
        messages = ({"role": "user", "content": f"problem {task}"},)
        prompt = Prompt(f"task-{task}", messages, answer="42", data_source="toy")
        members = tuple(make(step, task, sample, solved or (task, sample) == (1, 1)) for sample in range(2))
        made.append(Group(prompt, members))
    return made


def printed(item: Any, tokens: bool = False, colour: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="standard" if colour else None)
    view.show(console, item, tokens)
    return out.getvalue()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    (group,) = groups(4, tasks=1)
    assert TrajectoryStore(tmp_path, 8, decode).write(4, [group], {group.trajectories[0].id: 0.25}) == 2
    first, second = read_trajectories(tmp_path, 4)
    assert (first.reward, second.reward) == (0.25, 0.0)
    assert first.prompt == group.prompt
    for kept, original in zip((first, second), group.trajectories):
        for name in FIELDS:
            assert getattr(kept.trajectory, name) == getattr(original, name), name
        (segment,), (wanted,) = kept.trajectory.segments, original.segments
        for name in ("ids", "response_mask", "rollout_log_probs"):
            assert torch.equal(getattr(segment, name), getattr(wanted, name)), name
            assert getattr(segment, name).dtype == getattr(wanted, name).dtype
    assert [(span.text, span.trained, span.num_tokens) for span in first.spans[0]] == [
        ("ab", False, 2),
        ("cd", True, 2),
        ("e", False, 1),
        ("f", True, 1),
    ]


def test_step_wise_figures_survive_and_may_be_missing(tmp_path: Path) -> None:
    (group,) = groups(4, tasks=1)
    (segment,) = group.trajectories[0].segments
    versions = torch.tensor([-1, -1, 3, 4, -1, 5], dtype=torch.int32)
    first = dataclasses.replace(
        segment, observation_key="hall", policy_versions=versions, reward=0.25, num_invalid_actions=2
    )
    parts = RewardParts(outcome=0.25, success=True, num_tool_turns=3, num_invalid_actions=2)
    written = dataclasses.replace(group.trajectories[0], segments=(first, segment), reward=parts, num_tool_turns=3)
    TrajectoryStore(tmp_path, 8, decode).write(4, [Group(group.prompt, (written,))], {})
    (kept,) = read_trajectories(tmp_path, 4)
    assert kept.trajectory.num_tool_turns == 3 and kept.trajectory.reward == parts
    own, plain = kept.trajectory.segments
    assert (own.observation_key, own.reward, own.num_invalid_actions) == ("hall", 0.25, 2)
    assert own.policy_versions is not None and torch.equal(own.policy_versions, versions)
    assert own.policy_versions.dtype == torch.int32 and plain.policy_versions is None

    line = encode(written, group.prompt, 0.0, decode)  # as files from before these figures were kept look
    del line["num_tool_turns"]
    for part in line["segments"]:
        for name in ("policy_versions", "reward", "num_invalid_actions"):
            del part[name]
    for name in ("num_tool_turns", "num_invalid_actions"):
        del line["reward_parts"][name]
    old = decode_line(line).trajectory
    assert (old.num_tool_turns, old.reward.num_tool_turns, old.reward.num_invalid_actions) == (0, 0, 0)
    assert all(part.policy_versions is None for part in old.segments)
    assert [(part.reward, part.num_invalid_actions) for part in old.segments] == [(0.0, 0)] * 2


def test_at_most_so_many_are_kept_with_best_and_worst(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path, 3, decode)
    ids = [run.id for group in groups(1) for run in group.trajectories]
    rewards = {name: float(index) for index, name in enumerate(ids)}
    rewards[TrajectoryId(1, 0, 0)] = 2.5
    assert store.write(1, groups(1), rewards) == 3
    kept = [item.reward for item in read_trajectories(tmp_path, 1)]
    assert len(kept) == 3 and {1.0, 5.0} <= set(kept)
    assert TrajectoryStore(tmp_path, 0, decode).write(2, groups(2), {}) == 0


def test_wanted_trajectories_are_kept_besides(tmp_path: Path) -> None:
    ids = [run.id for group in groups(1) for run in group.trajectories]
    rewards = {name: float(index) for index, name in enumerate(ids)}
    store = TrajectoryStore(tmp_path, 2, decode)
    chosen = {ids[0], ids[3]}  # evenly spread
    assert store.write(1, groups(1), rewards) == 2
    assert {item.trajectory.id for item in read_trajectories(tmp_path, 1)} == chosen
    assert store.write(1, groups(1), rewards, keep_ids=[ids[3], ids[1], ids[4], ids[2], TrajectoryId(0, 0, 0)]) == 4
    kept = [item.trajectory.id for item in read_trajectories(tmp_path, 1)]
    assert kept == sorted(chosen | {ids[4], ids[2]})  # as many again, those of largest reward
    assert store.write(2, groups(2), {}, keep_ids=()) == 2
    assert TrajectoryStore(tmp_path, 0, decode).write(3, groups(3), {}, keep_ids=[TrajectoryId(3, 0, 0)]) == 0


def test_selection() -> None:
    assert evenly_spaced(10, 5) == [0, 2, 4, 6, 8] and evenly_spaced(3, 5) == [0, 1, 2] and evenly_spaced(3, 0) == []
    assert select([5.0, 1.0, 3.0, 9.0, 2.0, 4.0], 4) == [0, 1, 3, 4]
    for limit in range(8):
        chosen = select([0.0] * 6, limit)
        assert len(chosen) == min(limit, 6) and chosen == sorted(set(chosen))


def test_resume_removes_later_steps_of_this_shard_only(tmp_path: Path) -> None:
    for shard in (0, 1):
        store = TrajectoryStore(tmp_path, 2, decode, shard=shard)
        for step in (1, 2, 3):
            store.write(step, groups(step), {})
    TrajectoryStore(tmp_path, 2, decode, shard=0, resume_step=1)
    assert recorded_steps(tmp_path) == [1, 2, 3]
    assert len(read_trajectories(tmp_path, 1)) == 4 and len(read_trajectories(tmp_path, 3)) == 2
    assert not list(tmp_path.rglob(".*tmp"))


def test_steps_that_are_done_again_by_fewer_ranks_keep_nothing_of_the_first_time(tmp_path: Path) -> None:
    for shard in (0, 1, 2):
        store = TrajectoryStore(tmp_path, 2, decode, shard=shard, num_shards=3)
        for step in (1, 2):
            store.write(step, groups(step), {})
    TrajectoryStore(tmp_path, 2, decode, shard=1, resume_step=1, num_shards=2)
    TrajectoryStore(tmp_path, 2, decode, shard=0, resume_step=1, num_shards=2)
    assert recorded_steps(tmp_path) == [1] and len(read_trajectories(tmp_path, 1)) == 6


def test_missing_and_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 5):
        TrajectoryStore(tmp_path, 2, decode, resume_step=9).write(step, groups(step), {})
    with pytest.raises(FileNotFoundError, match="no train trajectories of step 3; kept steps: 1-2, 5"):
        read_trajectories(tmp_path, 3)
    path = next(tmp_path.rglob("step_000002*"))
    path.write_text(path.read_text().replace("stop_reason", "stop_raison"))
    with pytest.raises(ValueError, match="line 1 is damaged: KeyError"):
        read_trajectories(tmp_path, 2)


def test_conversation_shows_roles_calls_reward_and_stop(tmp_path: Path) -> None:
    TrajectoryStore(tmp_path, 8, decode).write(1, groups(1), {})
    text = printed(read_trajectories(tmp_path, 1)[0])
    parts = "1-0-0|not solved|stop: answer|outcome +0|penalty -0.5|2 tool calls|3 of 6 tokens|user (masked)|42"
    for part in (parts + "|assistant (trained)|tool response (masked)|<tool_call>|run: f(1)").split("|"):
        assert part in text, part
    assert text.count("problem 0") == 1  # the opening message is not repeated


def test_the_reward_of_the_header_adds_up(tmp_path: Path) -> None:
    (group,) = groups(1, tasks=1)
    TrajectoryStore(tmp_path, 8, decode).write(1, [group], {group.trajectories[0].id: -0.4})
    shaped, plain = map(printed, read_trajectories(tmp_path, 1))
    assert "reward -0.400 = outcome +0, penalty -0.5, shaping +0.100 (tool calls, format, KL)" in shaped
    assert "shaping +0.500" in plain  # without a reward of its own it is kept with the outcome


def test_tokens_show_the_mask_with_and_without_colours(tmp_path: Path) -> None:
    TrajectoryStore(tmp_path, 8, decode).write(1, groups(1), {})
    item = read_trajectories(tmp_path, 1)[0]
    assert "ab«cd»e«f»" in printed(item, tokens=True)
    coloured = "\x1b[2mab\x1b[0m\x1b[32mcd\x1b[0m\x1b[2me\x1b[0m\x1b[32mf\x1b[0m"
    assert coloured in printed(item, tokens=True, colour=True)


def test_model_text_is_neither_markup_nor_terminal_codes(tmp_path: Path) -> None:
    run = make(1, 0, 0, True, text="[bold]x[/bold] \x1b[2J\x07 [/nonsense]")
    TrajectoryStore(tmp_path, 8, decode).write(1, [Group(Prompt("t", ({"role": "user", "content": "p"},)), (run,))], {})
    text = printed(read_trajectories(tmp_path, 1)[0])
    assert "[bold]x[/bold]" in text and "[/nonsense]" in text and "\\x1b[2J\\x07" in text and "\x1b" not in text


def test_pick_and_before_after(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path, 8, decode)
    assert view.find_learned(str(tmp_path)) is None
    store.write(0, groups(0), {}, kind="val")
    store.write(9, groups(9, solved=True), {}, kind="val")
    kept = read_trajectories(tmp_path, 0, "val")
    assert view.pick(kept, "best").trajectory.id == (0, 1, 1)
    assert view.pick(kept, "worst").trajectory.id == (0, 0, 0)
    learned = view.find_learned(str(tmp_path))
    assert learned is not None
    assert [item.trajectory.id for item in learned] == [(0, 0, 0), (9, 0, 0)]
    out = io.StringIO()
    Console(file=out, width=120).print(view.side_by_side(*learned, ("step 0", "step 9")))
    text = out.getvalue()
    for part in ("problem 0", "expected answer: 42", "step 0", "step 9", "not solved"):
        assert part in text, part


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["step 2, train", "2-1-1", "solved"]),
        (["--step", "1", "--worst"], ["step 1, train", "1-0-0  task-0  not solved"]),
        (["--all"], ["2-0-0  task-0", "2-2-1  task-2"]),
        (["--id", "1-1-0"], ["1-1-0  task-1"]),
        (["--id", "1-1-0", "--tokens"], ["«cd»"]),
    ],
)
def test_view_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]) -> None:
    for step in (1, 2):
        TrajectoryStore(tmp_path, 8, decode, resume_step=5).write(step, groups(step), {})
    assert main(["view", str(tmp_path), *options]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in parts), text


def test_a_trajectory_is_found_in_the_step_that_trained_on_it(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path, 8, decode)
    for step, began in ((1, 1), (4, 2), (5, 5)):  # the groups of step 2 were stopped and went on in step 4
        store.write(step, groups(began), {})
    for key in (TrajectoryId(2, 1, 0), TrajectoryId(5, 0, 1), TrajectoryId(1, 2, 1)):
        assert view.find(str(tmp_path), key, "train").trajectory.id == key
    with pytest.raises(ValueError, match="kept of step 1: 1-0-0"):
        view.find(str(tmp_path), TrajectoryId(1, 7, 7), "train")
    with pytest.raises(FileNotFoundError):
        view.find(str(tmp_path), TrajectoryId(3, 0, 0), "train")
    assert view.find_kept(str(tmp_path), TrajectoryId(3, 0, 0)) is None


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--id", "x"], "step-task-sample"),
        (["--id", "1-7-7"], "not among those kept of step 1: 1-0-0"),
        (["--step", "4"], "kept steps: 1"),
        (["--kind", "val"], "trainer.num_logged_trajectories"),
    ],
)
def test_view_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], part: str) -> None:
    TrajectoryStore(tmp_path, 8, decode).write(1, groups(1), {})
    assert main(["view", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error
