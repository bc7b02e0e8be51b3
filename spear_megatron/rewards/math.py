"""Reward of problems with one right answer in ``\\boxed{}``."""

from __future__ import annotations

from spear_megatron.environments.protocol import final_text
from spear_megatron.rewards.answers import last_boxed, quick_verdict
from spear_megatron.rewards.verifier import MathVerifier
from spear_megatron.types import Prompt, RewardParts, Trajectory

_MAX_ANSWER_CHARS = 1000


class MathReward:
    """``correct`` or ``wrong`` by the last boxed answer of the model's last turn.

    Texts and integers are compared directly; only what that cannot decide goes to math-verify in worker processes,
    which start when first needed. An answer that math-verify cannot judge within ``deadline_s`` seconds is wrong.
    """

    def __init__(
        self, *, correct: float = 1.0, wrong: float = 0.0, num_workers: int = 2, deadline_s: float = 10.0
    ) -> None:
        if not correct > wrong:
            raise ValueError(f"reward.kwargs.correct ({correct}) must be greater than reward.kwargs.wrong ({wrong})")
        self._correct = float(correct)
        self._wrong = float(wrong)
        self._verifier = MathVerifier(num_workers=num_workers, deadline_s=deadline_s)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardParts:
        """Outcome and success; the tool calls are counted, nothing is added for them here.

        Raises:
            ValueError: the prompt has no answer.
            RuntimeError: the worker processes cannot be started.
        """
        if prompt.answer is None:
            raise ValueError(f"the prompt {prompt.task_id!r} has no answer to compare with")
        right = await self.is_correct(final_text(trajectory.messages), prompt.answer)
        return RewardParts(
            outcome=self._correct if right else self._wrong,
            num_tool_calls=trajectory.num_tool_calls,
            penalty=0.0,
            success=right,
        )

    async def is_correct(self, text: str, truth: str) -> bool:
        """Whether the last boxed answer in ``text`` equals ``truth``."""
        answer = last_boxed(text)
        if answer is None or len(answer) > _MAX_ANSWER_CHARS:
            return False
        verdict = quick_verdict(answer, truth)
        return await self._verifier.equal(answer, truth) if verdict is None else verdict

    def close(self) -> None:
        """Stop the worker processes, if any were started."""
        self._verifier.close()
