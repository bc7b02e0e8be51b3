"""Refusing prompts that are too long before the first episode: met in the middle of a run they would end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from spear_megatron.data.chat import ChatRenderer
from spear_megatron.environments.protocol import Observation
from spear_megatron.types import Prompt


def check_prompt_lengths(
    prompts: Sequence[Prompt],
    opening: Callable[[Prompt], Observation],
    renderer: ChatRenderer,
    *,
    max_prompt_length: int,
) -> None:
    """Check the tokens of every prompt's opening conversation.

    Args:
        opening: what an episode of the prompt begins with.
        max_prompt_length: tokens that it may have.

    Raises:
        ValueError: some prompt is longer; counts them and names the first.
    """
    measure = _Measure(renderer)
    lengths = ((prompt, measure.at_most(opening(prompt), max_prompt_length)) for prompt in prompts)
    too_long = [(prompt.task_id, length) for prompt, length in lengths if length > max_prompt_length]
    if too_long:
        task_id, length = too_long[0]
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts have more tokens than data.max_prompt_length="
            f"{max_prompt_length}, the first is {task_id!r} with {length}: raise it or remove the prompts"
        )


class _Measure:
    """Counts tokens, but only where a bound does not tell enough: data sets have many short prompts."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer
        self._frames: dict[str, int] = {}

    def at_most(self, observation: Observation, limit: int) -> int:
        """Tokens of the conversation, or a number within ``limit`` that they do not exceed."""
        bound = self._bound(observation)
        return bound if bound is not None and bound <= limit else self._count(observation)

    def _bound(self, observation: Observation) -> int | None:
        """Tokens of the conversation without its text, and one for each byte of that; None if the text may grow.

        Normalisation leaves ASCII as it is; ``<`` may be followed by a space that keeps control tokens apart.
        """
        texts = [message.get("content") for message in observation.messages]
        if not all(isinstance(text, str) and text.isascii() for text in texts):
            return None
        frame = replace(observation, messages=tuple({**message, "content": "x"} for message in observation.messages))
        key = repr((frame.messages, frame.tools))
        if key not in self._frames:
            self._frames[key] = self._count(frame)
        return self._frames[key] + sum(len(text) + text.count("<") for text in texts if text is not None)

    def _count(self, observation: Observation) -> int:
        return len(self._renderer.prompt_ids(observation.messages, observation.tools))
