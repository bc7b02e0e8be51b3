"""Answers out of text, the fast comparison, and math-verify behind a deadline."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
from spear_megatron.rewards.answers import canonical_answer, canonical_integer, last_boxed, quick_verdict
from spear_megatron.rewards.math import MathReward
from spear_megatron.types import Prompt, RewardParts, StopReason, Trajectory, TrajectoryId


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("no box", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{ 5 } and \boxed{6}", "6"),
        (r"\boxed{72} wait, \boxed{73", "72"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{{5}", None),
        (r"\boxed{}", ""),
        (r"\\boxed{5}", None),
        (r"\fbox{5}", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_last_boxed_is_linear() -> None:
    start = time.perf_counter()
    assert last_boxed(r"\boxed{" * 200_000) is None
    assert last_boxed(r"\boxed{" * 100_000 + "7" + "}" * 100_000) == "7"
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", "5"), ("-5", "-5"), ("+5", "5"), ("007", "7"), ("0", "0"), ("-0", "0"), ("000", "0"), ("1,234", "1234"),
        ("12{,}345{,}678", "12345678"), (r"1\,234", "1234"), ("$42$", "42"), (r"336^\circ", "336"), ("336°", "336"),
        (r"336^{\circ}", "336"), ("5.0", "5"), ("5.", "5"), (" - 42 ", "-42"), ("4 2", None), ("9" * 5000, "9" * 5000),
        ("5.1", None), ("1,2", None), ("1,23,456", None), ("x", None), ("", None), ("3/4", None), ("1e3", None),
        ("٣", None), ("--5", None), ("5^2", None), (r"10^\circ C", None),
    ],
)
def test_canonical_integer(text: str, value: str | None) -> None:
    assert canonical_integer(text) == value


@pytest.mark.parametrize(
    ("answer", "truth", "verdict"),
    [
        ("91", "91", True), ("091", "91", True), ("1,000", "1000", True), ("90", "91", False), ("", "91", False),
        (r"336", r"336^\circ", True), ("x+1", "x+1", True), ("x+1", "1+x", None), ("1/2", "0.5", None),
        ("n", "5", None),
    ],
)
def test_quick_verdict(answer: str, truth: str, verdict: bool | None) -> None:
    assert quick_verdict(answer, truth) is verdict


def test_canonical_answers_for_voting() -> None:
    assert canonical_answer(r"so \boxed{1,000}") == canonical_answer(r"\boxed{ 1000. }") == "1000"
    assert canonical_answer(r"\boxed{x + 1}") == "x+1"
    assert canonical_answer("none") is None and canonical_answer(r"\boxed{}") is None


def trajectory_of(*texts: str, num_tool_calls: int = 2) -> Trajectory:
    messages = [{"role": "user", "content": r"\boxed{91}?"}]
    for text in texts:
        messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": r"\boxed{91}"}]
    return Trajectory(
        id=TrajectoryId(1, 0, 0), segments=(), reward=RewardParts(0.0), stop_reason=StopReason.ANSWER,
        policy_version=0, num_tool_calls=num_tool_calls, messages=tuple(messages),
    )


PROMPT = Prompt("p", ({"role": "user", "content": "?"},), answer="91")


@pytest.mark.parametrize(
    ("texts", "success"),
    [((r"\boxed{91}",), True), ((r"\boxed{91}", "no"), False), ((), False), ((r"\boxed{9}", r"\boxed{091}"), True),
     ((r"\boxed{" + "1" * 2000 + "}",), False)],
)
def test_reward_reads_the_models_last_turn_only(texts: tuple[str, ...], success: bool) -> None:
    parts = asyncio.run(MathReward(correct=2.0, wrong=-1.0)(PROMPT, trajectory_of(*texts)))
    assert parts == RewardParts(2.0 if success else -1.0, num_tool_calls=2, penalty=0.0, success=success)


def test_bad_settings_and_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="must be greater than"):
        MathReward(correct=0.0, wrong=0.0)
    with pytest.raises(ValueError, match="num_workers"):
        MathReward(num_workers=0)
    with pytest.raises(ValueError, match="deadline_s"):
        MathReward(deadline_s=0)
    with pytest.raises(ValueError, match="'q' has no answer"):
        asyncio.run(MathReward()(Prompt("q", ()), trajectory_of("x")))


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    reward = MathReward(num_workers=1, deadline_s=20.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (r"\frac{1}{2}", "0.5", True), ("x+1", "1+x", True), (r"\frac{2}{4}", r"\frac12", True), (r"\pi", "3", False),
        (r"2\sqrt{3}", r"\sqrt{12}", True), (r"\{1,2\}", r"\{2,1\}", True), ("}{", "5", False), ("\ud800", "5", False),
        (r"\text{the cat}", "5", False), ("3+4", "7", True), ("\n", "5", False),
    ],
)
def test_math_verify_decides_the_rest(reward: MathReward, answer: str, truth: str, right: bool) -> None:
    assert asyncio.run(reward.is_correct(f"\\boxed{{{answer}}}", truth)) is right


def test_random_answers_never_raise(reward: MathReward) -> None:
    rng = random.Random(0)
    pieces = [r"\frac", "{", "}", "1", "x", "^", r"\sqrt", "_", "(", ",", r"\sum", "=", "\\", r"\int", " ", "!", r"\%"]

    async def judge() -> list[bool]:
        texts = ["".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))) for _ in range(60)]
        return await asyncio.gather(*(reward.is_correct(f"\\boxed{{{text}}}", "12345") for text in texts))

    assert asyncio.run(judge()) == [False] * 60


def test_fast_path_starts_no_process() -> None:
    reward = MathReward()
    assert asyncio.run(reward.is_correct(r"\boxed{91}", "91"))
    assert reward._verifier._threads is None


def test_hanging_worker_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A worker that stops answering costs one deadline, counts as wrong, and the next comparison is served."""
    from spear_megatron.rewards import verifier

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\nprint('ready', flush=True)\nfor line in sys.stdin:\n"
        "    answer, truth = json.loads(line)\n"
        "    if answer == 'hang': time.sleep(600)\n"
        "    if answer == 'die': sys.exit(3)\n"
        "    print('equal', flush=True)\n"
    )
    monkeypatch.setattr(verifier, "_WORKER", script)
    checker = verifier.MathVerifier(num_workers=1, deadline_s=0.5)

    async def ask() -> list[bool]:
        return [await checker.equal(answer, "x") for answer in ("a", "hang", "b", "die", "c")]

    start = time.perf_counter()
    assert asyncio.run(ask()) == [True, False, True, False, True]
    assert checker.num_restarts == 2 and time.perf_counter() - start < 20
    checker.close()


def test_worker_that_cannot_start_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from spear_megatron.rewards import verifier

    script = tmp_path / "worker.py"
    script.write_text("print('No module named math_verify', flush=True)\n")
    monkeypatch.setattr(verifier, "_WORKER", script)
    checker = verifier.MathVerifier(num_workers=1, deadline_s=5.0)
    with pytest.raises(RuntimeError, match="No module named math_verify.*pip install math-verify"):
        asyncio.run(checker.equal("a", "b"))
    checker.close()
