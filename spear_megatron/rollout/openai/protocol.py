"""What is sent to an OpenAI-compatible server's /v1/completions and what comes back. Pure: nothing here does I/O.

The prompt goes as token ids. vLLM and SGLang also return the sampled ids (``return_token_ids``) and stop at token ids;
a server that refuses such extensions gets a plain request, and its text is tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spear_megatron.parallel.seeds import derive_key
from spear_megatron.rollout.engine import EngineError, GenerateRequest

_MAX_STOPS = 4  # OpenAI's own limit
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """Sampled tokens, a matched stop token included; ``exact`` if the server named them itself."""

    output_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    exact: bool


def completion_payload(
    request: GenerateRequest, model: str, *, extended: bool, decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Body of /v1/completions for a checked request.

    The seed follows from the request's noise key and the length of what it goes on from, so that every turn of every
    sample has its own, and the same one when it is asked again. Whether it decides the tokens is up to the server.

    Args:
        extended: also the keys that vLLM and SGLang know beyond OpenAI's.
        decode: text of token ids, for plain stop strings.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.input_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "n": 1,
        "stream": False,
        "seed": derive_key(request.noise_key, "openai", len(request.input_ids)) % 2**31,
    }
    if extended:
        body |= {"return_token_ids": True, "skip_special_tokens": False, "stop_token_ids": [*sampling.stop_token_ids]}
        body |= {"top_k": sampling.top_k} if sampling.top_k != -1 else {}
    elif sampling.stop_token_ids:
        body["stop"] = [decode([token]) for token in sampling.stop_token_ids[:_MAX_STOPS]]
    return body


def parse_answer(
    body: Any, *, request: GenerateRequest, vocab_size: int, encode: Callable[[str], Sequence[int]]
) -> Answer:
    """Read the 200 answer to ``completion_payload(request, ...)``.

    Servers leave the stop token out of the text, some also out of the ids: it is put back, so that the conversation
    goes on as the chat template has it.

    Args:
        encode: token ids of a text, for servers that return no ids.

    Raises:
        EngineError: the answer lacks something, contradicts the request, or was aborted or filtered.
    """
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise EngineError(f"the answer must have one choice: {_shown(body)}")
    choice = choices[0]
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise EngineError(f"the completion ended with finish_reason={finish!r}")
    read = (body.get("usage") or {}).get("prompt_tokens")
    if isinstance(read, int) and read != len(request.input_ids):
        raise EngineError(
            f"the server read {read} prompt tokens where {len(request.input_ids)} were sent: it does not take token "
            "ids as the prompt, or adds tokens of its own"
        )
    given = choice.get("token_ids")
    ids = _ids(given, vocab_size) if given is not None else tuple(encode(_text(choice)))
    stops = request.sampling.stop_token_ids
    if finish == "stop" and stops and not (ids and ids[-1] in stops):
        ids = (*ids, _matched(choice, stops))
    if given is not None and len(ids) > request.sampling.max_new_tokens:
        raise EngineError(f"the server gave {len(ids)} tokens for max_tokens={request.sampling.max_new_tokens}")
    return Answer(ids, finish, given is not None)


def _matched(choice: Mapping[str, Any], stops: Sequence[int]) -> int:
    """The stop token that ended the turn, as SGLang and vLLM name it, or else the first one: the end of a turn."""
    for key in ("matched_stop", "stop_reason"):
        if choice.get(key) in stops:
            return int(choice[key])
    return stops[0]


def _ids(given: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < vocab_size for token in given):
        raise EngineError(f"token_ids are no tokens of a vocabulary of {vocab_size}: {_shown(given)}")
    return tuple(given)


def _text(choice: Mapping[str, Any]) -> str:
    if not isinstance(choice.get("text"), str):
        raise EngineError(f"the completion has neither token_ids nor text: {_shown(choice)}")
    return str(choice["text"])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
