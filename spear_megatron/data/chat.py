"""Token in, token out in Qwen's hermes chat format: prompts, the tokens between turns, and masked conversations.

Rules, for the cases where a chat template is not stable under appending:

* Sampled tokens are never re-rendered. What follows a sampled turn is the template's own text after ``<|im_end|>``, so
  the template's JSON spacing, Qwen3's empty think block on the last assistant turn and its stripping of earlier
  thinking never touch what the policy wrote: thinking of earlier turns stays in the context of its segment.
* In a conversation for supervised training the template decides every token. The loss starts after what the generation
  prompt would already have given and ends with ``<|im_end|>``. A turn whose thinking the template strips carries no
  loss, because the policy is never asked to produce it in that form; nor does a turn with ``"loss": false``.
* The start of a model turn is a token boundary, as it is when sampling, also where the turn begins with a line break.
* Control tokens (``<|im_end|>`` ...) written out in a message are text: a space is put after their first character.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
_OPENING = f"{TURN_START}assistant\n"
_PROBE = "a turn of the model"


class ChatRenderer:
    """Renders chats to token ids with the tokenizer's own chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """``template_kwargs`` are handed to the template, for instance ``{"enable_thinking": False}`` for Qwen3.

        Raises:
            ValueError: the tokenizer has no chat template, lacks the control tokens of the format, or its template
                does not follow the format.
        """
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        vocabulary = tokenizer.get_vocab()
        for token in (TURN_START, TURN_END):
            if token not in vocabulary:
                raise ValueError(f"the tokenizer has no {token} token: use one of the Qwen chat format")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: add chat_template.jinja to the model folder")
        self.turn_end_id: int = vocabulary[TURN_END]
        ends = [self.turn_end_id, vocabulary.get("<|endoftext|>"), tokenizer.eos_token_id]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {TURN_START, TURN_END}  # whatever the tokenizer calls them
        self._control = re.compile("|".join(re.escape(token) for token in sorted(special)))
        self._prefill = self._generation_prompt().removeprefix(_OPENING)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the whole conversation with its tools and the generation prompt."""
        return self._encode(self._render(messages, tools, add_generation_prompt=True))

    def delta_ids(self, messages: Sequence[Message], *, closed: bool = True) -> list[int]:
        """Ids that the template puts between a sampled turn and the next one: line break, ``messages``, prompt.

        ``messages`` (tool responses or user messages, at least one) follow the turn. With ``closed`` False the turn
        did not end with ``<|im_end|>`` and the delta begins with it.
        """
        if not messages:
            raise ValueError("delta_ids needs at least one message to insert after the turn")
        base = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}]
        text = self._render([*base, *messages], (), add_generation_prompt=True)
        end = text.index(_PROBE) + len(_PROBE)
        return self._encode(text[end + len(TURN_END) if closed else end :])

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[bool]]:
        """Ids of a canonical conversation and its loss mask, True on what the policy is to produce.

        Raises:
            ValueError: the template cannot render the messages, or renders assistant turns in another format.
        """
        text = self._render(messages, tools, add_generation_prompt=False)
        ids: list[int] = []
        mask: list[bool] = []

        def extend(piece: str, sampled: bool) -> None:
            piece_ids = self._encode(piece)
            ids.extend(piece_ids)
            mask.extend([sampled] * len(piece_ids))

        position = 0
        for message in messages:
            if message["role"] != "assistant":
                continue
            opening = text.find(_OPENING, position)
            if opening < 0:
                raise ValueError("the chat template does not open assistant turns with '<|im_start|>assistant'")
            body = opening + len(_OPENING)
            if text.startswith(self._prefill, body):
                body += len(self._prefill)
            end = text.index(TURN_END, body) + len(TURN_END)
            extend(text[position:body], False)
            extend(text[body:end], _carries_loss(message, text[opening:end]))
            position = end
        extend(text[position:], False)
        return ids, mask

    def turn_text(self, output_ids: Sequence[int]) -> tuple[str, bool]:
        """Verbatim text of a sampled turn without its end-of-turn token, and whether ``<|im_end|>`` closed it."""
        closed = bool(output_ids) and output_ids[-1] == self.turn_end_id
        stopped = bool(output_ids) and output_ids[-1] in self.stop_token_ids
        return self.decode(output_ids[:-1] if stopped else output_ids), closed

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens included."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        import jinja2

        plain = [self._as_text(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain,
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    **self._template_kwargs,
                    **kwargs,
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(f"the chat template cannot render messages with roles {roles}: {error}") from error

    def _as_text(self, value: Any, key: str = "") -> Any:
        """A message with control tokens defused and a missing content as empty text."""
        if isinstance(value, str):
            return self._control.sub(lambda found: found[0][0] + " " + found[0][1:], value)
        if isinstance(value, Mapping):
            return {name: self._as_text(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._as_text(item) for item in value]
        return "" if value is None and key == "content" else value

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _generation_prompt(self) -> str:
        user = [{"role": "user", "content": "q"}]
        without = self._render(user, (), add_generation_prompt=False)
        prompt = self._render(user, (), add_generation_prompt=True).removeprefix(without)
        if not prompt.startswith(_OPENING):
            raise ValueError(f"the chat template's generation prompt is {prompt!r}, it must begin with {_OPENING!r}")
        return prompt


def _carries_loss(message: Message, rendered: str) -> bool:
    thinking = bool(message.get("reasoning_content")) or "</think>" in str(message.get("content") or "")
    stripped = thinking and "</think>" not in rendered
    return bool(message.get("loss", True)) and not stripped


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all tokens with their ids: equal where the same ids mean the same."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
