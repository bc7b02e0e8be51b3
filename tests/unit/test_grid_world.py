"""The grid world: rules, texts, sparse reward, tasks that can be solved, demonstrations that look like episodes."""

from __future__ import annotations

import asyncio
import json
from itertools import product
from pathlib import Path

import pytest
from scripted import ScriptedEngine, tiny_renderer
from spear_megatron.data.grid_tasks import PROBLEM, demonstrations, draw_tasks, main
from spear_megatron.data.prompts import DataConfig, load_prompts
from spear_megatron.data.sft import encode_conversations, load_conversations
from spear_megatron.data.tiny import build_tokenizer, conversation_texts
from spear_megatron.environments.grid_map import ACTIONS, GridState, advance, observe, parse_map, remaining_steps
from spear_megatron.environments.grid_world import GridWorldEnvironment, read_action
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.rewards.environment import EnvironmentReward
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode
from spear_megatron.rollout.engine import SamplingParams
from spear_megatron.testing import check_environment
from spear_megatron.types import Prompt, StopReason, Trajectory, TrajectoryId

ROWS = ["A.#.", "..DG", "K.#."]
WAY = ["down", "down", "take", "up", "right", "open", "right", "right"]


def prompt_of(rows: object = ROWS) -> Prompt:
    return Prompt("room", ({"role": "user", "content": PROBLEM},), answer="8", extra={"map": rows})


def walk(words: list[str], **kwargs: int) -> list[StepResult]:
    async def episode() -> list[StepResult]:
        environment = GridWorldEnvironment(**kwargs)
        await environment.reset(prompt_of())
        return [await environment.step(Turn(word, (), True)) for word in words]

    return asyncio.run(episode())


def text_of(observation: Observation | None) -> str:
    assert observation is not None
    return str(observation.messages[-1]["content"])


def test_the_way_gives_one_reward_at_its_end() -> None:
    steps = walk(WAY)
    assert [step.reward for step in steps] == [0.0] * 7 + [1.0]
    assert [step.done for step in steps] == [step.success for step in steps] == [False] * 7 + [True]
    assert all((step.num_tool_calls, step.num_tool_failures, step.num_invalid_actions) == (1, 0, 0) for step in steps)
    keys = [step.observation.observation_key for step in steps if step.observation]
    assert keys == [
        "key down1 wall left", "key here wall down left", "door up1 right2 wall down left", "door right2 wall left",
        "door right1 wall right", "goal right2", "goal right1 wall up down",
    ]  # fmt: skip


def test_prompts_hold_task_history_and_observation() -> None:
    assert text_of(GridWorldEnvironment.opening(prompt_of())) == f"{PROBLEM}\nkey down2 wall up left"
    shown = [text_of(step.observation).split("\n") for step in walk(WAY[:3])]
    assert shown[0] == [PROBLEM, "key down2 wall up left: down", "key down1 wall left"]
    assert shown[1] == [PROBLEM, "key down2 wall up left: down", "key down1 wall left: down", "key here wall down left"]
    assert shown[2][1:3] == ["key down1 wall left: down", "key here wall down left: take"]
    assert text_of(walk(WAY[:3], history=0)[2].observation) == f"{PROBLEM}\ndoor up1 right2 wall down left"


def test_useless_and_invalid_actions_change_nothing() -> None:
    steps = walk(["left", "open", "take", "jump", "go up please", ""])
    assert {step.observation.observation_key for step in steps if step.observation} == {"key down2 wall up left"}
    assert [step.num_tool_calls for step in steps] == [1, 1, 1, 0, 0, 0]
    assert [step.num_invalid_actions for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [step.num_tool_failures for step in steps] == [1] * 6
    assert text_of(steps[3].observation).split("\n")[-2].endswith(": invalid")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("up", "up"), (" Take\n", "take"), ("<action>open</action>", "open"), ("<action> left </action>", "left"),
        ("", None), ("up down", None), ("jump", None), ("up!", None), ("invalid", None),
    ],
)  # fmt: skip
def test_reading_of_actions(text: str, action: str | None) -> None:
    assert read_action(text) == action


def test_episode_ends_unsolved_at_its_last_step() -> None:
    *before, last = walk(["left"] * 5, max_steps=5)
    assert not any(step.done for step in before)
    assert last.done and not last.success and not last.void and last.reward == 0.0
    assert walk(["what?"] * 2, max_steps=2)[-1].void


def test_door_and_key_are_needed_in_order() -> None:
    grid = parse_map(ROWS)
    before_door = GridState((1, 1))
    assert advance(grid, before_door, "right") == advance(grid, before_door, "open") == before_door
    opened = advance(grid, GridState((1, 1), has_key=True), "open")
    assert opened.door_open and advance(grid, opened, "right").cell == (1, 2)
    assert advance(grid, GridState((0, 0), has_key=True), "open") == GridState((0, 0), has_key=True)  # too far


def test_observations_tell_the_states_of_a_map_apart() -> None:
    for task in draw_tasks(20, seed=3, size=5):
        grid = parse_map(task.rows)
        states = list(remaining_steps(grid))
        live = [state for state in states if state.cell != grid.goal]
        assert len({observe(grid, state) for state in live}) == len(live)


def test_remaining_steps_against_trying_everything() -> None:
    grid = parse_map(["AK#.", "..DG"])
    fewest = remaining_steps(grid)[grid.start_state]

    def solves(words: tuple[str, ...]) -> bool:
        state = grid.start_state
        for word in words:
            state = advance(grid, state, word)
        return state.cell == grid.goal

    assert fewest == 6  # right, take, down, open, right, right
    assert not any(solves(words) for words in product(ACTIONS, repeat=fewest - 1))
    assert solves(("right", "take", "down", "open", "right", "right"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "list of up to 10 strings"), ([], "list of up to 10"), (["AK", "DGx"], "equal length"),
        (["AKDD"], "once each"), (["AK?DG"], "once each"), (["A#KDG"], "cannot be solved"), ([3], "list of up to 10"),
    ],
)  # fmt: skip
def test_unusable_maps_are_named(rows: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"'room' is not one of env.name=grid_world.*{message}"):
        GridWorldEnvironment.opening(prompt_of(rows))


@pytest.mark.parametrize("kwargs", [{"max_steps": 0}, {"history": -1}, {"max_steps": 2.5}, {"history": True}])
def test_unusable_settings_are_named(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"env.kwargs.{next(iter(kwargs))} must be an integer"):
        GridWorldEnvironment(**kwargs)


def test_contract() -> None:
    check_environment(GridWorldEnvironment, prompt_of(), turns=[*WAY[:4], "nonsense", *WAY[4:]])


def play(words: list[str], **limits: int) -> Trajectory:
    bounds = {"max_turns": 20, "max_prompt_length": 300, "max_response_length": 16, "max_model_len": 316}
    return asyncio.run(
        run_episode(
            engine=ScriptedEngine(words),
            renderer=tiny_renderer(),
            environment=GridWorldEnvironment(),
            reward=EnvironmentReward(),
            prompt=prompt_of(),
            trajectory_id=TrajectoryId(1, 0, 0),
            noise_key=5,
            limits=EpisodeLimits(**{**bounds, **limits}, max_tool_response_length=100),
            sampling=SamplingParams(max_new_tokens=16),
        )
    )


def test_a_whole_episode_is_one_segment_per_step() -> None:
    trajectory = play(["left", "nonsense", *WAY])
    assert trajectory.stop_reason is StopReason.ANSWER and len(trajectory.segments) == trajectory.num_turns == 10
    parts = trajectory.reward
    assert (parts.outcome, parts.success, parts.num_tool_calls, parts.num_tool_turns) == (1.0, True, 9, 9)
    assert parts.num_invalid_actions == 1 and trajectory.num_tool_failures == 2
    assert [segment.reward for segment in trajectory.segments] == [0.0] * 9 + [1.0]
    assert [segment.num_invalid_actions for segment in trajectory.segments] == [0, 1] + [0] * 8
    keys = [segment.observation_key for segment in trajectory.segments]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 8  # the same state before and after useless steps


def test_turn_limit_of_the_rollout_comes_first_if_lower() -> None:
    trajectory = play(WAY, max_turns=3)
    assert trajectory.stop_reason is StopReason.TURN_LIMIT and not trajectory.reward.success


def test_tasks_are_solvable_different_and_deterministic() -> None:
    tasks = draw_tasks(40, seed=1, size=4, min_steps=6)
    assert tasks == draw_tasks(60, seed=1, size=4, min_steps=6)[:40]
    assert len({task.rows for task in tasks}) == 40 and tasks != draw_tasks(40, seed=2, size=4, min_steps=6)
    for task in tasks:
        grid = parse_map(task.rows)
        assert remaining_steps(grid)[grid.start_state] == task.num_steps >= 6
    with pytest.raises(ValueError, match=r"--size must lie between 3 and 10"):
        draw_tasks(1, seed=0, size=2)
    with pytest.raises(ValueError, match=r"found \d+ of 9 maps: lower --num"):
        draw_tasks(9, seed=0, size=3, min_steps=30)


def test_demonstrations_show_what_the_environment_shows() -> None:
    (task,) = draw_tasks(1, seed=4, size=4)
    perfect = list(demonstrations([task], skill=1.0, seed=0, max_steps=30, history=2))
    assert len(perfect) == task.num_steps

    async def replay() -> StepResult:
        environment = GridWorldEnvironment(max_steps=30)
        observation: Observation | None = await environment.reset(prompt_of(list(task.rows)))
        for user, assistant in perfect:
            assert text_of(observation) == user["content"]
            step = await environment.step(Turn(assistant["content"], (), True))
            observation = step.observation
        return step

    assert asyncio.run(replay()).success
    clumsy = list(demonstrations([task], skill=0.0, seed=0, max_steps=12, history=2))
    assert len(clumsy) == 12 and all(turn["content"] in ACTIONS for _, turn in clumsy)
    with pytest.raises(ValueError, match="--skill"):
        list(demonstrations([task], skill=1.5, seed=0, max_steps=3, history=0))


def test_files_of_the_command_are_what_configurations_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num", "12", "--num-val", "5", "--size", "4", "--min-steps", "5", "--demonstrations", "6"]
    assert main([str(tmp_path), *options]) == 0
    assert "train.jsonl: 12 rows" in capsys.readouterr().out
    data = DataConfig(train_files=str(tmp_path / "train.jsonl"), val_files=str(tmp_path / "val.jsonl"))
    train, val = load_prompts(data, "train"), load_prompts(data, "val")
    maps = {json.dumps(prompt.extra["map"]) for prompt in (*train, *val)}
    assert (len(train), len(val), len(maps)) == (12, 5, 17)
    check_environment(GridWorldEnvironment, train[0], turns=["up", "down"])
    path = str(tmp_path / "demonstrations.jsonl")
    examples = encode_conversations(load_conversations([path]), tiny_renderer(), max_length=400)
    words = {tiny_renderer().tokenizer.decode(example.ids[example.loss_mask].tolist()) for example in examples}
    assert words <= {f"{action}<|im_end|>" for action in ACTIONS}
    tokenizer = build_tokenizer(seed=0, max_vocab_size=320, texts=conversation_texts(path))
    assert all(len(tokenizer.encode(action)) == 1 for action in ("up", "down", "left", "right"))
    assert max(len(example.ids) for example in examples) > 64  # the default tokenizer does not know these texts
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--num", "3", "--demonstrations", "4"])
