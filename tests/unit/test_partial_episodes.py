"""Episodes that are stopped anywhere and go on later: the same tokens, every one with the version that sampled it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scripted import log_prob_of, tiny_renderer
from test_grid_world import WAY, prompt_of
from test_trainer_deal import ALONE

from spear_megatron.environments.code_interpreter import CodeInterpreterEnvironment
from spear_megatron.environments.grid_world import GridWorldEnvironment
from spear_megatron.environments.protocol import Observation, StepResult, Turn
from spear_megatron.environments.sandbox.protocol import ExecutionResult, ExecutionStatus
from spear_megatron.rollout.agent_loop import EpisodeLimits, run_episode
from spear_megatron.rollout.engine import GenerateRequest, GenerateResult, RequestStopped, SamplingParams
from spear_megatron.rollout.oversampling import Drawing, Drawn, Portion, StoppableEngine, draw_groups
from spear_megatron.rollout.partial import EpisodeSlot, HeldGroup, PartialEpisode
from spear_megatron.rollout.work import SharedWork
from spear_megatron.testing import ContractError, check_environment
from spear_megatron.testing.latency import LatencyEnvironment
from spear_megatron.trainer.ahead import decode_held, encode_held
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId

ID = TrajectoryId(2, 5, 1)
SUM = Prompt("sum", ({"role": "user", "content": "What is 34 + 57?"},), answer="91")
LIMITS = EpisodeLimits(
    max_turns=20, max_prompt_length=200, max_response_length=200, max_model_len=400, max_tool_response_length=200
)
CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(34 + 57)"}}\n</tool_call>'


class TokenEngine:
    """Says one token of its script at a time; ``stop_at`` tokens are all it says before it waits to be aborted."""

    def __init__(self, texts: list[str], stop_at: int = 10**9) -> None:
        self.texts, self.stop_at, self.version = texts, stop_at, 3
        self.said: dict[str, int] = {}
        self.total = 0
        self._aborted: set[str] = set()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        turn = int(request.request_id.rpartition("/")[2])
        ids = tiny_renderer().tokenizer.encode(self.texts[turn] + "<|im_end|>", add_special_tokens=False)
        out: list[int] = []
        reason: Any = "abort"
        while request.request_id not in self._aborted:
            await asyncio.sleep(0)
            if self.total >= self.stop_at:
                continue
            at = self.said.get(request.request_id, 0)
            out.append(ids[at])
            self.said[request.request_id], self.total = at + 1, self.total + 1
            if ids[at] in request.sampling.stop_token_ids or len(out) == request.sampling.max_new_tokens:
                reason = "stop" if ids[at] in request.sampling.stop_token_ids else "length"
                break
        self._aborted.discard(request.request_id)
        start = len(request.input_ids)
        log_probs = tuple(log_prob_of(start + offset) for offset in range(len(out)))
        return GenerateResult(tuple(out), log_probs, reason, (self.version,) * len(out))

    async def abort(self, request_ids) -> None:
        self._aborted |= set(request_ids)

    def update_weights(self, named_tensors, version) -> None:
        raise AssertionError

    async def close(self) -> None: ...


class Sandbox:
    async def run(self, code: str) -> ExecutionResult:
        return ExecutionResult(status=ExecutionStatus.OK, stdout="91\n")

    async def close(self) -> None: ...


async def own_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
    return dataclasses.replace(trajectory.reward, outcome=trajectory.reward.outcome + 1.0)


def episode(engine: Any, environment: Any, prompt: Prompt, slot: EpisodeSlot | None, reward: Any = own_reward,
            **sampling: int) -> Any:
    return run_episode(
        engine=engine, renderer=tiny_renderer(), environment=environment, reward=reward, prompt=prompt,
        trajectory_id=ID, noise_key=7, limits=LIMITS, sampling=SamplingParams(sampling.get("max_new_tokens", 100)),
        slot=slot,
    )  # fmt: skip


def stored(partial: PartialEpisode) -> PartialEpisode:
    """The partial episode after a checkpoint."""
    state = encode_held([HeldGroup(2, 5, {}, {1: partial})], ALONE, temperature=1.0, timeout_s=1.0)
    ((owner, group),) = decode_held(state, ALONE)
    assert owner == 0 and (group.born, group.task, list(group.partial)) == (2, 5, [1])
    return group.partial[1]


def cut_and_go_on(texts: list[str], make: Any, prompt: Prompt, stop_at: int, **sampling: int) -> tuple[Any, Trajectory]:
    """Stop an episode after so many tokens; the partial episode, and what became of it with newer weights."""

    async def play() -> tuple[Any, Trajectory]:
        engine = TokenEngine(texts, stop_at)
        stoppable, slot = StoppableEngine(engine), EpisodeSlot()
        task = asyncio.create_task(episode(stoppable, make(), prompt, slot, **sampling))
        while engine.total < stop_at or not stoppable._pending:
            await asyncio.sleep(0)
        await stoppable.stop()
        with pytest.raises(RequestStopped):
            await task
        partial = slot.partial()
        assert partial is not None and slot.num_sampled == partial.num_sampled == stop_at
        engine.version, engine.stop_at = 4, 10**9
        again = EpisodeSlot(stored(partial))
        assert again.num_sampled == stop_at
        return partial, await episode(StoppableEngine(engine), make(), prompt, again, **sampling)

    return asyncio.run(play())


def whole_of(texts: list[str], make: Any, prompt: Prompt, **sampling: int) -> Trajectory:
    return asyncio.run(episode(TokenEngine(texts), make(), prompt, EpisodeSlot(), **sampling))


def check_same(one: Trajectory, whole: Trajectory, num_old: int) -> None:
    """Equal but for the versions, of which the first ``num_old`` tokens have the old one."""
    assert len(one.segments) == len(whole.segments)
    for mine, other in zip(one.segments, whole.segments, strict=True):
        for name in ("ids", "response_mask", "rollout_log_probs"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        assert (mine.observation_key, mine.reward) == (other.observation_key, other.reward)
        assert mine.num_invalid_actions == other.num_invalid_actions
    versions = [v for part in one.segments for v in part.policy_versions[part.response_mask].tolist()]
    assert versions == [3] * num_old + [4] * (len(versions) - num_old) and one.policy_version == 3
    plain = {"segments": (), "policy_version": 0}
    assert dataclasses.replace(one, **plain) == dataclasses.replace(whole, **plain)


TOOL = ([CALL, CALL, "\\boxed{91}"], lambda: CodeInterpreterEnvironment(sandbox=Sandbox()), SUM)
GRID = ([*WAY[:4], "nonsense", *WAY[4:]], lambda: GridWorldEnvironment(history=2), prompt_of())


@pytest.mark.parametrize("case", [TOOL, GRID], ids=["code interpreter", "grid world"])
def test_an_episode_goes_on_from_any_token(case: Any) -> None:
    whole = whole_of(*case)
    total = sum(int(segment.response_mask.sum()) for segment in whole.segments)
    assert whole.stop_reason is StopReason.ANSWER and whole.num_turns == len(case[0])
    for stop_at in range(1, total):
        partial, again = cut_and_go_on(*case, stop_at)
        assert partial.stage == "turn"
        check_same(again, whole, stop_at)


def test_a_turn_that_was_cut_keeps_its_limit() -> None:
    whole = whole_of(*TOOL, max_new_tokens=12)
    assert whole.stop_reason is StopReason.LENGTH and len(whole.segments[0].ids) > 12
    check_same(cut_and_go_on(*TOOL, 5, max_new_tokens=12)[1], whole, 5)


class Gate(LatencyEnvironment):
    """Waits in every step until it is let through."""

    def __init__(self) -> None:
        super().__init__(latency_s=0.0)
        self.open = False

    async def step(self, turn: Turn) -> StepResult:
        while not self.open:
            await asyncio.sleep(0)
        return await super().step(turn)


def open_gate() -> Gate:
    gate = Gate()
    gate.open = True
    return gate


@pytest.mark.parametrize("stage", ["step", "reward"])
def test_a_whole_turn_survives_a_stop_in_the_environment_or_in_the_reward(stage: str) -> None:
    texts = ["one", "two"]

    async def slow_reward(prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        await asyncio.sleep(60)
        raise AssertionError

    async def play() -> tuple[PartialEpisode, Trajectory, int]:
        engine, slot = TokenEngine(texts), EpisodeSlot()
        environment, reward = (Gate(), own_reward) if stage == "step" else (open_gate(), slow_reward)
        task = asyncio.create_task(episode(engine, environment, SUM, slot, reward))
        for _ in range(500):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        partial = slot.partial()
        assert partial is not None
        engine.version, said = 4, engine.total
        return partial, await episode(engine, open_gate(), SUM, EpisodeSlot(stored(partial))), said

    partial, again, said = asyncio.run(play())
    assert partial.stage == stage and partial.num_sampled == said
    check_same(again, whole_of(texts, open_gate, SUM), said)


class Forgetful:
    """An environment that cannot be restored."""

    async def reset(self, prompt: Prompt) -> Observation:
        return Observation(messages=prompt.messages)

    async def step(self, turn: Turn) -> StepResult:
        return StepResult(done=True)

    async def close(self) -> None: ...


def test_without_snapshots_an_episode_starts_again() -> None:
    async def play() -> EpisodeSlot:
        engine, slot = TokenEngine(["one two three"], stop_at=2), EpisodeSlot()
        stoppable = StoppableEngine(engine)
        task = asyncio.create_task(episode(stoppable, Forgetful(), SUM, slot))
        while engine.total < 2:
            await asyncio.sleep(0)
        await stoppable.stop()
        await asyncio.gather(task, return_exceptions=True)
        return slot

    slot = asyncio.run(play())
    assert slot.partial() is None and slot.num_sampled == 2
    assert EpisodeSlot().partial() is None and EpisodeSlot().num_sampled == 0


class Stateful(Forgetful):
    """Answers at once; its state is what the test wants."""

    def __init__(self, state: Any) -> None:
        self.state, self.asked = state, 0

    def snapshot(self) -> Any:
        self.asked += 1
        return self.state if not isinstance(self.state, Exception) else raises(self.state)

    async def restore(self, prompt: Prompt, state: Any) -> None: ...


def raises(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("state", "text"),
    [({"at": {1, 2}}, "TypeError: .*set"), (None, "TypeError"), (OSError("no disk"), "OSError: no disk")],
)
def test_a_state_that_cannot_be_kept_fails_its_episode_alone(state: Any, text: str) -> None:
    environment = Stateful(state)
    trajectory = asyncio.run(episode(TokenEngine(["one"]), environment, SUM, EpisodeSlot()))
    assert trajectory.stop_reason is StopReason.INFRASTRUCTURE
    assert re.match(f"environment snapshot: {text}", trajectory.error or "")


def test_the_state_is_asked_for_only_where_it_may_be_kept() -> None:
    for slot, times in ((None, 0), (EpisodeSlot(resumable=False), 0), (EpisodeSlot(), 1)):
        environment = Stateful({"pair": (1, 2)})
        assert asyncio.run(episode(TokenEngine(["one"]), environment, SUM, slot)).valid
        assert environment.asked == times
    partial = slot.partial() if slot is not None else None
    assert partial is not None and partial.environment == {"pair": [1, 2]}  # as a checkpoint gives it back


def test_the_contract_finds_an_environment_that_restores_something_else() -> None:
    class Wrong(GridWorldEnvironment):
        async def restore(self, prompt: Prompt, state: Any) -> None:
            await super().restore(prompt, {**state, "has_key": False})

    check_environment(GridWorldEnvironment, prompt_of(), turns=WAY)
    check_environment(lambda: CodeInterpreterEnvironment(sandbox=Sandbox()), SUM, turns=[CALL, "\\boxed{91}"])
    with pytest.raises(ContractError, match="restored after [0-9]+ steps, step [0-9]+ gave"):
        check_environment(Wrong, prompt_of(), turns=WAY)


def draw(held: Any, *, step: int, stop_at: int, wanted: int, max_age: int = 2, version: int = 3,
         fresh: tuple[int, ...] = ()) -> Drawn:
    """A leader with two tasks of two episodes, of which the second one's engine says ``stop_at`` tokens at most."""

    async def play() -> Drawn:
        fast, slow = StoppableEngine(TokenEngine(["one"])), TokenEngine(["one two three four"], stop_at)
        slow.version = version
        for before, _ in held:
            for sample, partial in before.partial.items():
                slow.said[f"{before.born}-{before.task}-{sample}/0/0"] = partial.num_sampled
        stoppable = StoppableEngine(slow)

        async def run(prompt: Prompt, key: TrajectoryId, slot: EpisodeSlot) -> Trajectory:
            engine = fast if key.task == 0 else stoppable
            environment = LatencyEnvironment(latency_s=0.0, num_turns=1)
            return await run_episode(
                engine=engine, renderer=tiny_renderer(), environment=environment, reward=own_reward, prompt=prompt,
                trajectory_id=key, noise_key=1, limits=LIMITS, sampling=SamplingParams(50), slot=slot,
            )  # fmt: skip

        drawing = Drawing(
            step=step, num_samples=2, run=run, stop=stoppable.stop, owner=0, max_concurrency=8,
            deadline_s=5.0, max_age=max_age,
        )  # fmt: skip
        free = [(task, SUM) for task in fresh]
        return await draw_groups(drawing, Portion(SharedWork(dist.HashStore(), "test"), wanted, free, held))

    return asyncio.run(play())


def test_a_group_is_held_goes_on_under_its_own_id_and_expires() -> None:
    first = draw([], step=4, stop_at=3, wanted=1, fresh=(0, 1))
    assert list(first.groups) == [0] and sorted(first.held) == [0, 1]
    record = {record.task: record for record in first.records}[1]
    assert (record.born, record.held, record.complete, record.lost) == (4, True, False, 0)
    held = json.loads(json.dumps(dataclasses.asdict(record)))
    assert held["episodes"] == [[2, False], [1, False]] or sum(n for n, _ in held["episodes"]) == 3
    second = draw([(first.held[1], SUM)], step=5, stop_at=10**9, wanted=1, version=4)
    (group,) = second.groups.values()
    assert [member.id for member in group.trajectories] == [TrajectoryId(4, 1, 0), TrajectoryId(4, 1, 1)]
    versions = [v for m in group.trajectories for v in m.segments[0].policy_versions.tolist() if v >= 0]
    assert versions.count(3) == 3 and set(versions) == {3, 4}
    (record,) = second.records
    assert (record.resumed, record.carried, record.born) == (len(first.held[1].partial), 3, 4)
    old = draw([(first.held[1], SUM)], step=6, stop_at=0, wanted=1, fresh=(0,))
    expired = {record.task: record for record in old.records}[1]
    assert list(old.held) == [0] and not expired.held and expired.lost == len(first.held[1].partial)
    assert draw([(first.held[1], SUM)], step=5, stop_at=0, wanted=0).held == {1: first.held[1]}
    assert draw([(first.held[1], SUM)], step=6, stop_at=0, wanted=0).held == {}
    assert draw([], step=4, stop_at=3, wanted=1, max_age=0, fresh=(0, 1)).held == {}
